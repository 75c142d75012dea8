"""From a sampled batch to one that credit can be assigned on: who reads what, in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from megasd.algorithms.base import Algorithm, Needs
from megasd.data.context import PrivilegedContext, student_view
from megasd.loop.experience import Experience
from megasd.losses.config import MismatchConfig
from megasd.losses.mismatch import mismatch_metrics
from megasd.losses.teacher import teacher_metrics
from megasd.types import (
    Credit,
    PerToken,
    Reads,
    ResponseBatch,
    Rollout,
    Scores,
    TeacherScores,
    TokenMask,
    View,
)

if TYPE_CHECKING:
    from megasd.policy.policy import Policy
    from megasd.policy.update import UpdateResult


class Reader:
    """Has a batch read by student and teachers: the passes that can change the update, no other.

    `memory` is what the algorithm remembers from step to step; checkpoints keep it.
    """

    def __init__(
        self,
        policy: "Policy",
        algorithm: Algorithm,
        privileged: PrivilegedContext | None,  # None: no role reads one
        *,
        minibatches: int,
        mismatch: MismatchConfig,
        seed: int,
        memory: dict[str, torch.Tensor],
    ) -> None:
        self.policy = policy
        self.algorithm = algorithm
        self.privileged = privileged
        self.minibatches = minibatches
        self.mismatch = mismatch
        self.seed = seed
        self.memory = memory

    def read(self, experience: Experience, step: int) -> tuple[ResponseBatch, dict[str, float]]:
        """The batch with all that the algorithm needs, and what to log of the teachers.

        Where nothing is compared with the policy before the update and there is one mini-batch,
        the update's own forward pass provides the old log-probs.
        """
        needs, metrics = self.algorithm.needs, {}
        batch = replace(experience.batch, memory=dict(self.memory), roles=needs.teachers)
        views: dict[str, list[View | None]] = {}
        if needs.teachers:
            views, metrics = self._teacher_views(experience, batch, step)
        if needs.support or needs.teacher_hidden:
            batch = self._with_owners(experience, batch, views)
        return self._score(experience, batch, views, step), metrics

    def _score(
        self,
        experience: Experience,
        batch: ResponseBatch,
        views: Mapping[str, Sequence[View | None]],
        step: int,
    ) -> ResponseBatch:
        """The passes, in the order in which they need each other.

        A student that chooses the support is read before the teacher; else after it.
        """
        needs, student = self.algorithm.needs, None
        reads_support = needs.support is not None and "teacher" in views
        if reads_support and needs.support == "student":
            student = self._read_student(experience, batch, Reads(top_k=needs.support_size))
            batch = replace(batch, support=student.support)
        owners = _as_numpy(batch.owners)
        scores = self.policy.score_teachers(
            views,
            experience.offsets,
            reads={"teacher": self._teacher_reads(batch, step)},
            owners=owners,
        )
        if "teacher" in scores:
            main = scores["teacher"]
            batch = replace(batch, support=main.support, teacher_hidden=main.hidden)
        if student is None and self._needs_old(has_teacher=bool(views)):
            reads = None
            if needs.cross_entropy and reads_support:
                reads = Reads(support=batch.support, cross_entropy=True)
            student = self._read_student(experience, batch, reads)
        if student is not None:
            batch = replace(batch, old_logprobs=student.logprobs, entropy=student.entropy)
        teachers = {
            role: _teacher_scores(batch, views[role], found, needs if role == "teacher" else None)
            for role, found in scores.items()
        }
        if student is not None and student.cross_entropy is not None:
            main = teachers["teacher"]
            read = main.has_context[batch.rollout_ids]
            cross_entropy = torch.where(read, student.cross_entropy, 0.0)
            teachers["teacher"] = replace(main, cross_entropy=cross_entropy)
        return replace(batch, teachers=teachers)

    def _read_student(
        self, experience: Experience, batch: ResponseBatch, reads: Reads | None
    ) -> Scores:
        views, owners = experience.student_views, _as_numpy(batch.owners)
        return self.policy.score(views, experience.offsets, reads=reads, owners=owners)

    def _teacher_reads(self, batch: ResponseBatch, step: int) -> Reads:
        needs = self.algorithm.needs
        match needs.support:
            case "student":
                return Reads(support=batch.support)
            case "teacher":
                return Reads(top_k=needs.support_size)
            case "samples":
                return Reads(samples=needs.support_size, seed=(self.seed, step))
            case None:
                return Reads(hidden=needs.teacher_hidden)

    def _needs_old(self, *, has_teacher: bool) -> bool:
        needs = self.algorithm.needs
        return (
            self.minibatches > 1
            or needs.entropy
            or (has_teacher and needs.entropy_beside_teacher)
            or (has_teacher and (needs.old_logprobs or needs.cross_entropy))
            or (self.mismatch.level != "off" and self.mismatch.needs_old_logprobs)
        )

    def _teacher_views(
        self, experience: Experience, batch: ResponseBatch, step: int
    ) -> tuple[dict[str, list[View | None]], dict[str, float]]:
        """By role, what is read of each rollout; a role that reads nothing is left out."""
        texts = {
            role: self._texts(role, experience, step) for role in self.algorithm.needs.teachers
        }
        has_context = {
            role: torch.tensor([text is not None for text in column], device=batch.rewards.device)
            for role, column in texts.items()
        }
        wanted = self.algorithm.rows_to_score(batch, has_context, step).tolist()
        before = self._cuts()
        views: dict[str, list[View | None]] = {}
        for role, column in texts.items():
            read = [
                self._view(rollout, text) if is_wanted and text is not None else None
                for rollout, text, is_wanted in zip(
                    experience.rollouts, column, wanted, strict=True
                )
            ]
            if any(view is not None for view in read):
                views[role] = read
        rows = np.array([[view is not None for view in read] for read in views.values()])
        metrics = {
            f"teacher/{name}": float(now - then)
            for name, now, then in zip(
                ("contexts_cut", "contexts_without_room"), self._cuts(), before, strict=True
            )
        }
        # Passes over all that there could be: every rollout, under every role.
        metrics["teacher/rows_scored"] = float(rows.sum() / (len(texts) * len(wanted)))
        if any(wanted):
            main = next(iter(has_context.values())).tolist()
            with_context = [has for has, is_wanted in zip(main, wanted, strict=True) if is_wanted]
            metrics["teacher/has_context"] = float(np.mean(with_context))
        return views, metrics

    def _texts(self, role: str, experience: Experience, step: int) -> list[str | None]:
        """The privileged text of each rollout; "" is the plain prompt, None no context."""
        if role == "reference":
            return [""] * len(experience.rollouts)
        assert self.privileged is not None, "built where a role reads a context"
        return self.privileged.texts(role, experience.rollouts, experience.verdicts, step)

    def _view(self, rollout: Rollout, text: str) -> View | None:
        if text == "":
            return student_view(rollout)
        assert self.privileged is not None
        return self.privileged.view(rollout, text)

    def _cuts(self) -> tuple[int, int]:
        if self.privileged is None:
            return 0, 0
        return self.privileged.num_cut, self.privileged.num_without_room

    def _with_owners(
        self,
        experience: Experience,
        batch: ResponseBatch,
        views: Mapping[str, Sequence[View | None]],
    ) -> ResponseBatch:
        read = views.get("teacher", experience.student_views)
        lengths = [
            max(student.num_tokens, 0 if teacher is None else teacher.num_tokens)
            for student, teacher in zip(experience.student_views, read, strict=True)
        ]
        owners = self.policy.assign_owners(lengths, batch.minibatch_ids.tolist())
        return replace(batch, owners=torch.from_numpy(owners).to(batch.rewards.device))

    def remember(self, credit: Credit) -> dict[str, float]:
        """Keeps what the algorithm will want at the next step; what to log of its credit."""
        self.memory.clear()
        self.memory.update(credit.memory)
        return {f"credit/{name}": value for name, value in credit.metrics.items()}


def _teacher_scores(
    batch: ResponseBatch, views: Sequence[View | None], found: Scores, needs: Needs | None
) -> TeacherScores:
    has_context = torch.tensor([view is not None for view in views], device=batch.rewards.device)
    logprobs = found.logprobs
    if batch.old_logprobs is not None:
        logprobs = torch.where(has_context[batch.rollout_ids], logprobs, batch.old_logprobs)
    wants_entropy = needs is not None and needs.teacher_entropy
    return TeacherScores(
        has_context=has_context,
        logprobs=logprobs,
        entropy=found.entropy if wants_entropy else None,
    )


def _as_numpy(owners: torch.Tensor | None) -> np.ndarray | None:
    return None if owners is None else owners.cpu().numpy()


def step_metrics(
    experience: Experience, batch: ResponseBatch, updates: "Sequence[UpdateResult]"
) -> dict[str, float]:
    """What a step measured: sampling, its optimizer steps' means, teachers, train/rollout mismatch.

    A name means one population. What a scoring pass read is of all response tokens of the batch;
    where the old policy was read by the update's own forward alone, of the tokens that the update
    learns from, and stands under update/ like everything that is of those.
    """
    metrics = dict(experience.metrics)
    for name in {name: None for update in updates for name in update.metrics}:
        known = [update.metrics[name] for update in updates if name in update.metrics]
        metrics[f"update/{name}"] = float(np.mean(known))
    metrics["update/skipped"] = float(sum(u.outcome == "skipped" for u in updates))
    metrics["update/empty_minibatches"] = float(sum(u.outcome == "empty" for u in updates))
    if batch.old_logprobs is not None:
        assert batch.entropy is not None, "read in the same pass"
        metrics["policy/entropy"] = float(batch.entropy[batch.response_mask].double().mean())
        return metrics | _distances(batch, batch.old_logprobs, batch.response_mask)
    first = updates[0]
    if first.logprobs is None or first.read is None:  # nothing to learn
        return metrics
    found = _distances(batch, first.logprobs, first.read)
    return metrics | {f"update/{name}": value for name, value in found.items()}


def _distances(batch: ResponseBatch, old: PerToken, read: TokenMask) -> dict[str, float]:
    """Of teachers and of the engine from the old policy, over the tokens that are `read`."""
    metrics = {}
    for role, teacher in batch.teachers.items():
        is_scored = read & teacher.has_context[batch.rollout_ids]
        measured = teacher_metrics(teacher.logprobs - old, is_scored)
        prefix = "teacher/" if role == "teacher" else f"teacher/{role}/"
        metrics |= {f"{prefix}{name}": value for name, value in measured.items()}
    if batch.rollout_logprobs is not None:
        mismatch = mismatch_metrics(old, batch.rollout_logprobs, read)
        metrics |= {f"mismatch/{name}": value for name, value in mismatch.items()}
    return metrics
