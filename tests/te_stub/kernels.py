"""Transformer Engine's kernels in torch, each under its name in `transformer_engine_torch`.

`KERNELS` is the table. Each does what its CUDA kernel does for what a policy asks of it and asserts
the rest away; sums are in float32, results are rounded to the type that was asked for. What none of
them has is the kernels' speed, their order of summation, and their bugs.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.te_stub import fp8
from tests.te_stub.fp8 import DType, dequantize, operand, quantize, split_quantize


class FusedAttnBackend(IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


LAUNCHED: Counter[str] = Counter()  # how often each kernel ran
_running: list[str] = []


def is_inside_a_kernel() -> bool:
    """Whether what torch runs right now would be one kernel on a GPU."""
    return bool(_running)


# --- matrix products ------------------------------------------------------------------------------


def _product(a: Any, transa: bool, b: Any, transb: bool) -> Tensor:
    """cuBLAS' column-major a x b: b x a^T for a layer, b x a for its input's gradient, b^T x a for
    its weight's. An operand in FP8 is read from the copy that is laid out along the sum."""
    left = operand(b, columnwise=transb)
    right = operand(a, columnwise=not transa).flatten(0, -2)
    left = left.flatten(0, -2).T if transb else left
    return left @ (right.T if transa else right)


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, None, None, None]:
    assert not gelu
    assert bias is None
    assert comm_overlap is None
    product = alpha * _product(a, transa, b, transb)
    if out is None:
        out = product.to(torch.bfloat16 if out_dtype is None else out_dtype.torch)
    elif accumulate:
        out.add_(product.view_as(out))
    else:
        out.copy_(product.view_as(out))
    return out if quantizer is None else quantize(out, quantizer), None, None, None


def te_general_grouped_gemm(
    a: Sequence[Any],
    transa: bool,
    b: Sequence[Any],
    transb: bool,
    out: Sequence[Tensor],
    out_dtype: DType,
    m_splits: Sequence[int],
    bias: Any,
    bias_dtype: DType,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Any:
    """A product for each expert; the results end to end in one tensor, or each in its own."""
    outs = out[0].split(list(m_splits)) if single_output else out
    for one_a, one_b, one_out in zip(a, b, outs, strict=True):
        product = _product(one_a, transa, one_b, transb)
        one_out.copy_(one_out + product if accumulate else product)
    return bias


# --- norms and rotations --------------------------------------------------------------------------


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: DType,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    rstdev = (x.float().square().mean(dim=-1) + eps).rsqrt()
    gamma = weight.float() + zero_centered_gamma
    normed = (x.float() * rstdev[:, None] * gamma).to(out_dtype.torch)
    if quantizer is not None:
        return quantize(normed, quantizer), None, rstdev
    return normed if out is None else out.copy_(normed), None, rstdev


def rmsnorm_bwd(
    grad: Tensor,
    x: Tensor,
    rstdev: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor]:
    grad32, normed = grad.float(), x.float() * rstdev[:, None]
    towards = grad32 * (weight.float() + zero_centered_gamma)
    of_x = (towards - normed * (towards * normed).mean(dim=-1, keepdim=True)) * rstdev[:, None]
    return of_x.to(x.dtype), (grad32 * normed).sum(dim=0).to(weight.dtype)


def fused_rope_forward(
    x: Tensor,  # [T, heads, d]
    freqs: Tensor,  # [longest, 1, 1, d]
    start_positions: Tensor | None,
    qkv_format: str,
    interleaved: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
    *,
    backward: bool = False,
) -> Tensor:
    """Each sequence is rotated by its own positions; backward, the other way round."""
    assert (qkv_format, start_positions, interleaved, cp_size) == ("NVTE_THD", None, False, 1)
    assert freqs.shape[-1] == x.shape[-1]
    lengths = cu_seqlens.diff().tolist()
    assert sum(lengths) == len(x)
    assert max(lengths) <= len(freqs)
    angle = torch.cat([freqs[:n, 0] for n in lengths])
    sine = -angle.sin() if backward else angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * angle.cos() + turned * sine).to(x.dtype)


def fused_rope_backward(grad: Tensor, *args: Any) -> Tensor:
    return fused_rope_forward(grad, *args, backward=True)


# --- attention ------------------------------------------------------------------------------------


def get_fused_attn_backend(
    is_training: bool, q_type: DType, kv_type: DType, layout: str, bias: str, mask: str, *_: Any
) -> FusedAttnBackend:
    """cuDNN has kernels for 16 bits; Transformer Engine computes in steps of torch without one."""
    if q_type not in (DType.kBFloat16, DType.kFloat16):
        return FusedAttnBackend.NVTE_No_Backend
    return FusedAttnBackend.NVTE_F16_arbitrary_seqlen


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """Causal within each sequence, in float32; 0 after the last."""
    parts = []
    for start, end in pairwise(starts):
        one_q, one_k, one_v = (x[start:end].float().transpose(0, 1) for x in (q, k, v))
        part = functional.scaled_dot_product_attention(
            one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=True
        )
        parts.append(part.transpose(0, 1))
    return torch.cat([*parts, q[starts[-1] :].float() * 0.0])


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: str,
    bias_type: str,
    mask_type: str,
    softmax_type: str,
    window_size: tuple[int, int],
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    assert qkv_layout == "NVTE_THD_THD_THD", qkv_layout
    assert (bias_type, mask_type) == ("NVTE_NO_BIAS", "NVTE_PADDING_CAUSAL_MASK")
    assert softmax_type == "NVTE_VANILLA_SOFTMAX"
    assert dropout == 0.0
    assert window_size in ((-1, -1), (-1, 0)), window_size
    assert cu_seqlens_q.dtype == torch.int32, cu_seqlens_q.dtype
    starts = cu_seqlens_q.tolist()
    for other in (cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded):
        assert other is None or other.tolist() == starts, "sequences stand end to end"
    longest = max(b - a for a, b in pairwise(starts))
    assert longest <= max_seqlen_q == max_seqlen_kv, (longest, max_seqlen_q, max_seqlen_kv)
    out = _attention(q, k, v, starts, attn_scale).to(q.dtype)
    stats = torch.zeros(q.shape[0], q.shape[1], 1)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: str,
    bias_type: str,
    mask_type: str,
    softmax_type: str,
    window_size: tuple[int, int],
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    *rest: Any,
) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = q32, k32, v32 = [x.detach().float().requires_grad_() for x in (q, k, v)]
        again = _attention(q32, k32, v32, cu_seqlens_q.tolist(), attn_scale)
        gradients = torch.autograd.grad(again, leaves, grad.float().view_as(again))
    return [*(g.to(q.dtype) for g in gradients), None]


def convert_thd_to_bshd(x: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    parts = x.tensor_split(cu_seqlens[1:].long())[:batch]
    padded = [functional.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts]
    return torch.stack(padded)


def convert_bshd_to_thd(x: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    parts = torch.cat([one[:n] for one, n in zip(x, cu_seqlens.diff().tolist(), strict=True)])
    return functional.pad(parts, (0, 0, 0, 0, 0, int(num_tokens) - len(parts)))


# --- many tensors at once: the optimizer ----------------------------------------------------------


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW on lists of gradients, parameters, and both moments."""
    assert mode == 1, "decoupled weight decay"
    assert len(lists) == 4
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second in zip(*lists, strict=True):
        g = gradient.float()
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = (second / correction2).sqrt_().add_(eps)
        change = first / correction1 / size + weight_decay * parameter
        parameter.sub_(lr * change)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm()[None], norms if per_tensor else norms[:0]


def multi_tensor_scale(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


# --- experts: a module of Triton kernels, not a part of the extension -----------------------------


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """[tokens, 2 experts + 1]: the rows of a token among the permuted, their experts, how many.

    Permuted rows are ordered by expert, then by token.
    """
    chosen = routing_map.bool()
    by_expert = chosen.T.flatten().cumsum(0).view(num_experts, num_tokens).T - 1
    first = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)
    rows = by_expert.gather(1, first)
    return torch.cat([rows, first, chosen.sum(dim=1, keepdim=True)], dim=1).int()


def _rows(row_id_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each permuted row: its place, its token and its expert; in the order of the tokens."""
    count = row_id_map[:, -1:]
    token, nth = (torch.arange(num_experts) < count).nonzero(as_tuple=True)
    row, expert = row_id_map[token, nth].long(), row_id_map[token, num_experts + nth].long()
    return row, token, expert


def permute_with_mask_map(
    x: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    scale: Tensor | None,
    num_tokens: int,
    num_experts: int,
    num_out_tokens: int,
    hidden_size: int,
    scale_hidden_dim: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    row, token, expert = _rows(row_id_map, num_experts)
    assert len(row) == num_out_tokens, "no token is dropped"
    out = x.new_empty(num_out_tokens, hidden_size)
    out[row] = x[token]
    scales = None if scale is None else scale[token][row.argsort()]
    return out, scales, None if probs is None else probs[token, expert][row.argsort()]


def unpermute_with_mask_map(
    x: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None,
    permuted_probs: Tensor | None,
    num_tokens: int,
    num_experts: int,
    hidden_size: int,
) -> tuple[Tensor, Tensor | None]:
    """The sum of each token's rows."""
    assert merging_probs is None, "Megatron weighs the experts' rows itself"
    row, token, expert = _rows(row_id_map, num_experts)
    out = torch.zeros(num_tokens, hidden_size).index_add(0, token, x[row].float())
    if permuted_probs is None:
        return out.to(x.dtype), None
    probs = permuted_probs.new_zeros(num_tokens, num_experts)
    probs[token, expert] = permuted_probs[row]
    return out.to(x.dtype), probs


def make_chunk_sort_map(
    split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int
) -> Tensor:
    """[T]: where each row goes when chunks change places."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    order = torch.cat([chunks[i] for i in sorted_indices.tolist()])
    return order.argsort().int()


def sort_chunks_by_map(
    x: Tensor,
    row_id_map: Tensor,
    probs: Tensor | None,
    num_tokens: int,
    hidden_size: int,
    is_forward: bool,
) -> tuple[Tensor, Tensor | None]:
    rows = row_id_map.long().argsort() if is_forward else row_id_map.long()
    return x[rows], None if probs is None else probs[rows]


# --- the tables -----------------------------------------------------------------------------------

KERNELS: Mapping[str, Callable[..., Any]] = {
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": te_general_grouped_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "fused_rope_forward": fused_rope_forward,
    "fused_rope_backward": fused_rope_backward,
    "get_fused_attn_backend": get_fused_attn_backend,
    "fused_attn_fwd": fused_attn_fwd,
    "fused_attn_bwd": fused_attn_bwd,
    "convert_thd_to_bshd": convert_thd_to_bshd,
    "convert_bshd_to_thd": convert_bshd_to_thd,
    "multi_tensor_adam": multi_tensor_adam,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": multi_tensor_scale,
    "quantize": quantize,
    "split_quantize": split_quantize,
    "dequantize": dequantize,
    "fp8_transpose": fp8.fp8_transpose,
    "fused_amax_and_scale_update_after_reduction": fp8.update_delayed_scales,
    "get_cublasLt_version": lambda: 130_100,
    "get_cudnn_version": lambda: 91_900,
    "get_num_cublas_streams": lambda: 4,
}
PERMUTATION: Mapping[str, Callable[..., Any]] = {
    "make_row_id_map": make_row_id_map,
    "permute_with_mask_map": permute_with_mask_map,
    "unpermute_with_mask_map": unpermute_with_mask_map,
    "make_chunk_sort_map": make_chunk_sort_map,
    "sort_chunks_by_map": sort_chunks_by_map,
}


def as_kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Counted, without gradients of its own, and one thing to who counts what torch runs."""

    @wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        LAUNCHED[name] += 1
        _running.append(name)
        try:
            with torch.no_grad():
                return function(*args, **kwargs)
        finally:
            _running.pop()

    return launch
