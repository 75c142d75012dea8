"""What DistIL (arXiv:2606.05152) proves on bandits and on two steps, by its exact numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megasd.algorithms.distil import DistIL
from megasd.losses.divergence import cross_entropy, divergence
from megasd.losses.policy_gradient import ClipRange, clipped_surrogate
from megasd.types import PerToken, ResponseBatch, Support, TeacherScores
from tests.unit.cases import FakeStudent

Comparison = Callable[[Tensor, Tensor], PerToken]  # log-probs of student and teacher [N, V]


def reverse_kl(student: Tensor, teacher: Tensor) -> PerToken:
    return divergence(student, teacher, kind="reverse_kl", rest="tail", vocab_size=student.shape[1])


def forward_kl(student: Tensor, teacher: Tensor) -> PerToken:
    return divergence(student, teacher, kind="forward_kl", rest="tail", vocab_size=student.shape[1])


def jsd(student: Tensor, teacher: Tensor) -> PerToken:
    return divergence(
        student, teacher, kind="jsd", alpha=0.5, rest="tail", vocab_size=student.shape[1]
    )


def forward_cross_entropy(student: Tensor, teacher: Tensor) -> PerToken:
    return cross_entropy(student, teacher, rest="tail", vocab_size=student.shape[1])


def random_table(*shape: int, seed: int) -> Tensor:
    """Probabilities; the last dimension sums to 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


# The bandit of propositions 1, 2 and 4: the teacher is better, 0.325 against 0.275.
STUDENT = torch.tensor([0.05, 0.45, 0.5], dtype=torch.float64)
BETTER = torch.tensor([0.3, 0.05, 0.65], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


def natural_step(slope: Tensor, policy: Tensor) -> Tensor:
    """Direction in logits that lowers the loss of gradient `slope`: -F^+ slope."""
    fisher = policy.diag() - policy.outer(policy)
    return -torch.linalg.pinv(fisher, hermitian=True) @ slope


def reward_rate(compare: Comparison, policy: Tensor, teacher: Tensor, rewards: Tensor) -> float:
    """d reward / d step along the natural gradient of the divergence to the teacher."""
    logits = policy.log().requires_grad_()
    loss = compare(logits.log_softmax(0)[None], teacher.log()[None]).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    (ascent,) = torch.autograd.grad(logits.softmax(0) @ rewards, logits)
    return (ascent @ natural_step(slope, policy)).item()


def test_a_natural_step_towards_a_better_teacher_lowers_the_reward_under_reverse_kl_and_jsd():
    apart = reverse_kl(STUDENT.log()[None], BETTER.log()[None])
    assert apart.item() == pytest.approx(0.767981, abs=5e-7)
    assert reward_rate(reverse_kl, STUDENT, BETTER, REWARDS) == pytest.approx(-0.193593, abs=5e-7)
    assert reward_rate(jsd, STUDENT, BETTER, REWARDS) == pytest.approx(-0.016659, abs=5e-7)


def test_the_same_step_under_cross_entropy_gains_exactly_what_the_teacher_is_ahead():
    rate = reward_rate(forward_cross_entropy, STUDENT, BETTER, REWARDS)
    assert rate == pytest.approx(0.05, rel=1e-9)
    for seed in range(20):
        student, teacher, rewards = random_table(3, 2 + seed % 7, seed=seed)
        ahead = ((teacher - student) @ rewards).item()
        for compare in (forward_cross_entropy, forward_kl):
            assert reward_rate(compare, student, teacher, rewards) == pytest.approx(ahead, rel=1e-8)


# Two steps: three actions at first, then three in the state that the first action led to.
FIRST, SECOND = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
STATES = torch.stack([torch.zeros(9, dtype=torch.long), 1 + FIRST], dim=1).flatten()
ACTIONS = torch.stack([FIRST, SECOND], dim=1).flatten()  # of all nine responses, laid end to end


def expected_loss(
    tables: Tensor, teacher: Tensor, compare: Comparison, *, has_future: bool
) -> Tensor:
    """DistIL's loss, its gradient that of the expectation over all nine responses, on policy.

    `tables` and `teacher` are log-probs [4, 3]: of the first step, then of states 0, 1, 2.
    """
    rows, teacher_rows = tables[STATES], teacher[STATES]
    logprobs, teacher_logprobs = (t.gather(1, ACTIONS[:, None])[:, 0] for t in (rows, teacher_rows))
    old, local = logprobs.detach(), compare(rows, teacher_rows)
    batch = ResponseBatch(
        rewards=torch.zeros(9),
        is_correct=torch.zeros(9, dtype=torch.bool),
        group_ids=torch.zeros(9, dtype=torch.long),
        minibatch_ids=torch.zeros(9, dtype=torch.long),
        rollout_ids=torch.arange(9).repeat_interleave(2),
        response_mask=torch.ones(18, dtype=torch.bool),
        max_response_tokens=2,
        old_logprobs=old,
        teachers={
            "teacher": TeacherScores(
                has_context=torch.ones(9, dtype=torch.bool),
                logprobs=teacher_logprobs,
                cross_entropy=local.detach(),
            )
        },
        support=Support(ids=torch.arange(3).repeat(18, 1), teacher_logprobs=teacher_rows),
    )
    method = DistIL(future_credit=has_future)
    credit = method.assign_credit(batch, 0)
    if compare is forward_cross_entropy:
        student = FakeStudent(logprobs, logits=rows, batch=batch)
        loss = method.token_loss(student, batch, credit).loss
    else:  # DistIL's future credit around another divergence
        loss = local + clipped_surrogate(logprobs, old, credit.advantages, clip=ClipRange()).loss
    chances = old.view(9, 2).sum(dim=1).exp().repeat_interleave(2)
    return (loss * chances).sum()


def two_step_student(logits: Tensor) -> Tensor:
    """Log-probs [4, 3] of the student of proposition 3, which moves two logits [2] only.

    The setting is worked back from the proposition's numbers: in each table one logit moves, at
    the first step and in state 0; states 1 and 2 are uniform, the first action 1 is rewarded.
    """
    moving = torch.cat([logits[:, None], torch.zeros(2, 2, dtype=torch.float64)], dim=1)
    return torch.cat([moving, torch.zeros(2, 3, dtype=torch.float64)]).log_softmax(1)


def two_step_teacher() -> Tensor:
    """Uniform as the student is at first, but out of its reach in state 0."""
    table = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    spread = math.sqrt(2) / 4  # the last two: sum 3/4, geometric mean 1/8
    table[1] = torch.tensor([1 / 4, 3 / 8 + spread, 3 / 8 - spread], dtype=torch.float64)
    return table.log()


def gradient(logits: Tensor, compare: Comparison, *, has_future: bool) -> Tensor:
    leaf = logits.clone().requires_grad_()
    tables = two_step_student(leaf)
    loss = expected_loss(tables, two_step_teacher(), compare, has_future=has_future)
    return torch.autograd.grad(loss, leaf)[0]


def converged_reward(compare: Comparison, *, has_future: bool) -> float:
    logits = torch.zeros(2, dtype=torch.float64)
    for _ in range(120):
        logits -= 4 * gradient(logits, compare, has_future=has_future)
    assert gradient(logits, compare, has_future=has_future).norm() < 1e-8
    return two_step_student(logits)[0, 1].exp().item()


def test_the_local_gradient_of_reverse_kl_does_not_see_a_bad_second_step():
    at_first = gradient(torch.zeros(2).double(), reverse_kl, has_future=False)
    assert at_first[0].item() == pytest.approx(0, abs=1e-12)
    assert converged_reward(reverse_kl, has_future=False) == pytest.approx(1 / 3, abs=1e-12)


def test_its_full_gradient_leaves_the_action_that_leads_there():
    tables = two_step_student(torch.zeros(2, dtype=torch.float64))
    ahead = reverse_kl(tables, two_step_teacher())
    assert ahead.tolist() == pytest.approx([0, 0.749780, 0, 0], abs=5e-7)
    at_first = gradient(torch.zeros(2).double(), reverse_kl, has_future=True)
    assert at_first[0].item() == pytest.approx(0.166618, abs=5e-7)
    assert at_first[0].item() == pytest.approx(2 / 9 * ahead[1].item(), rel=1e-6)
    assert converged_reward(reverse_kl, has_future=True) == pytest.approx(2 / 5, abs=1e-6)


@pytest.mark.parametrize(
    ("compare", "reward"), [(forward_cross_entropy, 0.331499), (forward_kl, 0.373299)]
)
def test_where_two_other_losses_with_their_future_credit_end_on_the_same_mdp(compare, reward):
    assert converged_reward(compare, has_future=True) == pytest.approx(reward, abs=1e-6)


def test_a_natural_step_of_distil_on_tables_is_one_recursion_per_state():
    # pi' is proportional to pi exp(step x (T / pi - C)), C the cross-entropy that the action leads
    # to: however rarely a state is visited, its own table alone says how it moves.
    for seed in range(20):
        tables, teacher = random_table(2, 4, 3, seed=seed)
        logits = tables.log().requires_grad_()
        loss = expected_loss(
            logits.log_softmax(1), teacher.log(), forward_cross_entropy, has_future=True
        )
        (slope,) = torch.autograd.grad(loss, logits)
        scores = torch.autograd.functional.jacobian(response_logprobs, tables.log()).view(9, 12)
        chances = response_logprobs(tables.log()).exp()
        fisher = scores.T @ (chances[:, None] * scores)
        step = -(torch.linalg.pinv(fisher, hermitian=True) @ slope.flatten()).view(4, 3)
        costs = torch.zeros(4, 3, dtype=torch.float64)
        costs[0] = -(teacher[1:] * tables[1:].log()).sum(1)
        expected = teacher / tables - costs
        expected -= expected.mean(1, keepdim=True)
        torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-6)


def response_logprobs(logits: Tensor) -> Tensor:
    """Of the nine responses [9]."""
    return logits.log_softmax(1)[STATES, ACTIONS].view(9, 2).sum(1)


def recursion(tables: Tensor, teacher: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """One natural step of cross-entropy on a bandit: the new policy, and the gains T / pi.

    Taken through the package's loss, its gradient and the Fisher matrix, not through the formula.
    """
    logits = tables.log().requires_grad_()
    loss = forward_cross_entropy(logits.log_softmax(0)[None], teacher.log()[None]).sum()
    (slope,) = torch.autograd.grad(loss, logits)
    return (tables.log() + step * natural_step(slope, tables)).softmax(0), teacher / tables


@pytest.mark.parametrize("seed", range(10))
def test_natural_steps_of_distil_have_a_regret_that_falls_with_their_number(seed: int) -> None:
    """Our own bound, by the potential KL(T, pi); the constants of theorem 2 were not at hand.

    A step's potential changes by -step E_T[g] + log E_pi[exp(step g)], g = T / pi, exactly: so the
    chi-square distances sum to at most KL(T, pi_0) / step plus what the second term adds, and the
    reward behind the teacher, at most its root times the reward's spread, goes to 0 with them.
    """
    teacher, policy, rewards = random_table(3, 5, seed=seed)
    step, start = 0.05, (teacher * (teacher / policy).log()).sum()
    potential, distances, excess = start.clone(), [], 0.0
    for _ in range(200):
        new, gains = recursion(policy, teacher, step)
        chi_square = (teacher * gains).sum() - 1
        growth = (policy * (step * gains).exp()).sum().log()
        behind = (teacher - policy) @ rewards
        assert behind.abs() <= (chi_square * (policy @ rewards.square())).sqrt() + 1e-12
        changed = (teacher * (teacher / new).log()).sum()
        assert changed - potential == pytest.approx(
            (growth - step * (teacher @ gains)).item(), abs=1e-9
        )
        potential, policy = changed, new
        distances.append(chi_square.item())
        excess += (growth / step - 1).item()
        assert sum(distances) <= start / step + excess + 1e-9
    assert distances[-1] < 0.05 * distances[0], "and it does come near"


def test_cross_entropy_to_a_teacher_of_successes_bounds_the_log_chance_of_success_from_below() -> (
    None
):
    """The teacher-weighted likelihood of two-step responses; equal where it is the posterior."""
    for seed in range(20):
        tables, teacher = random_table(2, 4, 3, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        success = torch.rand(9, generator=generator, dtype=torch.float64)
        chances = response_logprobs(tables.log())
        log_success = (chances.exp() * success).sum().log()
        teacher_chances = response_logprobs(teacher.log()).exp()
        # The cross-entropy of whole responses is the sum of its steps', as the loss takes them.
        steps = forward_cross_entropy(tables.log(), teacher.log())
        of_responses = steps[0] + (teacher[0] * steps[1:]).sum()
        assert of_responses == pytest.approx(-(teacher_chances * chances).sum().item(), rel=1e-9)
        posterior = chances.exp() * success / (chances.exp() * success).sum()
        for q in (teacher_chances, posterior):
            bound = (q * (chances + success.log() - q.log())).sum()
            assert bound <= log_success + 1e-12
        assert bound == pytest.approx(log_success.item(), abs=1e-12)
