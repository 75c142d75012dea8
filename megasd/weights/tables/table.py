"""What a family's table is made of: rows that tie Megatron parameters to Hugging Face tensors.

Conventions: `{layer}` in a name stands for a layer number, `{expert}` for an expert's. A Megatron
name may hold the numbers within its pipeline stage and its expert-parallel rank; a Hugging Face
name always holds those within the model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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

    def at(self, layer: int | str | None, expert: int | str | None = None) -> str:
        return self.name.format(layer=layer, expert=expert)


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: a table makes each once
class Row:
    """One Megatron parameter, or, of a layer with experts, one parameter per expert."""

    kind: Kind
    megatron: tuple[str, ...]  # its names: of the local layer spec, of Transformer Engine's
    hf: tuple[HFTensor, ...]
    groups: int = 1  # qkv: key-value heads
    exported: bool = True  # False: a copy of a tensor that another row exports
    experts: int = 0  # above 0: there are so many; cut by expert-tensor parallelism, not tensor


class Entry(NamedTuple):
    """One parameter of the model: numbers are those within the model."""

    row: Row
    layer: int | None
    expert: int | None = None

    def hf_names(self) -> tuple[str, ...]:
        return tuple(tensor.at(self.layer, self.expert) for tensor in self.row.hf)


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

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return max((row.experts for row in self.layers), default=0)

    @property
    def qk_norm(self) -> bool:
        """Queries and keys are normalised before attention."""
        return any("q_layernorm" in name for row in self.layers for name in row.megatron)

    def find(self, name: str, first_layer: int = 0, first_expert: int = 0) -> Entry:
        """The entry of a Megatron parameter, whose numbers count from the two given here."""
        pattern, layer, expert = name, None, None
        if match := re.match(r"decoder\.layers\.(\d+)\.", name):
            pattern = "decoder.layers.{layer}." + name[match.end() :]
            layer = int(match[1]) + first_layer
        if match := re.search(r"(?<=\.experts\.local_experts\.)\d+|(?<=\.weight)\d+$", pattern):
            pattern = f"{pattern[: match.start()]}{{expert}}{pattern[match.end() :]}"
            expert = int(match[0]) + first_expert
        for row in (*self.first, *self.layers, *self.last):
            if (
                pattern in row.megatron
                and (layer is None or layer < self.num_layers)
                and (expert is None or expert < row.experts)
            ):
                return Entry(row, layer, expert)
        raise ValueError(f"{name}: not a parameter of {self.model_type} in megasd/weights/tables")

    def entries(self) -> Iterator[Entry]:
        """Every parameter of the whole model, in the order of the forward pass."""
        yield from (Entry(row, None) for row in self.first)
        for layer in range(self.num_layers):
            yield from entries_of(self.layers, layer)
        yield from (Entry(row, None) for row in self.last)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face folder with its shape, in the order of `entries`."""
        return {
            name: tensor.shape
            for entry in self.entries()
            if entry.row.exported
            for name, tensor in zip(entry.hf_names(), entry.row.hf, strict=True)
        }


def entries_of(rows: tuple[Row, ...], layer: int) -> Iterator[Entry]:
    """The parameters of one layer; those of an expert stand together."""
    yield from (Entry(row, layer) for row in rows if not row.experts)
    experts = [row for row in rows if row.experts]
    for expert in range(experts[0].experts if experts else 0):
        yield from (Entry(row, layer, expert) for row in experts)


def required(hf_config: Mapping[str, Any], key: str) -> Any:
    """`hf_config[key]`; nothing about a model is guessed."""
    if hf_config.get(key) is None:
        raise ValueError(f"model.path: config.json lacks `{key}`; add it")
    return hf_config[key]
