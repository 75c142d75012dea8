"""What ranks run to train every method: real passes over real views, hand-made rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from megasd.types import Prompt, ResponseBatch, Rollout, Verdict, View
from tests.distributed.policy_cases import make_policy

GROUPS, GROUP_SIZE, STEPS, VOCABULARY = 4, 3, 3, 121


def rollouts_of(step: int) -> tuple[list[Rollout], list[Verdict]]:
    """Group 0 all right, group 2 all wrong, the others mixed; lengths from a single token up."""
    draw = np.random.default_rng(step)
    rollouts, verdicts = [], []
    for group in range(GROUPS):
        prompt = Prompt(
            index=group, messages=(), token_ids=draw.integers(1, VOCABULARY, draw.integers(1, 9))
        )
        for sample in range(GROUP_SIZE):
            length = 1 if (group, sample) == (1, 0) else int(draw.integers(2, 20))
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    group_id=group,
                    sample=sample,
                    token_ids=draw.integers(1, VOCABULARY, length),
                    logprobs=-4.0 - draw.random(length, dtype=np.float32),
                    text="",
                    finish_reason="stop",
                    policy_version=step,
                )
            )
            reward = {0: 1.0, 2: 0.0}.get(group, float(sample == 1))
            verdicts.append(Verdict(reward=reward))
    return rollouts, verdicts


class PrefixContext:
    """Privileged contexts without a tokenizer: a few tokens in front of the prompt.

    Rollouts whose number is 1 modulo 4 are without context, whatever the role.
    """

    num_cut = 0
    num_without_room = 0

    def __init__(self, *, is_empty: bool = False) -> None:
        self.is_empty = is_empty

    def texts(
        self, role: str, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], step: int
    ) -> list[str | None]:
        without = [self.is_empty or i % 4 == 1 for i in range(len(rollouts))]
        return [None if w else f"{role} {i}" for i, w in enumerate(without)]

    def view(self, rollout: Rollout, text: str) -> View | None:
        if text == "":
            return View(prompt_ids=rollout.prompt.token_ids, response_ids=rollout.token_ids)
        prefix = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        prompt = np.concatenate([prefix % (VOCABULARY - 1) + 1, rollout.prompt.token_ids])
        return View(prompt_ids=prompt, response_ids=rollout.token_ids)


def experience_of(step: int, device: torch.device) -> Any:
    from megasd.loop.experience import Experience

    rollouts, verdicts = rollouts_of(step)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    rewards = torch.tensor([verdict.reward for verdict in verdicts])
    groups = torch.tensor([rollout.group_id for rollout in rollouts])
    rollout_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    batch = ResponseBatch(
        rewards=rewards.to(device),
        is_correct=(rewards >= 1.0).to(device),
        group_ids=groups.to(device),
        minibatch_ids=(groups // 2).to(device),
        rollout_ids=rollout_ids.to(device),
        response_mask=torch.ones(sum(lengths), dtype=torch.bool, device=device),
        max_response_tokens=24,
        rollout_logprobs=torch.from_numpy(
            np.concatenate([cast(Any, rollout.logprobs) for rollout in rollouts])
        ).to(device),
    )
    return Experience(
        rollouts=rollouts,
        verdicts=verdicts,
        batch=batch,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        student_views=[
            View(prompt_ids=r.prompt.token_ids, response_ids=r.token_ids) for r in rollouts
        ],
        metrics={},
    )


def train_methods(
    folder: Path,
    settings: Mapping[str, Any],
    methods: Mapping[str, Any],
    *,
    without_context: bool = False,
) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of every optimizer step, for each method from the same weights.

    `methods`: name to (algorithm, teacher section). Two mini-batches a step, but one in step 1,
    where the update's own forward may be the old policy.
    """
    policy = make_policy(folder, {**settings, "roles": ("reference",)})
    initial = {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}
    context = PrefixContext(is_empty=without_context)
    seen = {}
    for name, (algorithm, teacher) in methods.items():
        _start_anew(policy, initial, teacher)
        seen[name] = _train(policy, algorithm, context)
    return seen


@torch.no_grad()
def _start_anew(policy: Any, initial: Mapping[str, torch.Tensor], teacher: Any) -> None:
    """As if the policy had just been built: that takes seconds, for its process groups."""
    from megasd.policy.config import TeacherConfig
    from megasd.policy.teacher import TeacherWeights

    for name, parameter in policy.parameters.items():
        parameter.copy_(initial[name])
    policy.state.optimizer.reload_model_params()
    for part in policy.state.optimizer.chained_optimizers:
        for values in part.optimizer.state.values():
            for value in values.values():
                value.zero_()
    policy.teacher = TeacherWeights(TeacherConfig(**teacher), policy.buckets)


def _train(policy: Any, algorithm: Any, context: PrefixContext) -> list[tuple[float, float]]:
    from megasd.loop.reading import Reader

    reader = Reader(
        policy,
        algorithm,
        cast(Any, context),
        minibatches=2,
        mismatch=policy.mismatch,
        seed=0,
        memory={},
    )
    seen = []
    for step in range(STEPS):
        experience = experience_of(step, policy.backend.device)
        minibatches = 1 if step == 1 else 2
        if minibatches == 1:
            together = torch.zeros_like(experience.batch.minibatch_ids)
            batch = replace(experience.batch, minibatch_ids=together)
            experience = replace(experience, batch=batch)
        reader.minibatches = minibatches
        batch, _ = reader.read(experience, step)
        credit = algorithm.assign_credit(batch, step)
        reader.remember(credit)
        for minibatch in range(minibatches):
            done = policy.update(
                experience.student_views,
                experience.offsets,
                batch,
                credit,
                algorithm,
                minibatch=minibatch,
            )
            # Neither is there where nothing had a weight: nothing was run.
            seen.append(tuple(done.metrics.get(name, 0.0) for name in ("loss", "grad_norm")))
        policy.teacher.after_batch(step, updated=True)
    return seen


def train_without_context(
    folder: Path, methods: Mapping[str, Any]
) -> dict[str, list[tuple[float, float]]]:
    return train_methods(folder, {}, methods, without_context=True)
