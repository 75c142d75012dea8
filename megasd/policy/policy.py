"""The policy that the loop sees: score, update, teacher, weights. Rooms behind it do the work."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from megasd.algorithms.base import Algorithm
from megasd.losses.config import MismatchConfig
from megasd.policy.backend import Backend
from megasd.policy.build import build_optimizer, build_scheduler, start_parallel, wrap
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megasd.policy.load import load_model
from megasd.policy.score import score
from megasd.policy.sequences import assign_owners
from megasd.policy.state import ModelState, PolicyState
from megasd.policy.teacher import TeacherWeights
from megasd.policy.update import UpdateResult, update
from megasd.types import Credit, Reads, ResponseBatch, Scores, View
from megasd.weights.reshard import ReshardPlan, full_tensors

REFERENCE = TeacherConfig(weights="frozen")


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
        roles: Sequence[str] = (),
    ) -> None:
        """Build, read the weights from `model.path`, make the optimizer for `total_steps` steps.

        `roles` are those that `score_teacher` will be asked for: their weights are kept.
        """
        self.temperature = temperature
        self.mismatch = mismatch
        self.backend = backend
        self.layout = start_parallel(parallel, backend, seed)
        loaded = load_model(Path(model.path), model, self.layout, backend)
        self.hf_config, self.table = loaded.hf_config, loaded.table
        self.parameters = dict(loaded.gpt.named_parameters())
        self._plan = ReshardPlan(self.table, self.layout.tp_size, self.layout.pp_size)
        ddp = wrap(loaded.gpt)
        built = build_optimizer(ddp, optimizer)
        sizes = {
            "max_tokens_per_microbatch": optimizer.max_tokens_per_microbatch,
            "head_chunk_tokens": model.head_chunk_tokens,
        }
        self.state = PolicyState(
            layout=self.layout,
            device=backend.device,
            gpt=loaded.gpt,
            vocab_size=self.hf_config["vocab_size"],
            ddp=ddp,
            optimizer=built,
            scheduler=build_scheduler(built, optimizer, total_steps),
            **sizes,
        )
        self.teacher = TeacherWeights(teacher, self.parameters)
        # Read anew from `model.path` in every start of a run: no checkpoint holds it.
        self._reference = (
            TeacherWeights(REFERENCE, self.parameters) if "reference" in roles else None
        )
        self._other_model: ModelState | None = None
        if teacher.weights == "checkpoint":
            assert teacher.path is not None, "validated"
            other = load_model(Path(teacher.path), model, self.layout, backend)
            self._other_model = ModelState(
                layout=self.layout,
                device=backend.device,
                gpt=other.gpt,
                vocab_size=other.hf_config["vocab_size"],
                **sizes,
            )
        self.version = 0  # optimizer steps that changed the weights
        self.skipped_steps = 0  # optimizer steps whose gradient was not finite

    def score(
        self,
        views: Sequence[View | None],
        offsets: np.ndarray,
        *,
        reads: Reads | None = None,
        owners: np.ndarray | None = None,
    ) -> Scores:
        """Log-probs and entropy of the student; tokens of a None view are 0."""
        return self._score(self.state, views, offsets, reads, owners)

    def score_teacher(
        self,
        role: str,
        views: Sequence[View | None],
        offsets: np.ndarray,
        *,
        reads: Reads | None = None,
        owners: np.ndarray | None = None,
    ) -> Scores:
        """The same under the weights of a teacher's role."""
        if self._other_model is not None and role != "reference":
            return self._score(self._other_model, views, offsets, reads, owners)
        weights = self._reference if role == "reference" else self.teacher
        assert weights is not None, f"the policy was not told of role {role}"
        with weights.swapped_in():
            return self._score(self.state, views, offsets, reads, owners)

    def _score(
        self,
        state: ModelState,
        views: Sequence[View | None],
        offsets: np.ndarray,
        reads: Reads | None,
        owners: np.ndarray | None,
    ) -> Scores:
        return score(
            state, views, offsets, temperature=self.temperature, reads=reads, owners=owners
        )

    def assign_owners(self, lengths: Sequence[int], minibatch_ids: Sequence[int]) -> np.ndarray:
        """The data-parallel rank of each rollout, for passes that leave values behind."""
        return assign_owners(lengths, minibatch_ids, num_ranks=self.layout.dp_size)

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
