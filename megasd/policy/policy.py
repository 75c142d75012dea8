"""The policy that the loop sees: score, update, teacher, weights. Rooms behind it do the work."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megasd.algorithms.base import Algorithm
from megasd.losses.config import MismatchConfig
from megasd.policy.backend import Backend
from megasd.policy.build import (
    DTYPES,
    build_model,
    build_optimizer,
    build_scheduler,
    start_parallel,
    wrap,
)
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megasd.policy.score import score
from megasd.policy.state import PolicyState
from megasd.policy.teacher import TeacherWeights
from megasd.policy.update import UpdateResult, update
from megasd.types import Credit, ResponseBatch, Scores, View
from megasd.weights.hf_folder import HFFolder, load_parameter, read_hf_config
from megasd.weights.layout import stage_layers
from megasd.weights.reshard import ReshardPlan, full_tensors
from megasd.weights.tables import table_for


class Policy:
    """A model that learns, cut over the ranks; every method is called by all of them."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        teacher: TeacherConfig,
        backend: Backend,
        temperature: float,
        mismatch: MismatchConfig,
        total_steps: int,
        seed: int,
    ) -> None:
        """Build, read the weights from `model.path`, make the optimizer for `total_steps` steps."""
        self.temperature = temperature
        self.mismatch = mismatch
        self.backend = backend
        folder = Path(model.path)
        hf_config = read_hf_config(folder)
        self.hf_config = hf_config
        self.table = table_for(hf_config)
        self.layout = start_parallel(parallel, backend, seed)
        self._plan = ReshardPlan(self.table, self.layout.tp_size, self.layout.pp_size)
        gpt = build_model(hf_config, model, self.layout, backend)
        self.parameters = dict(gpt.named_parameters())
        self._read_weights(HFFolder(folder), DTYPES[model.dtype])
        ddp = wrap(gpt)
        built = build_optimizer(ddp, optimizer)
        self.state = PolicyState(
            layout=self.layout,
            device=backend.device,
            gpt=gpt,
            ddp=ddp,
            optimizer=built,
            scheduler=build_scheduler(built, optimizer, total_steps),
            vocab_size=hf_config["vocab_size"],
            max_tokens_per_microbatch=optimizer.max_tokens_per_microbatch,
            head_chunk_tokens=model.head_chunk_tokens,
        )
        self.teacher = TeacherWeights(teacher, self.parameters)
        self.version = 0  # optimizer steps that changed the weights
        self.skipped_steps = 0  # optimizer steps whose gradient was not finite

    @torch.no_grad()
    def _read_weights(self, folder: HFFolder, dtype: torch.dtype) -> None:
        """Each rank reads only its slices; names and shapes are checked against the table first."""
        folder.check(self.table)
        layers = stage_layers(self.table.num_layers, self.layout.pp_rank, self.layout.pp_size)
        for name, parameter in self.parameters.items():
            row, layer = self.table.find(name, first_layer=layers[0])
            local = load_parameter(
                folder, row, layer, self.layout.tp_rank, self.layout.tp_size, dtype
            )
            parameter.copy_(local)
            # Megatron's gradient norm counts a parameter on every tensor-parallel rank, or on the
            # first only, by this mark; its layers set it while they draw random weights, which
            # ours never do.
            parameter.tensor_model_parallel = row.kind != "replicated"  # pyright: ignore

    def score(self, views: Sequence[View | None], offsets: np.ndarray) -> Scores:
        """Log-probs and entropy of the student; tokens of a None view are 0."""
        return score(self.state, views, offsets, temperature=self.temperature)

    def score_teacher(self, views: Sequence[View | None], offsets: np.ndarray) -> Scores:
        """The same under the teacher's weights."""
        with self.teacher.swapped_in():
            return self.score(views, offsets)

    def update(
        self,
        views: Sequence[View | None],
        offsets: np.ndarray,
        batch: ResponseBatch,
        credit: Credit,
        algorithm: Algorithm,
        *,
        minibatch: int,
    ) -> UpdateResult:
        """One optimizer step over mini-batch `minibatch` of the batch."""
        result = update(
            self.state,
            views,
            offsets,
            batch,
            credit,
            algorithm,
            minibatch=minibatch,
            temperature=self.temperature,
            mismatch=self.mismatch,
        )
        self.skipped_steps += result.skipped
        self.version += not result.skipped
        return result

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (Hugging Face name, full tensor), on every rank: what engines and exports read."""
        return full_tensors(
            self._plan,
            {name: parameter.detach() for name, parameter in self.parameters.items()},
            tp_group=self.layout.tp_group,
            pp_group=self.layout.pp_group,
            tp_rank=self.layout.tp_rank,
            pp_rank=self.layout.pp_rank,
        )
