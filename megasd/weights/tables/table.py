"""What a family's table is made of: rows that tie one Megatron parameter to Hugging Face tensors.

Conventions: `{layer}` in a name stands for a layer number. A Megatron name may hold the number
within its pipeline stage, a Hugging Face name always holds the number within the model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["replicated", "column", "row", "gated", "qkv", "vocabulary"]
"""How tensor parallelism cuts the Megatron parameter:

- replicated: not at all;
- column: along dimension 0;
- row: along dimension 1;
- gated: gate and up each along dimension 0, a rank holds cat[gate_r, up_r];
- qkv: between key-value groups, a rank holds cat over its groups of [queries, key, value];
- vocabulary: along dimension 0 after zero rows were added up to a multiple of the ranks.
"""


@dataclass(frozen=True, slots=True)
class HFTensor:
    """Name pattern and full shape of one Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]

    def at(self, layer: int | None) -> str:
        return self.name.format(layer=layer)


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter."""

    kind: Kind
    megatron: tuple[str, ...]  # its names: of the local layer spec, of Transformer Engine's
    hf: tuple[HFTensor, ...]
    groups: int = 1  # qkv: key-value heads
    exported: bool = True  # False: a copy of a tensor that another row exports


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows of one model: a family's table with the sizes of a config filled in."""

    model_type: str
    num_layers: int
    first: tuple[Row, ...]  # on the first pipeline stage only
    layers: tuple[Row, ...]  # once per layer
    last: tuple[Row, ...]  # on the last pipeline stage only
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a folder may hold beside the rows' own, by the tensor they must equal."""

    def find(self, name: str, first_layer: int = 0) -> tuple[Row, int | None]:
        """The row of a Megatron parameter, and its layer number counted from `first_layer`."""
        pattern, layer = name, None
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            pattern = "decoder.layers.{layer}." + name[match.end() :]
            layer = int(match[1]) + first_layer
        for row in (*self.first, *self.layers, *self.last):
            if pattern in row.megatron and (layer is None or layer < self.num_layers):
                return row, layer
        raise ValueError(f"{name}: not a parameter of {self.model_type} in megasd/weights/tables")

    def parameters(self) -> Iterator[tuple[Row, int | None]]:
        """Every (row, layer) of the whole model, in the order of the forward pass."""
        yield from ((row, None) for row in self.first)
        for layer in range(self.num_layers):
            yield from ((row, layer) for row in self.layers)
        yield from ((row, None) for row in self.last)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face folder with its shape, in the order of `parameters`."""
        return {
            tensor.at(layer): tensor.shape
            for row, layer in self.parameters()
            if row.exported
            for tensor in row.hf
        }


def required(hf_config: Mapping[str, Any], key: str) -> Any:
    """`hf_config[key]`; nothing about a model is guessed."""
    if hf_config.get(key) is None:
        raise ValueError(f"model.path: config.json lacks `{key}`; add it")
    return hf_config[key]
