"""What ranks run to read distributions, under the weights of every kind of teacher."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megasd.losses.config import MismatchConfig
from megasd.types import Reads, Support, View
from tests.distributed import policy_cases as cases

TOP_K, SAMPLES, VOCABULARY = 5, 64, 121


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
    from megasd.policy.rows import whole, whole_support

    group = policy.state.head_group

    def rows(support: Support) -> tuple[np.ndarray, np.ndarray | None]:
        found = whole_support(support.at(tokens), group)
        logprobs = found.teacher_logprobs
        return found.ids.numpy(), None if logprobs is None else logprobs.numpy()

    states = None
    if hidden is not None:
        states = whole(hidden.at(tokens).hidden, policy.hf_config["hidden_size"], group).numpy()
    kept = [chosen.ids, chosen.teacher_logprobs, drawn.ids]
    return {
        "tokens": tokens.numpy(),
        "teacher top": rows(chosen),
        "student top": rows(student),
        "teacher at student": rows(at_student_ids),
        "samples": rows(drawn)[0],
        "cross entropy": crossed.cross_entropy.numpy(),
        "cross entropy of samples": sampled.cross_entropy.numpy(),
        "hidden": states,
        "index": chosen.index.numpy(),
        "kept": [one.shape for one in (*kept, *([hidden.hidden] if hidden is not None else []))],
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


def most_that_a_pass_holds(folder: Path) -> tuple[int, int]:
    """Bytes of the hidden states that a pass leaves, and how much more it held at its peak than
    one that leaves nothing, without their head."""
    from tests.distributed.planner_cases import LiveStorages

    policy = cases.make_policy(folder, {"max_tokens": 48})
    views = cases.random_views(5, count=150, vocab=121)
    offsets, peaks, hidden = cases.offsets_of(views), [], None
    for reads in (Reads(), Reads(), Reads(hidden=True)):
        with LiveStorages() as storages:
            hidden = policy.score(views, offsets, reads=reads).hidden
        peaks.append(storages.peak)
    assert hidden is not None
    return hidden.hidden.nbytes, peaks[2] - peaks[1] - hidden.weight.nbytes


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


def averages(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """The teacher's weights in place after two steps, beside what they should be; and elements
    kept, beside this rank's share of the buckets."""
    policy = cases.make_policy(folder, settings)
    views = cases.random_views(5, count=6, vocab=VOCABULARY)
    decay = policy.teacher.config.decay
    expected = {name: p.detach().double() for name, p in policy.parameters.items()}
    for step in range(2):
        batch, credit = cases.batch_and_credit(views, seed=step)
        offsets = cases.offsets_of(views)
        policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
        policy.teacher.after_batch(step, updated=True)
        for name, p in policy.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    student = {name: p.detach().clone() for name, p in policy.parameters.items()}
    with policy.teacher.swapped_in():
        found = {name: p.detach().double() for name, p in policy.parameters.items()}
    assert all(torch.equal(p, student[name]) for name, p in policy.parameters.items())
    return {
        "difference": max(float((found[n] - expected[n]).abs().max()) for n in expected),
        "moved": max(float((found[n] - student[n]).abs().max()) for n in expected),
        "kept": sum(kept.numel() for kept in policy.teacher.kept),
        "share": sum(
            len(bucket.data) // (1 if bucket.group is None else dist.get_world_size(bucket.group))
            for bucket in policy.buckets
        ),
    }


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
