"""What ranks run to read distributions, under the weights of every kind of teacher."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasd.losses.config import MismatchConfig
from megasd.types import Reads, Support, View
from tests.distributed import policy_cases as cases

TOP_K, SAMPLES = 5, 64


def views_of(seed: int, vocab: int) -> tuple[list[View], list[View | None]]:
    """Student views, and a teacher's of the same responses after longer prompts, one missing."""
    views = cases.random_views(seed, count=7, vocab=vocab)
    draw = np.random.default_rng(seed + 1)
    teacher: list[View | None] = [
        View(
            prompt_ids=np.concatenate([draw.integers(1, vocab, 1 + i), view.prompt_ids]),
            response_ids=view.response_ids,
        )
        for i, view in enumerate(views)
    ]
    teacher[2] = None
    return views, teacher


def read_everything(folder: Path, settings: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """This rank's rows, by token; None on ranks that hold none (not the last stage)."""
    policy = cases.make_policy(folder, {**settings, "temperature": 0.8})
    views, teacher_views = views_of(5, vocab)
    offsets = cases.offsets_of(views)
    owners = policy.assign_owners(
        [v.num_tokens for v in views], [i // 4 for i in range(len(views))]
    )

    def read(role: str | None, reads: Reads) -> Any:
        if role is None:
            return policy.score(views, offsets, reads=reads, owners=owners)
        return policy.score_teacher(role, teacher_views, offsets, reads=reads, owners=owners)

    own = np.flatnonzero(np.repeat(owners == policy.layout.dp_rank, np.diff(offsets)))
    tokens = torch.from_numpy(own if policy.layout.is_last_stage else own[:0])
    chosen = read("teacher", Reads(top_k=TOP_K)).support
    student = read(None, Reads(top_k=TOP_K)).support
    at_student_ids = read("teacher", Reads(support=replace(student, teacher_logprobs=None))).support
    crossed = read(None, Reads(support=chosen, cross_entropy=True))
    drawn = read("teacher", Reads(samples=SAMPLES, seed=(3, 1))).support
    sampled = read(None, Reads(support=drawn, cross_entropy=True))
    hidden = read("teacher", Reads(hidden=True)).hidden
    return {
        "tokens": tokens.numpy(),
        "teacher top": _rows(chosen, tokens),
        "student top": _rows(student, tokens),
        "teacher at student": _rows(at_student_ids, tokens),
        "samples": drawn.at(tokens).ids.numpy(),
        "cross entropy": crossed.cross_entropy.numpy(),
        "cross entropy of samples": sampled.cross_entropy.numpy(),
        "hidden": hidden.at(tokens).hidden.numpy() if hidden is not None else None,
        "index": chosen.index.numpy(),
    }


def what_a_pass_holds(folder: Path) -> dict[str, Any]:
    """Bytes behind each of its values per token, and whether it kept rows, by what is asked."""
    policy = cases.make_policy(folder, {})
    views, _ = views_of(5, 121)
    offsets = cases.offsets_of(views)
    support = policy.score(views, offsets, reads=Reads(top_k=TOP_K)).support
    asked = {
        "plain": Reads(),
        "top k": Reads(top_k=TOP_K),
        "cross entropy": Reads(support=support, cross_entropy=True),
    }
    found = {}
    for name, reads in asked.items():
        scores = policy.score(views, offsets, reads=reads)
        sizes = [
            values.untyped_storage().nbytes()
            for values in (scores.logprobs, scores.entropy, scores.cross_entropy)
            if values is not None
        ]
        found[name] = (sizes, scores.support is not None)
    return {"bytes": 4 * int(offsets[-1]), **found}


def _rows(support: Support, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    found = support.at(tokens)
    assert found.teacher_logprobs is not None
    return found.ids.numpy(), found.teacher_logprobs.numpy()


def teacher_logprobs(
    folder: Path, settings: Mapping[str, Any], vocab: int
) -> dict[str, np.ndarray]:
    """Log-probs of each role after the policy has learnt something."""
    policy = cases.make_policy(folder, settings)
    views, teacher_views = views_of(5, vocab)
    offsets = cases.offsets_of(views)
    batch, credit = cases.batch_and_credit(views, seed=1)
    policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    roles = ("teacher", *settings.get("roles", ()))
    found = {r: policy.score_teacher(r, teacher_views, offsets).logprobs.numpy() for r in roles}
    return {**found, "student": policy.score(views, offsets).logprobs.numpy().copy()}


def initial_logprobs(folder: Path, vocab: int) -> np.ndarray:
    policy = cases.make_policy(folder, {})
    views, teacher_views = views_of(5, vocab)
    return policy.score(teacher_views, cases.offsets_of(views)).logprobs.numpy()


def corrected_loss(folder: Path, mismatch: MismatchConfig, settings: Mapping[str, Any]) -> Any:
    """One update whose old log-probs are known, beside what its loss should follow from."""
    policy = cases.make_policy(folder, settings)
    policy.mismatch = mismatch
    views = cases.random_views(3, count=6, vocab=121)
    offsets = cases.offsets_of(views)
    scores = policy.score(views, offsets)
    batch, credit = cases.batch_and_credit(views, seed=1)
    shift = torch.linspace(-1.0, 1.0, len(batch.rollout_ids))
    batch = replace(
        batch, rollout_logprobs=scores.logprobs - shift, old_logprobs=scores.logprobs.clone()
    )
    done = policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
    return {
        "metrics": done.metrics,
        "logprobs": scores.logprobs,
        "entropy": scores.entropy,
        "shift": shift,
        "rollout_ids": batch.rollout_ids,
        "credit": tuple(credit[:3]),
    }
