"""What Transformer Engine's modules compute, against float64: for a GPU, and for the stand-in.

Each case makes a module as Megatron makes it, and returns the relative error of every value and
gradient, in the norm, against the same formula in float64 from the same bfloat16 inputs.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

BF16 = torch.bfloat16
Errors = dict[str, float]
In = Callable[[], AbstractContextManager[Any]]  # the precision in which a module runs
# Of what bfloat16 rounds once or twice; attention rounds its probabilities as well.
BOUND, ATTENTION_BOUND = 6e-3, 1e-2
# Both operands rounded to 3 bits behind the point (hybrid gradients: 2), and less than bfloat16.
FLOAT8_BOUNDS = (0.015, 0.08)
RECIPES = {  # of policy/float8.py, whose names Megatron translates so
    "blockwise": "Float8BlockScaling",
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
}


def modules() -> Any:
    return importlib.import_module("transformer_engine.pytorch")


def in_float8(recipe: str) -> In:
    recipes: Any = importlib.import_module("transformer_engine.common.recipe")
    options: dict[str, Any] = {}
    if recipe == "blockwise":
        options["fp8_format"] = recipes.Format.E4M3
    made = getattr(recipes, RECIPES[recipe])(**options)
    return lambda: modules().autocast(enabled=True, recipe=made)


class Draw:
    """Normal numbers, the same on every device."""

    def __init__(self, device: str) -> None:
        self.device, self._random = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, learns: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=self._random) * scale
        return values.to(self.device, BF16).requires_grad_(learns)

    def fill(self, module: Any) -> None:
        """Matrices and the weights of norms, none as they were initialised."""
        with torch.no_grad():
            for weight in module.parameters():
                is_norm = weight.ndim == 1
                scale = 0.2 if is_norm else weight.shape[-1] ** -0.5
                weight.copy_(self(*weight.shape, scale=scale, learns=False) + is_norm)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compared(
    ours: Tensor, exact: Tensor, upstream: Tensor, pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> Errors:
    """Errors of a value and, by name, of its gradients by (our leaf, its double)."""
    ours.backward(upstream)
    gradients = torch.autograd.grad(exact, [pair[1] for pair in pairs.values()], upstream.double())
    found = {"y": error(ours, exact)}
    for (name, (leaf, _)), gradient in zip(pairs.items(), gradients, strict=True):
        assert leaf.grad is not None, name
        found[f"d{name}"] = error(leaf.grad, gradient)
    return found


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def linear(device: str, precision: In = nullcontext) -> Errors:
    draw = Draw(device)
    module = modules().Linear(512, 384, bias=False, params_dtype=BF16, device=device)
    draw.fill(module)
    found: Errors = {}
    for _ in range(3):  # delayed scaling takes its scales from the passes before
        module.weight.grad = None
        x, upstream = draw(256, 512), draw(256, 384, learns=False)
        x64, weight64 = doubles(x, module.weight)
        with precision():
            y = module(x)
        pairs = {"x": (x, x64), "weight": (module.weight, weight64)}
        found = compared(y, x64 @ weight64.T, upstream, pairs)
    return found


def norm_and_linear(device: str, precision: In = nullcontext) -> Errors:
    draw = Draw(device)
    module = modules().LayerNormLinear(
        *(256, 512),
        eps=1e-6,
        bias=False,
        normalization="RMSNorm",
        params_dtype=BF16,
        device=device,
    )
    draw.fill(module)
    found: Errors = {}
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        x, upstream = draw(384, 256), draw(384, 512, learns=False)
        x64, weight64, norm64 = doubles(x, module.weight, module.layer_norm_weight)
        with precision():
            y = module(x)
        pairs = {
            "x": (x, x64),
            "weight": (module.weight, weight64),
            "norm": (module.layer_norm_weight, norm64),
        }
        found = compared(y, _norm(x64, norm64) @ weight64.T, upstream, pairs)
    return found


def norm(device: str) -> Errors:
    draw = Draw(device)
    module = modules().RMSNorm(256, eps=1e-6, params_dtype=BF16, device=device)
    draw.fill(module)
    x, upstream = draw(300, 256), draw(300, 256, learns=False)
    x64, weight64 = doubles(x, module.weight)
    pairs = {"x": (x, x64), "weight": (module.weight, weight64)}
    return compared(module(x), _norm(x64, weight64), upstream, pairs)


def experts(
    device: str, precision: In = nullcontext, splits: Sequence[int] = (16, 0, 64, 32, 0, 144)
) -> Errors:
    """Some without a token."""
    draw = Draw(device)
    module = modules().GroupedLinear(
        len(splits), 256, 128, bias=False, params_dtype=BF16, device=device
    )
    draw.fill(module)
    weights = [getattr(module, f"weight{i}") for i in range(len(splits))]
    found: Errors = {}
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        x, upstream = draw(sum(splits), 256), draw(sum(splits), 128, learns=False)
        x64, *weights64 = doubles(x, *weights)
        with precision():
            y = module(x, list(splits))
        parts = zip(x64.split(list(splits)), weights64, strict=True)
        exact = torch.cat([part @ weight.T for part, weight in parts])
        pairs = {"x": (x, x64)}
        used = [i for i, split in enumerate(splits) if split]
        pairs |= {f"weight{i}": (weights[i], weights64[i]) for i in used}
        found = compared(y, exact, upstream, pairs)
        for i in {*range(len(splits))} - {*used}:
            assert not weights[i].grad.any(), "of an expert without tokens"
    return found


def attention(device: str, heads: int, groups: int, dim: int, lengths: Sequence[int]) -> Errors:
    """Causal within sequences that stand end to end, fewer keys than queries."""
    draw, total = Draw(device), sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    module = modules().DotProductAttention(
        *(heads, dim),
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=dim**-0.5,
    )
    q, k, v = draw(total, heads, dim), draw(total, groups, dim), draw(total, groups, dim)
    y = module(
        *(q, k, v),
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    q64, k64, v64 = doubles(q, k, v)
    parts = []
    for start, end in pairwise(starts.tolist()):
        each, value = (x[start:end].repeat_interleave(heads // groups, 1) for x in (k64, v64))
        scores = torch.einsum("qhd,khd->hqk", q64[start:end], each) * dim**-0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    exact = torch.cat(parts).reshape(total, -1)
    upstream = draw(total, heads * dim, learns=False)
    pairs = {"q": (q, q64), "k": (k, k64), "v": (v, v64)}
    return compared(y.reshape(total, -1), exact, upstream, pairs)


def rotation(device: str) -> Errors:
    """Through Megatron's own function, which restarts at each sequence."""
    megatron: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    lengths, dim = (3, 50, 11), 64
    draw = Draw(device)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    steps = torch.arange(0, dim, 2, device=device).double() / dim
    angle = torch.arange(64, device=device).double()[:, None] * 10_000.0**-steps
    angle = torch.cat([angle, angle], -1)
    x, upstream = draw(64, 4, dim), draw(64, 4, dim, learns=False)
    y = megatron.fused_apply_rotary_pos_emb_thd(x, starts, angle[:, None, None].float())
    (x64,) = doubles(x)
    turned = torch.cat([-x64[..., dim // 2 :], x64[..., : dim // 2]], -1)
    at = torch.cat([angle[:n] for n in lengths])[:, None]
    return compared(y, x64 * at.cos() + turned * at.sin(), upstream, {"x": (x, x64)})


def exchange(device: str) -> Errors:
    """Tokens to the rows of two of eight experts each, weighed, and summed again."""
    permutation: Any = importlib.import_module("transformer_engine.pytorch.permutation")
    draw, tokens, chosen = Draw(device), 100, 2
    x, upstream = draw(tokens, 256), draw(tokens, 256, learns=False)
    scores = draw(tokens, 8, learns=False).float()
    routing = torch.zeros_like(scores, dtype=torch.bool)
    routing.scatter_(1, scores.topk(chosen).indices, True)
    probs = (scores.sigmoid() * routing).requires_grad_()
    rows, weights, places = permutation.moe_permute_with_probs(
        x, probs, routing, num_out_tokens=tokens * chosen
    )
    weighed = (rows.float() * weights[:, None]).to(BF16)
    y = permutation.moe_unpermute(weighed, places, restore_shape=x.shape)
    x64, probs64 = doubles(x, probs)
    exact = x64 * probs64.sum(1, keepdim=True)
    ours = compared(y, exact, upstream, {"x": (x, x64)})
    # A probability that routes nothing has no gradient, whatever the formula's would be.
    wanted = (x64.detach() * upstream.double()).sum(1, keepdim=True) * routing
    assert probs.grad is not None
    return ours | {"dprobs": error(probs.grad, wanted)}


def gradient_in_place(device: str) -> Errors:
    """A weight's gradient is added to its float32 buffer, and nothing rounds it on the way."""
    draw = Draw(device)
    module = modules().Linear(
        512, 384, bias=False, params_dtype=BF16, device=device, fuse_wgrad_accumulation=True
    )
    draw.fill(module)
    before = torch.full((384, 512), 0.25, device=device)
    module.weight.main_grad = before.clone()
    module.weight.grad_added_to_main_grad = False
    x, upstream = draw(256, 512), draw(256, 384, learns=False)
    module(x).backward(upstream)
    assert module.weight.grad_added_to_main_grad
    exact = before.double() + upstream.double().T @ x.detach().double()
    return {"dweight": error(module.weight.main_grad, exact)}


def adam(device: str) -> Errors:
    """Five steps beside torch's AdamW, both in float32."""
    optimizers: Any = importlib.import_module("transformer_engine.pytorch.optimizers")
    draw = Draw(device)
    ours, theirs = (draw(5000).detach().float().requires_grad_() for _ in range(2))
    with torch.no_grad():
        theirs.copy_(ours)
    options: Any = {"lr": 1e-2, "weight_decay": 0.1}
    pair = optimizers.FusedAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = draw(5000, learns=False).float()
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    return {"weights": error(ours, theirs.double())}


LENGTHS = (1, 37, 200, 8, 129)
# By name: the case, and the bound of every error.
CASES: dict[str, tuple[Callable[[str], Errors], float]] = {
    "linear": (linear, BOUND),
    "norm": (norm, BOUND),
    "norm and linear": (norm_and_linear, BOUND),
    "experts": (experts, BOUND),
    "experts, uneven": (lambda device: experts(device, splits=(5, 0, 33, 1)), BOUND),
    "attention 64": (lambda device: attention(device, 4, 2, 64, LENGTHS), ATTENTION_BOUND),
    "attention 128": (lambda device: attention(device, 8, 4, 128, LENGTHS), ATTENTION_BOUND),
    "rotation": (rotation, BOUND),
    "exchange": (exchange, BOUND),
    "gradient in place": (gradient_in_place, 1e-5),
    "adam": (adam, 1e-5),
}
FLOAT8_CASES: dict[str, Callable[[str, In], Errors]] = {
    "linear": linear,
    "norm and linear": norm_and_linear,
    "experts": experts,
}


def in_float8_of(name: str, recipe: str, device: str) -> Errors:
    """A case of FLOAT8_CASES; Transformer Engine forgets its scales."""
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    try:
        return FLOAT8_CASES[name](device, in_float8(recipe))
    finally:
        quantization.FP8GlobalStateManager.reset()


def all_of_them(device: str) -> dict[str, Errors]:
    """And under `name, recipe` those in float8."""
    found = {name: case(device) for name, (case, _) in CASES.items()}
    for name in FLOAT8_CASES:
        found |= {f"{name}, {recipe}": in_float8_of(name, recipe, device) for recipe in RECIPES}
    return found


def check(name: str, errors: Errors) -> None:
    """In float8 no value is nearer than that either: it was really used."""
    low, high = (0.0, CASES[name][1]) if name in CASES else FLOAT8_BOUNDS
    for value, wrong in errors.items():
        assert low < wrong < high, f"{name}: {value}"
