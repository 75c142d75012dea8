"""Stops a run that skips one optimizer step after the other, and leaves behind what shows why."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.loop.experience import Experience
from megasd.process import together
from megasd.types import Credit, ResponseBatch, TokenIndex

if TYPE_CHECKING:
    from megasd.policy.update import UpdateOutcome, UpdateResult

SHOWN_ROLLOUTS = 3  # that the sentence names; summary.json has all


class NotFinite(NamedTuple):
    """What of a tensor is infinite or no number."""

    not_finite: int
    of: int
    rollouts: list[int]  # that such values belong to; [] where a value belongs to none


class OnRank(NamedTuple):
    """What only this rank can see of a step."""

    tensors: dict[str, NotFinite]  # of the batch, where the rank holds but its own tokens
    gradients: list[Mapping[str, int]]  # by update: `UpdateResult.bad_gradients`


class Diagnostics:
    """Counts skipped optimizer steps over the steps of this process. Every rank calls it."""

    def __init__(self, run_folder: Path, *, config: str, max_skipped_in_a_row: int) -> None:
        self._run_folder = run_folder
        self._config = config
        self._limit = max_skipped_in_a_row
        self._in_a_row = 0

    def stop_if_stuck(
        self,
        step: int,
        experience: Experience,
        batch: ResponseBatch,
        credit: Credit,
        updates: "Sequence[UpdateResult]",
    ) -> None:
        """Called once per step, after its `updates`: those behind the limit's in it have run too.

        Raises ValueError with one sentence on every rank, once rank 0 has written
        RUN/diagnostics/step_NNNNNN (docs/records.md says what is in it), or has failed to.
        """
        counts = running_counts(self._in_a_row, [update.outcome for update in updates])
        self._in_a_row = counts[-1]
        if not 0 < self._limit <= max(counts):
            return
        here = OnRank(held_here(batch), [update.bad_gradients for update in updates])
        everywhere = together.from_every_rank(here)
        # The first rank to end takes the others with it: all wait until the bundle is on the disk.
        sentence = ""
        if dist.get_rank() == 0:
            sentence = self._leave_bundle(step, experience, batch, credit, updates, everywhere)
        raise ValueError(together.from_first_rank(sentence))

    def _leave_bundle(
        self,
        step: int,
        experience: Experience,
        batch: ResponseBatch,
        credit: Credit,
        updates: "Sequence[UpdateResult]",
        ranks: Sequence[OnRank],
    ) -> str:
        """Writes it; what to raise."""
        tensors = tensors_by_name(batch, credit, updates)
        found = {name: count_not_finite(value, batch) for name, value in tensors.items()}
        found = _merged(ranks) | {name: one for name, one in found.items() if one.not_finite}
        gradients = [rank.gradients for rank in ranks]
        causes = what_is_not_finite(found, updates, gradients)
        summary = {
            "step": step,
            "skipped_in_a_row": self._limit,
            "not_finite": causes,
            "updates": [{"outcome": u.outcome, **_plain(u.metrics)} for u in updates],
            "tensors": {name: one._asdict() for name, one in found.items()},
            "gradients": gradients,
        }
        folder = self._run_folder / "diagnostics" / f"step_{step:06d}"
        bundle = f"{folder} holds the batch, its scores and summary.json, which to read first"
        try:
            _write(folder, self._config, experience, tensors, summary)
        except Exception as error:  # torch.save has its own; nothing may keep the run from stopping
            bundle = f"{folder} could not be written: {type(error).__name__}: {error}"
        return (
            f"step {step}: {self._limit} optimizer steps in a row were skipped "
            f"(optimizer.max_skipped_in_a_row). Not finite: {'; '.join(causes)}. {bundle}. Mend "
            f"the cause and continue with `megasd train --resume {self._run_folder}`; or, with a "
            f"lower optimizer.lr, start a new run from what `megasd export {self._run_folder} "
            "--to FOLDER` writes"
        )


def running_counts(before: int, outcomes: "Sequence[UpdateOutcome]") -> list[int]:
    """After each update, how many in a row were skipped; `before` the first: so many.

    One that had nothing to learn says nothing of it.
    """

    def count(so_far: int, outcome: "UpdateOutcome") -> int:
        return {"skipped": so_far + 1, "stepped": 0, "empty": so_far}[outcome]

    return list(accumulate(outcomes, count, initial=before))[1:]


def tensors_by_name(
    batch: ResponseBatch, credit: Credit, updates: "Sequence[UpdateResult]"
) -> dict[str, Tensor]:
    """What all ranks hold alike of a step, in the order in which it came to be."""
    values: dict[str, Tensor | None] = {
        f"batch.{name}": getattr(batch, name)
        for name in (
            *("rewards", "is_correct", "group_ids", "minibatch_ids", "rollout_ids"),
            *("response_mask", "rollout_logprobs", "old_logprobs", "entropy", "owners"),
        )
    }
    values |= {f"batch.memory.{name}": value for name, value in batch.memory.items()}
    for role, teacher in batch.teachers.items():
        for name in ("has_context", "logprobs", "entropy", "cross_entropy"):
            values[f"teachers.{role}.{name}"] = getattr(teacher, name)
    for name in ("advantages", "token_weights", "path"):
        values[f"credit.{name}"] = getattr(credit, name)
    values |= {f"credit.memory.{name}": value for name, value in credit.memory.items()}
    for number, update in enumerate(updates):
        for name in ("logprobs", "entropy", "read"):
            values[f"updates.{number}.{name}"] = getattr(update, name)
    return {name: value for name, value in values.items() if value is not None}


def held_here(batch: ResponseBatch) -> dict[str, NotFinite]:
    """What is not finite of the values that a rank holds of its own tokens only."""
    found = {}
    if (support := batch.support) is not None and support.teacher_logprobs is not None:
        found["support.teacher_logprobs"] = count_not_finite(
            support.teacher_logprobs, batch, index=support.index
        )
    if (teacher := batch.teacher_hidden) is not None:
        found["teacher_hidden"] = count_not_finite(teacher.hidden, batch, index=teacher.index)
    return {name: one for name, one in found.items() if one.not_finite}


def count_not_finite(
    values: Tensor, batch: ResponseBatch, index: TokenIndex | None = None
) -> NotFinite:
    """Of values per token [N, ...] (or rows [n, ...] and `index` [N]), per rollout [R], or neither.

    Where N = R every rollout has one token, so that both readings are the same.
    """
    if values.ndim > 1:  # rows may take most of a GPU: a part of them after the other
        parts = values.flatten(1).split(max(1, 2**24 // max(1, values[0].numel())))
        counts = torch.cat([(~part.isfinite()).sum(dim=1) for part in parts])
        is_bad, count = counts > 0, int(counts.sum())
    else:
        is_bad = ~values.isfinite()
        count = int(is_bad.sum())
    rollouts = []
    if count and is_bad.ndim:
        rows = is_bad if index is None else is_bad[index]
        if len(rows) == len(batch.rollout_ids):
            rollouts = batch.rollout_ids[rows].unique().tolist()
        elif len(rows) == batch.num_rollouts:
            rollouts = rows.nonzero()[:, 0].tolist()
    return NotFinite(count, values.numel(), rollouts)


def what_is_not_finite(
    tensors: Mapping[str, NotFinite],
    updates: "Sequence[UpdateResult]",
    gradients: Sequence[Sequence[Mapping[str, int]]],
) -> list[str]:
    """In words, causes before effects; `gradients` by rank and update. Of the last update skipped.

    Of the ranks the one is named whose gradients are worst: of data-parallel ranks the one that
    made them so, since the others have but their shards of the sum.
    """
    last = max(number for number, update in enumerate(updates) if update.skipped)
    metrics = updates[last].metrics
    causes = [f"{name}{_of_rollouts(one.rollouts)}" for name, one in tensors.items()]
    if not math.isfinite(metrics["loss"]):
        causes.append(f"the loss ({metrics['loss']})")
    bad = [(sum(found[last].values()), rank) for rank, found in enumerate(gradients) if found[last]]
    if bad:
        _, worst = max(bad)
        names = list(gradients[worst][last])
        others = f", and on {len(bad) - 1} more ranks" if len(bad) > 1 else ""
        # Backward passes on what it has got: it came into the last one first.
        causes.append(
            f"gradients of {len(names)} parameters on rank {worst}, the last {names[-1]}{others}"
        )
    elif not math.isfinite(metrics["grad_norm"]):
        causes.append("the norm of the gradients, each of them finite but too large to be squared")
    return causes


def _of_rollouts(rollouts: Sequence[int]) -> str:
    if not rollouts:
        return ""
    shown = ", ".join(map(str, rollouts[:SHOWN_ROLLOUTS]))
    rest = len(rollouts) - SHOWN_ROLLOUTS
    return f" of rollout {shown}" + (f" and {rest} more" if rest > 0 else "")


def _merged(ranks: Sequence[OnRank]) -> dict[str, NotFinite]:
    """By tensor, over the ranks, which hold different rows or columns."""
    merged: dict[str, NotFinite] = {}
    for rank in ranks:
        for name, one in rank.tensors.items():
            other = merged.get(name, NotFinite(0, 0, []))
            rollouts = sorted({*other.rollouts, *one.rollouts})
            merged[name] = NotFinite(other.not_finite + one.not_finite, other.of + one.of, rollouts)
    return merged


def _plain(values: Mapping[str, float]) -> dict[str, float | str]:
    """For JSON, which knows no infinities."""
    return {name: v if math.isfinite(v) else str(v) for name, v in values.items()}


def _rollout_rows(experience: Experience) -> Iterator[dict[str, Any]]:
    pairs = zip(experience.rollouts, experience.verdicts, strict=True)
    for number, (rollout, verdict) in enumerate(pairs):
        yield {
            "rollout": number,
            "group": rollout.group_id,
            "sample": rollout.sample,
            "where": rollout.prompt.where,
            "messages": [dict(message) for message in rollout.prompt.messages],
            "answer": rollout.prompt.answer,
            "text": rollout.text,
            "token_ids": rollout.token_ids.tolist(),
            "finish_reason": rollout.finish_reason,
            "policy_version": rollout.policy_version,
            **_plain({"reward": verdict.reward}),
            "error": verdict.error,
            "feedback": verdict.feedback,
        }


def _write(
    folder: Path,
    config: str,
    experience: Experience,
    tensors: Mapping[str, Tensor],
    summary: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    rows = [json.dumps(row, allow_nan=False) + "\n" for row in _rollout_rows(experience)]
    (folder / "rollouts.jsonl").write_text("".join(rows), encoding="utf-8")
    torch.save({name: value.cpu() for name, value in tensors.items()}, folder / "batch.pt")
    text = json.dumps(summary, indent=2, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
