"""A Hugging Face folder as this rank's part of a Megatron model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megasd.policy.backend import Backend
from megasd.policy.build import DTYPES, HeadlessGPT, Layout, build_model
from megasd.policy.config import ModelConfig
from megasd.weights.hf_folder import HFFolder, load_parameter, read_hf_config
from megasd.weights.layout import stage_layers
from megasd.weights.tables import table_for
from megasd.weights.tables.table import Table


class LoadedModel(NamedTuple):
    """This rank's stage with its weights, and what the folder says of the whole."""

    gpt: HeadlessGPT
    hf_config: Mapping[str, Any]
    table: Table


@torch.no_grad()
def load_model(path: Path, model: ModelConfig, layout: Layout, backend: Backend) -> LoadedModel:
    """Each rank reads only its slices; names and shapes are checked against the table first."""
    hf_config = read_hf_config(path)
    table = table_for(hf_config)
    gpt = build_model(hf_config, model, layout, backend)
    folder, dtype = HFFolder(path), DTYPES[model.dtype]
    folder.check(table)
    layers = stage_layers(table.num_layers, layout.pp_rank, layout.pp_size)
    for name, parameter in gpt.named_parameters():
        row, layer = table.find(name, first_layer=layers[0])
        local = load_parameter(folder, row, layer, layout.tp_rank, layout.tp_size, dtype)
        parameter.copy_(local)
        # Megatron's gradient norm counts a parameter on every tensor-parallel rank, or on the
        # first only, by this mark; its layers set it while they draw random weights, which
        # ours never do.
        parameter.tensor_model_parallel = row.kind != "replicated"  # pyright: ignore
    return LoadedModel(gpt, hf_config, table)
