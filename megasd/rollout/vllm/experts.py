"""Experts of a layer as whole stacks, which vLLM's loader takes in one call each.

Loading a layer again costs vLLM some hundred microseconds of Python per call, whatever the size of
the tensor: with 128 experts in 48 layers that is seconds. Imports no vllm; what it asks of one is
recorded by tests/unit/rollout/vllm_contact.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Prefix of the layer, expert, projection and what of it: a matrix, or its scales in float8.
_NAME = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.(weight|weight_scale_inv)")
# vLLM's parameter, and which part of it.
_PARTS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


class ExpertStacks:
    """Collects the experts that a worker keeps; those of other workers are dropped.

    `modules`: vLLM's `RoutedExperts`.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        found = (_Layer(module) for module in modules if _is_known(module))
        self._layers = {layer.name: layer for layer in found}

    def take(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yields what is not an expert's. Copies what it takes, and loads what is complete."""
        for name, tensor in tensors.items():
            found = _NAME.fullmatch(name)
            layer = self._layers.get(found[1]) if found else None
            if found is None or layer is None or found[3] not in _PARTS:
                yield name, tensor
            else:
                layer.take(int(found[2]), found[3], found[4], tensor)

    def finish(self) -> None:
        """Raises RuntimeError where experts are missing: vLLM would go on without them."""
        if lacking := [name for layer in self._layers.values() for name in layer.finish()]:
            raise RuntimeError(f"experts are missing: {', '.join(sorted(lacking))}")


class _Layer:
    """The routed experts of one layer: vLLM's module, and the stacks that are not complete."""

    def __init__(self, module: Any) -> None:
        self.name: str = module.layer_name
        self._module = module
        place = module._map_global_expert_id_to_local_expert_id  # costs a look at the device
        places = {expert: place(expert) for expert in range(module.global_num_experts)}
        self._places = {expert: there for expert, there in places.items() if there >= 0}
        self._stacks: dict[tuple[str, str], tuple[Tensor, set[int]]] = {}
        self._loaded: set[str] = set()  # projections, in this update

    def take(self, expert: int, projection: str, what: str, tensor: Tensor) -> None:
        there = self._places.get(expert)
        if there is None:
            return
        key = (projection, what)
        if key not in self._stacks:
            memory = tensor.new_empty(len(self._places), *tensor.shape)
            self._stacks[key] = (memory, set(self._places))
        stack, missing = self._stacks[key]
        stack[there].copy_(tensor)
        missing.discard(expert)
        if not missing:
            self._load(*key)

    def _load(self, projection: str, what: str) -> None:
        """A stack with three dimensions is every expert of the worker."""
        stack, _ = self._stacks.pop((projection, what))
        self._loaded.add(projection)
        part, shard = _PARTS[projection]
        parameter = getattr(self._module, f"{part}_{what}")
        parameter.weight_loader(
            param=parameter,
            loaded_weight=stack,
            weight_name=f"{self.name}.{part}_{what}",
            shard_id=shard,
            expert_id=next(iter(self._places)),
            return_success=True,
        )

    def finish(self) -> list[str]:
        """Names of what is missing: the first expert of each stack."""
        first, kept = min(self._places), set(_PARTS) - self._loaded
        partly = {key: min(missing) for key, (_, missing) in self._stacks.items()}
        wanting = {(projection, "weight"): first for projection in kept} | partly
        self._loaded.clear()
        return [f"{self.name}.{expert}.{'.'.join(key)}" for key, expert in wanting.items()]


def _is_known(module: Any) -> bool:
    """Whether vLLM loads it from what megasd sends, plain or float8 in blocks, and as it is.

    One with copies of experts for balance has more of them than the model.
    """
    quantization = module.quant_config and module.quant_config.get_name()
    is_plain = module.moe_config.num_logical_experts == module.global_num_experts
    return quantization in (None, "fp8") and is_plain
