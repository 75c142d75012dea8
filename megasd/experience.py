"""From prompts to a batch that can be scored: sampling, rewards, dynamic sampling, views."""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from megasd.algorithms.base import Algorithm
from megasd.data.context import PrivilegedContext, student_view
from megasd.data.prompts import Prompts
from megasd.losses.mismatch import mismatch_metrics
from megasd.losses.teacher import teacher_metrics
from megasd.metrics.phases import Phases
from megasd.rewards.config import RewardConfig
from megasd.rewards.scorer import Scorer
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import Request, RolloutEngine
from megasd.rollout.spread import Spread
from megasd.types import Prompt, ResponseBatch, Rollout, TeacherScores, Verdict, View

if TYPE_CHECKING:
    from megasd.policy.policy import Policy
    from megasd.policy.update import UpdateResult


def request_seed(seed: int, step: int, refills: int, prompt: int, sample: int) -> int:
    """A stream of its own for each rollout: the same whatever else is sampled beside it."""
    words = np.random.SeedSequence([seed, step, refills, prompt, sample]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The rollouts of one step that take part, in response space. The same on every rank."""

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    batch: ResponseBatch
    offsets: np.ndarray  # [R + 1] start of each rollout in response space
    student_views: list[View]
    metrics: dict[str, float]


class Collector:
    """Samples a step's rollouts and has them judged."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        engine: RolloutEngine | None,  # on the ranks that sample
        scorer: Scorer | None,
        spread: Spread,
        algorithm: Algorithm,
        rollout: RolloutConfig,
        reward: RewardConfig,
        minibatches: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.prompts = prompts
        self.engine = engine
        self.scorer = scorer
        self.spread = spread
        self.algorithm = algorithm
        self.rollout = rollout
        self.reward = reward
        self.minibatches = minibatches
        self.device = device
        self.seed = seed

    def collect(self, step: int, phases: Phases) -> Experience:
        """`rollout.prompts_per_step` groups; those that the algorithm drops are made up for."""
        rollouts: list[Rollout] = []
        verdicts: list[Verdict] = []
        seen: list[tuple[Rollout, Verdict]] = []
        missing = self.rollout.prompts_per_step
        for refills in itertools.count():
            with phases("rollout"):
                new = self._sample(self.prompts.next(missing), step, refills)
            with phases("reward"):
                judged = self._judge(new)
            seen += zip(new, judged, strict=True)
            valid = [i for i, verdict in enumerate(judged) if verdict.error is None]
            kept = self._kept(new, judged, valid, refills)
            rollouts += [new[i] for i in kept]
            verdicts += [judged[i] for i in kept]
            missing = len({new[i].group_id for i in valid} - {new[i].group_id for i in kept})
            if not missing:  # groups that ended in verifier errors are not made up for
                break
        if not rollouts:
            raise ValueError(
                f"step {step}: all {len(seen)} rollouts ended in a verifier error, the first: "
                f"{seen[0][1].error}; mend data.verifier, or raise reward.timeout_seconds"
            )
        return self._assemble(rollouts, verdicts, self._sampling_metrics(seen))

    def _sample(self, prompts: Sequence[Prompt], step: int, refills: int) -> list[Rollout]:
        requests = [
            Request(
                prompt=prompt,
                group_id=refills * self.rollout.prompts_per_step + place,
                sample=sample,
                seed=request_seed(self.seed, step, refills, prompt.index, sample),
                temperature=self.rollout.temperature,
                top_p=self.rollout.top_p,
                top_k=self.rollout.top_k,
                max_response_tokens=self.rollout.max_response_tokens,
            )
            for place, prompt in enumerate(prompts)
            for sample in range(self.rollout.group_size)
        ]

        def generate(share: Sequence[Request]) -> list[Rollout]:
            assert self.engine is not None
            return self.engine.generate(list(share))

        return self.spread.map(requests, generate)

    def _judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        if not self.algorithm.needs.rewards:
            return [Verdict() for _ in rollouts]

        def score(share: Sequence[Rollout]) -> list[Verdict]:
            assert self.scorer is not None
            return self.scorer.score(list(share))

        return self.spread.map(rollouts, score)

    def _kept(
        self,
        rollouts: Sequence[Rollout],
        verdicts: Sequence[Verdict],
        valid: Sequence[int],
        refills: int,
    ) -> list[int]:
        """The rollouts with a reward whose groups the algorithm can learn from."""
        rewards = torch.tensor([verdicts[i].reward for i in valid], dtype=torch.float32)
        groups = torch.tensor([rollouts[i].group_id for i in valid], dtype=torch.int64)
        keep = self.algorithm.rows_to_keep(rewards, groups, refills)
        return [i for i, is_kept in zip(valid, keep.tolist(), strict=True) if is_kept]

    def _sampling_metrics(self, seen: Sequence[tuple[Rollout, Verdict]]) -> dict[str, float]:
        """Over everything sampled, dropped groups included; rewards over rollouts that have one."""
        lengths = [len(rollout.token_ids) for rollout, _ in seen]
        metrics = {
            "rollout/sampled": float(len(seen)),
            "rollout/response_length": float(np.mean(lengths)),
            "rollout/truncated": float(np.mean([r.finish_reason == "length" for r, _ in seen])),
            "rollout/tokens": float(sum(lengths)),
        }
        if self.algorithm.needs.rewards:
            rewards = [verdict.reward for _, verdict in seen if verdict.error is None]
            metrics["reward/errors"] = float(len(seen) - len(rewards))
            if rewards:
                correct = np.array(rewards) >= self.reward.success_threshold
                metrics["reward/mean"] = float(np.mean(rewards))
                metrics["reward/accuracy"] = float(np.mean(correct))
        return metrics

    def _assemble(
        self, rollouts: list[Rollout], verdicts: list[Verdict], metrics: dict[str, float]
    ) -> Experience:
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        _, groups = np.unique([rollout.group_id for rollout in rollouts], return_inverse=True)
        device = self.device
        sampled = [rollout.logprobs for rollout in rollouts]
        rollout_logprobs = None
        if all(part is not None for part in sampled):
            rollout_logprobs = torch.from_numpy(np.concatenate(sampled)).to(device)  # pyright: ignore
        batch = ResponseBatch(
            rewards=torch.tensor([verdict.reward for verdict in verdicts], device=device),
            group_ids=torch.from_numpy(groups).to(device),
            # Whole groups, in order, in as equal shares as there are mini-batches.
            minibatch_ids=torch.from_numpy(groups * self.minibatches // (groups.max() + 1)).to(
                device
            ),
            rollout_ids=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device),
            response_mask=torch.ones(int(offsets[-1]), dtype=torch.bool, device=device),
            max_response_tokens=self.rollout.max_response_tokens,
            rollout_logprobs=rollout_logprobs,
        )
        return Experience(
            rollouts=rollouts,
            verdicts=verdicts,
            batch=batch,
            offsets=offsets,
            student_views=[student_view(rollout) for rollout in rollouts],
            metrics=metrics,
        )


class Reader:
    """Has a batch read by student and teacher: the passes that can change the update, no other."""

    def __init__(
        self,
        policy: "Policy",
        algorithm: Algorithm,
        privileged: PrivilegedContext | None,  # None: the algorithm has no teacher
        *,
        minibatches: int,
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.privileged = privileged
        self.minibatches = minibatches
        self._steps_without_gap = 0

    def read(self, experience: Experience, step: int) -> tuple[ResponseBatch, dict[str, float]]:
        """The batch with old and teacher log-probs, and what to log of the teacher.

        With a single mini-batch and nothing to compare, the update's own forward pass provides
        the old log-probs (algorithms.md section 2, "Skipping work").
        """
        batch, needs = experience.batch, self.algorithm.needs
        wanted = self.algorithm.rows_to_score(batch, step).cpu()
        has_teacher = bool(needs.teachers) and bool(wanted.any())
        if has_teacher or needs.entropy or self.minibatches > 1:
            old = self.policy.score(experience.student_views, experience.offsets)
            batch = replace(batch, old_logprobs=old.logprobs, entropy=old.entropy)
        if not needs.teachers:
            return batch, {}
        if not has_teacher:
            return batch, {"teacher/rows_scored": 0.0}
        return self._read_teacher(experience, batch, wanted)

    def _read_teacher(
        self, experience: Experience, batch: ResponseBatch, wanted: torch.Tensor
    ) -> tuple[ResponseBatch, dict[str, float]]:
        old = batch.old_logprobs
        assert old is not None
        assert self.privileged is not None
        (role,) = self.algorithm.needs.teachers
        groups: dict[int, list[tuple[Rollout, Verdict]]] = defaultdict(list)
        for rollout, verdict in zip(experience.rollouts, experience.verdicts, strict=True):
            groups[rollout.group_id].append((rollout, verdict))
        cut_before = self.privileged.num_cut
        without_room_before = self.privileged.num_without_room
        views = [
            self.privileged.view(rollout, groups[rollout.group_id]) if is_wanted else None
            for rollout, is_wanted in zip(experience.rollouts, wanted.tolist(), strict=True)
        ]
        has_context = torch.tensor([view is not None for view in views], device=old.device)
        scores = self.policy.score_teacher(views, experience.offsets)
        is_read = has_context[batch.rollout_ids]
        teacher = TeacherScores(
            has_context=has_context,
            logprobs=torch.where(is_read, scores.logprobs, old),
            entropy=scores.entropy if self.algorithm.needs.teacher_entropy else None,
        )
        measured = teacher_metrics(teacher.logprobs - old, is_read, has_context[wanted])
        self._watch(measured)
        metrics = {f"teacher/{name}": value for name, value in measured.items()}
        metrics["teacher/rows_scored"] = float(has_context.float().mean())
        metrics["teacher/contexts_cut"] = float(self.privileged.num_cut - cut_before)
        metrics["teacher/contexts_without_room"] = float(
            self.privileged.num_without_room - without_room_before
        )
        return replace(batch, teachers={role: teacher}), metrics

    def _watch(self, measured: Mapping[str, float]) -> None:
        """A teacher that always agrees teaches nothing: say so, once, after three such steps."""
        if "gap_max" not in measured:
            return
        self._steps_without_gap = self._steps_without_gap + 1 if measured["gap_max"] < 1e-6 else 0
        if self._steps_without_gap == 3:
            warnings.warn(
                "for 3 steps the teacher gave every token the student's own log-prob: its context "
                "is probably not what it should be; look at context.source and context.template, "
                "and whether data.max_prompt_tokens leaves room for the context",
                stacklevel=2,
            )


def step_metrics(
    experience: Experience, batch: ResponseBatch, updates: "Sequence[UpdateResult]"
) -> dict[str, float]:
    """What a step measured: sampling, its optimizer steps' means, train/rollout mismatch."""
    first = updates[0]
    if batch.old_logprobs is None:
        old, entropy, read = first.logprobs, first.entropy, first.read
    else:
        old, entropy, read = batch.old_logprobs, batch.entropy, batch.response_mask
    assert entropy is not None
    metrics = dict(experience.metrics)
    for name in first.metrics:
        metrics[f"update/{name}"] = float(np.mean([update.metrics[name] for update in updates]))
    metrics["update/skipped"] = float(sum(update.skipped for update in updates))
    if read.any():
        metrics["policy/entropy"] = float(entropy[read].double().mean())
    if batch.rollout_logprobs is not None:
        mismatch = mismatch_metrics(old, batch.rollout_logprobs, read)
        metrics |= {f"mismatch/{name}": value for name, value in mismatch.items()}
    return metrics
