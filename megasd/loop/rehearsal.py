"""A method is run on a handful of tokens before a run: does it read only what it says it needs?

What `needs` does not name is not there in the rehearsal. In a run some of it would be: a teacher
that nobody asked for agrees with the student in every token, and a method that looks at it trains,
as another method, without a word.
"""

import math
from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from megasd.algorithms.base import Algorithm, Needs
from megasd.types import (
    Credit,
    DivergenceKind,
    ResponseBatch,
    StudentOutput,
    Support,
    TeacherHidden,
    TeacherScores,
    TokenLoss,
)

_VOCABULARY = 8
# Two groups of three rollouts of two tokens: right and wrong ones, with context and without.
_REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
_GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
_ROLLOUTS = torch.arange(6).repeat_interleave(2)
_LOGPROB = -math.log(_VOCABULARY)


class _Student(StudentOutput):
    def __init__(self, batch: ResponseBatch) -> None:
        self._batch = batch
        self._logprobs = torch.full((len(_ROLLOUTS),), _LOGPROB, requires_grad=True)

    @property
    def vocab_size(self) -> int:
        return _VOCABULARY

    @property
    def logprobs(self) -> Tensor:
        return self._logprobs

    @property
    def entropy(self) -> Tensor:
        return -self._logprobs

    @property
    def support_logprobs(self) -> Tensor:
        assert self._batch.support is not None, "`needs.support` names no support"
        return self._logprobs[:, None].expand_as(self._batch.support.ids)

    def full_divergence(
        self, kind: DivergenceKind, *, alpha: float, entry_clip: float | None
    ) -> Tensor:
        assert self._batch.teacher_hidden is not None, "`needs.teacher_hidden` is False"
        return self._logprobs * 0


def rehearse(algorithm: Algorithm) -> None:
    """Raises ValueError, in words for whoever wrote the method, where it cannot be run as it is."""
    name = type(algorithm).__name__
    try:
        needs = algorithm.needs
        for step, reads in product((0, 1), (True, False)):
            batch = _batch(needs, reads=reads)
            contexts = {role: batch.has_context(role) for role in needs.teachers}
            algorithm.rows_to_keep(_REWARDS, _GROUPS, refills=0)
            algorithm.rows_to_score(batch, contexts, step)
            credit = algorithm.assign_credit(batch, step)
            _check_credit(name, credit)
            if reads:
                _check_loss(name, algorithm.token_loss(_Student(batch), batch, credit))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"algorithm: {name} cannot be run on a batch that has what its `needs` name, and no "
            f"more: {type(error).__name__}: {error}; name in Needs(...) all that it reads"
        ) from error


def _batch(needs: Needs, *, reads: bool) -> ResponseBatch:
    num_tokens, roles = len(_ROLLOUTS), needs.teachers if reads else ()
    old_logprobs = torch.full((num_tokens,), _LOGPROB)
    entropy = -old_logprobs
    support = hidden = None
    if reads and needs.support is not None:
        ids = torch.arange(min(needs.support_size, _VOCABULARY)).expand(num_tokens, -1)
        known = needs.support != "samples"
        logprobs = torch.full(ids.shape, _LOGPROB)
        support = Support(ids=ids, teacher_logprobs=logprobs if known else None)
    if reads and needs.teacher_hidden:
        hidden = TeacherHidden(
            hidden=torch.zeros(num_tokens, 1), weight=torch.zeros(_VOCABULARY, 1)
        )
    has_entropy = needs.entropy or (needs.entropy_beside_teacher and bool(roles))
    return ResponseBatch(
        rewards=_REWARDS,
        is_correct=_REWARDS == 1,
        group_ids=_GROUPS,
        minibatch_ids=torch.zeros_like(_GROUPS),
        rollout_ids=_ROLLOUTS,
        response_mask=torch.ones(num_tokens, dtype=torch.bool),
        max_response_tokens=2,
        rollout_logprobs=None if needs.solutions else old_logprobs,
        old_logprobs=old_logprobs,
        entropy=entropy if has_entropy else None,
        teachers=_teachers(roles, needs, old_logprobs),
        roles=needs.teachers,
        support=support,
        teacher_hidden=hidden,
    )


def _teachers(
    roles: tuple[str, ...], needs: Needs, old_logprobs: Tensor
) -> Mapping[str, TeacherScores]:
    has_context = torch.tensor([True, True, False, True, True, False])
    read = has_context[_ROLLOUTS]
    return {
        role: TeacherScores(
            has_context=has_context,
            logprobs=torch.where(read, old_logprobs + 0.5, old_logprobs),
            entropy=torch.where(read, 1.0, 0.0)
            if needs.teacher_entropy and role == "teacher"
            else None,
            cross_entropy=torch.where(read, 1.0, 0.0)
            if needs.cross_entropy and role == "teacher"
            else None,
        )
        for role in roles
    }


def _check_credit(name: str, credit: object) -> None:
    if not isinstance(credit, Credit):
        raise ValueError(
            f"algorithm: {name}.assign_credit returns a {type(credit).__name__}; it must return "
            "Credit(advantages, token_weights, path), see megasd/types.py"
        )
    for field in ("advantages", "token_weights", "path"):
        _check_per_token(f"{name}.assign_credit: Credit.{field}", getattr(credit, field))


def _check_loss(name: str, loss: object) -> None:
    if not isinstance(loss, TokenLoss):
        raise ValueError(
            f"algorithm: {name}.token_loss returns a {type(loss).__name__}; it must return "
            "TokenLoss(loss, metrics), see megasd/types.py"
        )
    _check_per_token(f"{name}.token_loss: TokenLoss.loss", loss.loss)


def _check_per_token(what: str, values: object) -> None:
    shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if shape != (len(_ROLLOUTS),):
        raise ValueError(
            f"algorithm: {what} is {shape}; it must have one number for each response token, "
            f"here {len(_ROLLOUTS)}"
        )
