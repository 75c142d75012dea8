"""An FP8 engine's arithmetic in transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from megasd.types import View
from megasd.weights.fp8 import is_quantized, quantize


def as_an_fp8_engine(folder: Path, views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the responses with weights as they travel to engines, and activations with a
    scale for 128 of a token; and without either. All else is in float32.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = _read(model, views)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            if is_quantized(f"{name}.weight", tuple(weight.shape)):
                small, scales = quantize(weight)
                blocks = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
                module.weight.data = small.float() * blocks
                module.register_forward_pre_hook(lambda _, given: (_in_blocks(given[0]),))
    return _read(model, views), plain


def _in_blocks(x: Tensor) -> Tensor:
    parts = x.unflatten(-1, (-1, 128))
    scale = parts.abs().amax(-1, keepdim=True) / 448
    small = functional.hardtanh(parts / scale, -448, 448).to(torch.float8_e4m3fn)
    return (small.float() * scale).flatten(-2)


@torch.no_grad()
def _read(model: Any, views: Sequence[View]) -> np.ndarray:
    found = []
    for view in views:
        ids = torch.from_numpy(np.concatenate([view.prompt_ids, view.response_ids]))
        table = model(ids[None]).logits[0].log_softmax(-1)[len(view.prompt_ids) - 1 : -1]
        found.append(table.gather(1, torch.from_numpy(view.response_ids)[:, None])[:, 0])
    return torch.cat(found).numpy()
