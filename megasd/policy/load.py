"""A Hugging Face folder as this rank's part of a Megatron model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megasd.policy.backend import Backend
from megasd.policy.config import ModelConfig
from megasd.policy.megatron.build import DTYPES, HeadlessGPT, Layout, build_model
from megasd.weights.hf_folder import HFFolder, load_parameter, read_hf_config
from megasd.weights.layout import rank_experts, stage_layers
from megasd.weights.tables import config_faults, table_for
from megasd.weights.tables.table import Entry, Row, Table
from megasd.weights.values import strange_values


class LoadedModel(NamedTuple):
    """This rank's stage with its weights, and what the folder says of the whole."""

    gpt: HeadlessGPT
    hf_config: Mapping[str, Any]
    table: Table


@torch.no_grad()
def load_model(path: Path, model: ModelConfig, layout: Layout, backend: Backend) -> LoadedModel:
    """Each rank reads only its slices; config, names and shapes are checked first."""
    hf_config = read_hf_config(path)
    if asked := config_faults(hf_config, f"{path}/config.json"):
        raise ValueError("; ".join(asked))
    table = table_for(hf_config)
    gpt = build_model(hf_config, model, layout, backend)
    folder, dtype = HFFolder(path), DTYPES[model.dtype]
    folder.check(table)
    layers = stage_layers(table.num_layers, layout.pp_rank, layout.pp_size)
    experts = rank_experts(table.num_experts, layout.ep_rank, layout.ep_size)
    for name, parameter in gpt.named_parameters():
        entry = table.find(name, layers.start, experts.start)
        tensor_rank = layout.etp_rank if entry.row.experts else layout.tp_rank
        ways = layout.sizes.ways(entry.row)
        parameter.copy_(load_parameter(folder, entry, tensor_rank, ways, dtype))
        if problem := strange_values(parameter):
            raise ValueError(
                f"model.path: {path}: {_culprit(folder, entry)} {problem}, which no weight of a "
                "model is; copy the folder again, or choose another checkpoint"
            )
        _mark(parameter, entry.row)
    return LoadedModel(gpt, hf_config, table)


def _culprit(folder: HFFolder, entry: Entry) -> str:
    """Which of the tensors that make up a parameter is meant."""
    names = entry.hf_names()
    return next((n for n in names if strange_values(folder.get_slice(n)[:])), " or ".join(names))


def _mark(parameter: Any, row: Row) -> None:
    """What Megatron reads off a parameter; its layers set it for some layouts only.

    tensor_model_parallel: the gradient norm counts the parameter on every tensor-parallel rank,
    not on the first only. Whatever piece of an expert a rank's optimizer holds, no other does.
    allreduce: False sums the gradient over the ranks that hold the same expert, and keeps the
    parameter in an optimizer of its own. Megatron does so for `expert` above 1 only; a checkpoint
    loads in every layout because experts stand apart in every layout.
    """
    parameter.tensor_model_parallel = row.kind != "replicated"
    parameter.allreduce = not row.experts
