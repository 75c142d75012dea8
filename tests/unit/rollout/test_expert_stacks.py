"""Experts come in any order, over many buckets, and go on as whole stacks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megasd.rollout.vllm.experts import ExpertStacks

NAMES = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.Module):
    """As vLLM's: experts 2 and 3 of four lie here, in the other order."""

    def __init__(self, layer: int, *, copies: int = 0, quantization: str | None = None) -> None:
        super().__init__()
        self.layer_name = f"model.layers.{layer}.mlp.experts"
        self.global_num_experts = 4 + copies
        self.moe_config = SimpleNamespace(num_logical_experts=4)
        name: Any = quantization
        self.quant_config = None if name is None else SimpleNamespace(get_name=lambda: name)
        self.loaded: dict[tuple[str, str], Tensor] = {}
        for part in ("w13_weight", "w2_weight"):
            parameter: Any = nn.Parameter(torch.empty(0))
            parameter.weight_loader = self.load
            self.register_parameter(part, parameter)

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return {2: 1, 3: 0}.get(expert, -1)

    def load(self, *, param: Any, loaded_weight: Tensor, **said: Any) -> None:
        (part,) = [name for name, one in self.named_parameters() if one is param]
        assert said["weight_name"] == f"{self.layer_name}.{part}"
        assert said["expert_id"] in (2, 3), "one that lies here"
        self.loaded[part, said["shard_id"]] = loaded_weight


def tensors(layer: int = 0) -> dict[str, Tensor]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": torch.full(
            (2, 3), 10.0 * expert + NAMES.index(name)
        )
        for expert in range(4)
        for name in NAMES
    }


def test_stacks_are_loaded_whole_however_the_experts_come() -> None:
    layers = [Experts(0), Experts(1)]
    stacks = ExpertStacks(layers)
    for update in range(2):
        memory = torch.empty(2, 3)  # that the next tensor is written into
        both = tensors(0) | tensors(1)
        for name in sorted(both, reverse=update == 1):
            memory.copy_(both[name] + 100 * update)
            assert not list(stacks.take({name: memory}))
        stacks.finish()
        for layer in layers:
            loaded = layer.loaded
            assert {key: stack[:, 0, 0].tolist() for key, stack in loaded.items()} == {
                ("w13_weight", "w1"): [30 + 100 * update, 20 + 100 * update],
                ("w13_weight", "w3"): [31 + 100 * update, 21 + 100 * update],
                ("w2_weight", "w2"): [32 + 100 * update, 22 + 100 * update],
            }
            loaded.clear()


def test_experts_that_do_not_come_are_named() -> None:
    stacks = ExpertStacks([Experts(0), Experts(1)])
    lacking = tensors(0)
    del lacking["model.layers.0.mlp.experts.3.up_proj.weight"]
    del lacking["model.layers.0.mlp.experts.0.up_proj.weight"]  # of another worker
    list(stacks.take(lacking))
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts\.3\.up_proj\.weight, model\."):
        stacks.finish()


@pytest.mark.parametrize("other", [{"copies": 2}, {"quantization": "awq"}])
def test_what_is_not_known_goes_to_vllm_as_it_came(other: dict[str, Any]) -> None:
    stacks = ExpertStacks([Experts(0, **other), Experts(1)])
    norm = {"model.layers.1.input_layernorm.weight": torch.ones(3)}
    bias = {"model.layers.1.mlp.experts.2.up_proj.bias": torch.ones(3)}
    given = tensors(0) | norm | bias | tensors(1)
    passed = dict(stacks.take(given))
    assert list(passed) == [*tensors(0), *norm, *bias]
    assert all(passed[name] is given[name] for name in passed)
    stacks.finish()
