"""From prompts to a batch that can be scored: sampling, rewards, dynamic sampling."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megasd.algorithms.base import Algorithm
from megasd.data.context import student_view
from megasd.data.prompts import Prompts
from megasd.metrics.phases import Phases
from megasd.process.errors import TryAgainError
from megasd.rewards.config import RewardConfig
from megasd.rewards.scorer import Scorer
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import Request
from megasd.rollout.fleet import Fleet
from megasd.rollout.spread import Spread
from megasd.types import Prompt, ResponseBatch, Rollout, Verdict, View


def request_seed(
    seed: int, step: int, refills: int, prompt: int, sample: int, repeat: int = 0
) -> int:
    """A stream of its own for each rollout: the same whatever else is sampled beside it.

    `repeat`: how often the row came before in the same batch, at the turn of an epoch for example.
    """
    words = [seed, step, refills, prompt, sample, *([repeat] if repeat else [])]
    words = np.random.SeedSequence(words).generate_state(2)
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


def _repeats(rows: Sequence[int]) -> list[int]:
    """How often each has come before."""
    seen: Counter[int] = Counter()
    repeats = []
    for row in rows:
        repeats.append(seen[row])
        seen[row] += 1
    return repeats


def _equal_groups(seen: Sequence[tuple[Rollout, Verdict]]) -> float:
    """The share of groups in which all that have a reward have the same."""
    rewards: dict[int, set[float]] = {}
    for rollout, verdict in seen:
        if verdict.error is None:
            rewards.setdefault(rollout.group_id, set()).add(verdict.reward)
    return float(np.mean([len(different) == 1 for different in rewards.values()]))


class Collector:
    """Samples a step's rollouts and has them judged."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        engines: Fleet,
        scorer: Scorer | None,  # on the ranks that judge
        spread: Spread,  # over those
        algorithm: Algorithm,
        needs_rewards: bool,  # of the algorithm, or of what its teacher reads
        rollout: RolloutConfig,
        reward: RewardConfig,
        minibatches: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.prompts = prompts
        self.engines = engines
        self.scorer = scorer
        self.spread = spread
        self.algorithm = algorithm
        self.needs_rewards = needs_rewards
        self.rollout = rollout
        self.reward = reward
        self.minibatches = minibatches
        self.device = device
        self.seed = seed
        self._has_judged = False

    def collect(self, step: int, phases: Phases) -> Experience:
        """`rollout.prompts_per_step` groups; those that the algorithm drops are made up for.

        By the next prompts of the stream that give groups to keep, in its order; the prompts of
        groups beyond what was missing are used up as well.
        """
        rollouts: list[Rollout] = []
        verdicts: list[Verdict] = []
        seen: list[tuple[Rollout, Verdict]] = []
        missing, num_valid, num_kept = self.rollout.prompts_per_step, 0, 0
        for refills in itertools.count():
            with phases("rollout"):
                count = self._enough(missing, num_kept, num_valid)
                new = self._sample(self.prompts.next(count), step, refills)
            with phases("reward"):
                judged = self._judge(new)
            seen += zip(new, judged, strict=True)
            valid = [i for i, verdict in enumerate(judged) if verdict.error is None]
            kept = self._kept(new, judged, valid, refills)
            taken = self._taken(new, judged, valid, kept, missing)
            rollouts += [new[i] for i in kept if new[i].group_id in taken]
            verdicts += [judged[i] for i in kept if new[i].group_id in taken]
            groups = len({new[i].group_id for i in valid})
            num_valid, num_kept = (
                num_valid + groups,
                num_kept + len({new[i].group_id for i in kept}),
            )
            missing = min(missing, groups) - len(taken)
            if not missing:  # groups that ended in verifier errors are not made up for
                break
        if not rollouts:
            # A verifier that worked before may work again: what it calls may be away.
            raise (TryAgainError if self._has_judged else ValueError)(
                f"step {step}: all {len(seen)} rollouts ended in a verifier error, the first: "
                f"{seen[0][1].error}; mend data.verifier, or raise reward.timeout_seconds"
            )
        self._has_judged = True
        return self._assemble(rollouts, verdicts, self._sampling_metrics(seen))

    def _enough(self, missing: int, kept: int, valid: int) -> int:
        """Prompts to sample for so many missing groups, when `kept` of `valid` could be used.

        A round takes as long as its longest response, however few it has: so a standard deviation
        more than would do on average, but never more than a first round.
        """
        most = self.rollout.prompts_per_step
        if missing == most or not kept:
            return most
        return min(most, math.ceil((missing + math.sqrt(missing)) * valid / kept))

    def _taken(
        self,
        rollouts: Sequence[Rollout],
        verdicts: Sequence[Verdict],
        valid: Sequence[int],
        kept: Sequence[int],
        missing: int,
    ) -> set[int]:
        """The first `missing` of the groups that were kept, by id.

        When the algorithm has given up being choosy, those that it would have chosen come first.
        """
        groups = list(dict.fromkeys(rollouts[i].group_id for i in kept))
        if len(groups) > missing:
            chosen = {rollouts[i].group_id for i in self._kept(rollouts, verdicts, valid, 0)}
            groups.sort(key=lambda group: group not in chosen)  # stable
        return set(groups[:missing])

    def _sample(self, prompts: Sequence[Prompt], step: int, refills: int) -> list[Rollout]:
        repeats = _repeats([prompt.index for prompt in prompts])
        requests = [
            Request(
                prompt=prompt,
                group_id=refills * self.rollout.prompts_per_step + place,
                sample=sample,
                seed=request_seed(self.seed, step, refills, prompt.index, sample, repeats[place]),
                temperature=self.rollout.temperature,
                top_p=self.rollout.top_p,
                top_k=self.rollout.top_k,
                min_p=self.rollout.min_p,
                stop=tuple(self.rollout.stop),
                max_response_tokens=self.rollout.max_response_tokens,
            )
            for place, prompt in enumerate(prompts)
            for sample in range(self.rollout.group_size)
        ]
        return self.engines.generate(requests)

    def _judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        if not self.needs_rewards:
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
        if self.needs_rewards:
            rewards = [verdict.reward for _, verdict in seen if verdict.error is None]
            metrics["reward/errors"] = float(len(seen) - len(rewards))
            if rewards:
                correct = [
                    v.is_right(self.reward.success_threshold) for _, v in seen if not v.error
                ]
                metrics["reward/mean"] = float(np.mean(rewards))
                metrics["reward/accuracy"] = float(np.mean(correct))
                if self.rollout.group_size > 1:
                    metrics["reward/equal_groups"] = _equal_groups(seen)
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
        rewards = torch.tensor([verdict.reward for verdict in verdicts], device=device)
        batch = ResponseBatch(
            rewards=rewards,
            is_correct=torch.tensor(
                [verdict.is_right(self.reward.success_threshold) for verdict in verdicts],
                device=device,
            ),
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
