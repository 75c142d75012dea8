"""The passes over a block of logits as Triton kernels: each value is read once, nothing is kept.

One program per token holds its row of the block in registers. The arithmetic is that of
blocks.py, head.py and divergence.py, which do the same by torch's own operations on a CPU; there
these kernels run in Triton's interpreter, for tests. Only this file imports triton: torch's builds
for CUDA bring it. Imported by `blocks.find_kernels` alone. Not yet run on a GPU.

Of a block [n, columns], float32 and contiguous, `first_id` is the vocabulary id of column 0.
"""

from typing import TYPE_CHECKING

import triton  # pyright: ignore[reportMissingModuleSource]
import triton.language as tl  # pyright: ignore[reportMissingModuleSource]

if TYPE_CHECKING:
    from torch import Tensor


def add_statistics(
    logits: "Tensor",
    first_id: int,
    wanted: "Tensor",
    statistics: "Tensor",
    top: "tuple[Tensor, Tensor] | None",
) -> None:
    """Joins the block's maximum, total and moment to `statistics` [3 + W, n], in place.

    Also sets the logits at the ids `wanted` [n, W] that are in the block, and keeps in `top` the
    k largest logits and their ids, [n, k] in no order: each replaces the smallest. As tiles come
    in the order of ids, of equal logits the lower id stays.
    """
    top_logits, top_ids = (statistics, wanted) if top is None else top
    num_wanted, top_k = wanted.shape[1], 0 if top is None else top_logits.shape[1]
    _statistics[(logits.shape[0],)](
        logits,
        logits.shape[1],
        first_id,
        wanted,
        statistics,
        statistics.stride(0),
        top_logits,
        top_ids,
        num_wanted=num_wanted,
        wanted_room=triton.next_power_of_2(num_wanted),
        top_k=top_k,
        top_room=triton.next_power_of_2(top_k),
        **_shape_of_programs(logits),
    )


def logit_gradient(
    logits: "Tensor",
    first_id: int,
    maximum: "Tensor",
    offset: "Tensor",
    slope: "Tensor | None",
    ids: "Tensor",
    id_gradients: "Tensor",
    out: "Tensor",
) -> None:
    """out <- exp(z) (offset + slope z), z = logits - maximum, plus the gradients at `ids` [n, W].

    `id_gradients` are sums over equal ids (`sum_over_equal_ids`).
    """
    num_ids = ids.shape[1]
    _logit_gradient[(logits.shape[0],)](
        logits,
        logits.shape[1],
        first_id,
        maximum,
        offset,
        offset if slope is None else slope,
        ids,
        id_gradients,
        out,
        has_slope=slope is not None,
        num_ids=num_ids,
        ids_room=triton.next_power_of_2(num_ids),
        **_shape_of_programs(logits),
    )


def sum_over_equal_ids(ids: "Tensor", values: "Tensor") -> "Tensor":
    """[N, W]: for each place the sum of the row's values at the same id, in a fixed order."""
    sums = values.new_empty(values.shape)
    num_rows, num_ids = ids.shape
    if sums.numel():
        room = triton.next_power_of_2(num_ids)
        _sum_over_equal_ids[(num_rows,)](ids, values, sums, num_ids=num_ids, ids_room=room)
    return sums


def add_divergence(
    student: "Tensor",
    teacher: "Tensor",
    student_normalisers: "Tensor",
    teacher_normalisers: "Tensor",
    sums: "Tensor",
    *,
    kind: str,
    alpha: float,
    entry_clip: float | None,
) -> None:
    """Adds the block's entries and slopes to `sums` [2, n], from the logits of both sides.

    Normalisers are [2, n]: maximum and log of the total. All three may be columns of larger ones.
    """
    _divergence[(student.shape[0],)](
        student,
        teacher,
        student.shape[1],
        student_normalisers,
        teacher_normalisers,
        student_normalisers.stride(0),
        sums,
        sums.stride(0),
        alpha,
        0.0 if entry_clip is None else entry_clip,
        kind=kind,
        clips=entry_clip is not None,
        **_shape_of_programs(student),
    )


def divergence_gradient(
    student: "Tensor",
    teacher: "Tensor",
    student_normalisers: "Tensor",
    teacher_normalisers: "Tensor",
    slopes_sum: "Tensor",
    upstream: "Tensor",
    out: "Tensor",
    *,
    kind: str,
    alpha: float,
    entry_clip: float | None,
) -> None:
    """out <- upstream (slope - exp(student's log-prob) slopes_sum), entry by entry."""
    _divergence_gradient[(student.shape[0],)](
        student,
        teacher,
        student.shape[1],
        student_normalisers,
        teacher_normalisers,
        student_normalisers.stride(0),
        slopes_sum,
        upstream,
        out,
        alpha,
        0.0 if entry_clip is None else entry_clip,
        kind=kind,
        clips=entry_clip is not None,
        **_shape_of_programs(student),
    )


def _shape_of_programs(logits: "Tensor") -> dict[str, int]:
    room = triton.next_power_of_2(logits.shape[1])
    return {"room": room, "num_warps": min(max(room // 512, 4), 16)}


@triton.jit(do_not_specialize=["first_id", "stride"])
def _statistics(
    logits,
    columns,
    first_id,
    wanted,
    statistics,
    stride,
    top_logits,
    top_ids,
    num_wanted: tl.constexpr,
    wanted_room: tl.constexpr,
    top_k: tl.constexpr,
    top_room: tl.constexpr,
    room: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, room)
    inside = column < columns
    row = logits + token * columns
    values = tl.load(row + column, mask=inside, other=-float("inf"))
    highest = tl.max(values, axis=0)
    shifted = tl.where(inside, values - highest, 0.0)
    weights = tl.where(inside, tl.exp(shifted), 0.0)
    block_total = tl.sum(weights, axis=0)
    block_moment = tl.sum(weights * shifted, axis=0)

    here = statistics + token
    maximum, total = tl.load(here), tl.load(here + stride)
    moment = tl.load(here + 2 * stride)
    new_maximum = tl.maximum(maximum, highest)
    shift, block_shift = maximum - new_maximum, highest - new_maximum
    scale, block_scale = tl.exp(shift), tl.exp(block_shift)
    moment = (moment + total * shift) * scale
    tl.store(here, new_maximum)
    tl.store(here + stride, total * scale + block_total * block_scale)
    block_moment = (block_moment + block_total * block_shift) * block_scale
    tl.store(here + 2 * stride, moment + block_moment)

    if num_wanted > 0:
        k = tl.arange(0, wanted_room)
        place = tl.load(wanted + token * num_wanted + k, mask=k < num_wanted, other=0) - first_id
        found = (k < num_wanted) & (place >= 0) & (place < columns)
        logit = tl.load(row + place, mask=found, other=0.0)
        tl.store(here + (3 + k) * stride, logit, mask=found)

    if top_k > 0:
        kept = token * top_k
        _keep_largest(values, column, first_id, top_logits + kept, top_ids + kept, top_k, top_room)


@triton.jit
def _keep_largest(values, column, first_id, logits, ids, k: tl.constexpr, room: tl.constexpr):
    """Puts the row's largest values in the place of the smallest ones kept, one at a time."""
    place = tl.arange(0, room)
    kept = tl.load(logits + place, mask=place < k, other=float("inf"))
    kept_ids = tl.load(ids + place, mask=place < k, other=0)
    lowest = tl.min(kept, axis=0)
    highest, where = tl.max(values, axis=0, return_indices=True)  # of equal ones the first
    while highest > lowest:
        last_id = tl.max(tl.where(kept == lowest, kept_ids, -1), axis=0)
        leaves = (kept == lowest) & (kept_ids == last_id)
        kept = tl.where(leaves, highest, kept)
        kept_ids = tl.where(leaves, (first_id + where).to(tl.int64), kept_ids)
        values = tl.where(column == where, -float("inf"), values)
        lowest = tl.min(kept, axis=0)
        highest, where = tl.max(values, axis=0, return_indices=True)
    tl.store(logits + place, kept, mask=place < k)
    tl.store(ids + place, kept_ids, mask=place < k)


@triton.jit(do_not_specialize=["first_id"])
def _logit_gradient(
    logits,
    columns,
    first_id,
    maximum,
    offset,
    slope,
    ids,
    id_gradients,
    out,
    has_slope: tl.constexpr,
    num_ids: tl.constexpr,
    ids_room: tl.constexpr,
    room: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, room)
    inside = column < columns
    row, out_row = logits + token * columns, out + token * columns
    highest, constant = tl.load(maximum + token), tl.load(offset + token)
    factor = 0.0
    if has_slope:
        factor = tl.load(slope + token)
    shifted = tl.load(row + column, mask=inside, other=0.0) - highest
    gradient = tl.exp(shifted) * (constant + factor * shifted)
    tl.store(out_row + column, gradient.to(out.dtype.element_ty), mask=inside)
    if num_ids > 0:
        k = tl.arange(0, ids_room)
        place = tl.load(ids + token * num_ids + k, mask=k < num_ids, other=0) - first_id
        found = (k < num_ids) & (place >= 0) & (place < columns)
        shifted = tl.load(row + place, mask=found, other=0.0) - highest
        gradient = tl.exp(shifted) * (constant + factor * shifted)
        gradient += tl.load(id_gradients + token * num_ids + k, mask=found, other=0.0)
        tl.debug_barrier()  # other threads have written these places: this must come after
        tl.store(out_row + place, gradient.to(out.dtype.element_ty), mask=found)


@triton.jit
def _sum_over_equal_ids(ids, values, sums, num_ids: tl.constexpr, ids_room: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * num_ids
    k = tl.arange(0, ids_room)
    own = tl.load(ids + start + k, mask=k < num_ids, other=0)
    total = tl.zeros([ids_room], dtype=values.dtype.element_ty)
    for other in range(num_ids):
        value = tl.load(values + start + other)
        total += tl.where(own == tl.load(ids + start + other), value, 0.0)
    tl.store(sums + start + k, total, mask=k < num_ids)


@triton.jit(do_not_specialize=["stride", "sums_stride", "alpha", "clip"])
def _divergence(
    student,
    teacher,
    columns,
    student_normalisers,
    teacher_normalisers,
    stride,
    sums,
    sums_stride,
    alpha,
    clip,
    kind: tl.constexpr,
    clips: tl.constexpr,
    room: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, room)
    inside = column < columns
    place = token * columns + column
    s = _logprobs(student + place, inside, student_normalisers + token, stride)
    t = _logprobs(teacher + place, inside, teacher_normalisers + token, stride)
    entries, slopes = _entries(s, t, alpha, clip, kind, clips)
    of_entries = sums + token
    of_slopes = of_entries + sums_stride
    added = tl.sum(tl.where(inside, entries, 0.0), axis=0)
    tl.store(of_entries, tl.load(of_entries) + added)
    added = tl.sum(tl.where(inside, slopes, 0.0), axis=0)
    tl.store(of_slopes, tl.load(of_slopes) + added)


@triton.jit(do_not_specialize=["stride", "alpha", "clip"])
def _divergence_gradient(
    student,
    teacher,
    columns,
    student_normalisers,
    teacher_normalisers,
    stride,
    slopes_sum,
    upstream,
    out,
    alpha,
    clip,
    kind: tl.constexpr,
    clips: tl.constexpr,
    room: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, room)
    inside = column < columns
    place = token * columns + column
    s = _logprobs(student + place, inside, student_normalisers + token, stride)
    t = _logprobs(teacher + place, inside, teacher_normalisers + token, stride)
    _, slopes = _entries(s, t, alpha, clip, kind, clips)
    gradient = slopes - tl.exp(s) * tl.load(slopes_sum + token)
    gradient *= tl.load(upstream + token)
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _logprobs(places, inside, normalisers, stride):
    maximum, log_total = tl.load(normalisers), tl.load(normalisers + stride)
    return tl.load(places, mask=inside, other=0.0) - maximum - log_total


@triton.jit
def _entries(s, t, alpha, clip, kind: tl.constexpr, clips: tl.constexpr):
    """`losses.divergence.divergence_entries`, s and t the log-probs of student and teacher."""
    difference = t - s
    student, teacher = tl.exp(s), tl.exp(t)
    if kind == "forward_kl":
        entries = tl.where(teacher > 0, teacher * difference, 0.0)
        slopes = -teacher
    elif kind == "reverse_kl":
        entries = tl.where(student > 0, -student * difference, 0.0)
        slopes = entries + student
    else:
        tl.static_assert(kind == "jsd")
        of_teacher, of_student = tl.log(alpha), _log1p(-alpha)
        over_student = _log_add(difference + of_teacher, of_student)
        over_teacher = _log_add(of_student - difference, of_teacher)
        slopes = tl.where(student > 0, (alpha - 1) * student * over_student, 0.0)
        entries = slopes - tl.where(teacher > 0, alpha * teacher * over_teacher, 0.0)
    if clips:
        slopes = tl.where(entries > clip, 0.0, slopes)
        entries = tl.minimum(entries, clip)
    return entries, slopes


@triton.jit
def _log_add(a, b):
    """log(exp(a) + exp(b))."""
    return tl.maximum(a, b) + _log1p(tl.exp(-tl.abs(a - b)))


@triton.jit
def _log1p(x):
    """log(1 + x) without the rounding of the sum (Kahan): what it lost is in the quotient."""
    rounded = 1.0 + x
    lost = rounded == 1.0
    return tl.where(lost, x, tl.log(rounded) * (x / tl.where(lost, 1.0, rounded - 1.0)))
