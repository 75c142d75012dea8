"""The policy that the loop sees: score, update, teacher, weights. Rooms behind it do the work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megasd.algorithms.base import Algorithm
from megasd.losses.config import MismatchConfig
from megasd.policy.backend import Backend
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megasd.policy.load import load_model
from megasd.policy.megatron.buckets import buckets_of
from megasd.policy.megatron.build import build_optimizer, start_parallel, wrap
from megasd.policy.parking import Parking, gradients, optimizer_state
from megasd.policy.schedule import learning_rate
from megasd.policy.score import score
from megasd.policy.sequences import assign_owners
from megasd.policy.state import ModelState, PolicyState
from megasd.policy.teacher import TeacherWeights
from megasd.policy.update import UpdateResult, update
from megasd.types import Credit, PerToken, Reads, ResponseBatch, Scores, View
from megasd.weights.bucket import Bucket
from megasd.weights.reshard import DEFAULT_BUCKET_BYTES, ReshardPlan, reshard

REFERENCE = TeacherConfig(weights="frozen")


class Policy:
    """A model that learns, cut over the ranks; every method is called by all of them."""

    _is_gathered = True  # the parameters are on all ranks what the last step made them

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
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        receivers: int = 1,
        parks: bool = False,
    ) -> None:
        """Build, read the weights from `model.path`, make the optimizer for `total_steps` steps.

        `roles` are those that `score_teacher` will be asked for: their weights are kept.
        `parks`: whether `park` is to do anything.
        `bucket_bytes` and `receivers` are those of the `ReshardPlan` that feeds the engines.
        """
        self.seed = seed
        self.temperature = temperature
        self.mismatch = mismatch
        self.backend = backend
        self.layout = start_parallel(parallel, backend, seed)
        loaded = load_model(Path(model.path), model, self.layout, backend)
        self.hf_config, self.table = loaded.hf_config, loaded.table
        self.parameters = dict(loaded.gpt.named_parameters())
        sizes = self.layout.sizes
        self._plan = ReshardPlan(self.table, sizes, bucket_bytes=bucket_bytes, receivers=receivers)
        self._whole = ReshardPlan(self.table, sizes, bucket_bytes=bucket_bytes)
        ddp = wrap(loaded.gpt)
        built = build_optimizer(ddp, optimizer)
        limits = {
            "max_tokens_per_microbatch": optimizer.max_tokens_per_microbatch,
            "head_chunk_tokens": model.head_chunk_tokens_on(backend.device.type),
            "fp8": model.fp8,
        }
        self.state = PolicyState(
            layout=self.layout,
            device=backend.device,
            gpt=loaded.gpt,
            vocab_size=self.hf_config["vocab_size"],
            ddp=ddp,
            optimizer=built,
            **limits,
        )
        self.buckets = buckets_of(ddp)
        self.teacher = TeacherWeights(teacher, self.buckets)
        self._reference = self._initial_weights() if "reference" in roles else None
        self._other_model = (
            self._load_other(teacher, model, limits) if teacher.weights == "checkpoint" else None
        )
        self._parking = Parking(pinned=backend.is_cuda) if parks else None
        self._learning_rate = partial(learning_rate, optimizer, total_steps=total_steps)
        self.version = 0  # optimizer steps that changed the weights: the place in the schedule
        self.skipped_steps = 0  # optimizer steps whose loss or gradient was not finite

    def _initial_weights(self) -> TeacherWeights:
        """Read anew from `model.path` in every start of a run: no checkpoint holds them."""
        if self.teacher.config.weights == "frozen":
            return self.teacher
        return TeacherWeights(REFERENCE, self.buckets)

    def _load_other(
        self, teacher: TeacherConfig, model: ModelConfig, limits: Mapping[str, Any]
    ) -> ModelState:
        """The teacher's own model, cut like the policy."""
        assert teacher.path is not None, "validated"
        other = load_model(Path(teacher.path), model, self.layout, self.backend)
        return ModelState(
            layout=self.layout,
            device=self.backend.device,
            gpt=other.gpt,
            vocab_size=other.hf_config["vocab_size"],
            **limits,
        )

    def score(
        self,
        views: Sequence[View | None],
        offsets: np.ndarray,
        *,
        reads: Reads | None = None,
        owners: np.ndarray | None = None,
    ) -> Scores:
        """Log-probs and entropy of the student; tokens of a None view are 0."""
        return score(
            self.state, views, offsets, temperature=self.temperature, reads=reads, owners=owners
        )

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
        scores = self.score_teachers(
            {role: views}, offsets, reads={} if reads is None else {role: reads}, owners=owners
        )
        return scores[role]

    def score_teachers(
        self,
        views: Mapping[str, Sequence[View | None]],
        offsets: np.ndarray,
        *,
        reads: Mapping[str, Reads],
        owners: np.ndarray | None = None,
    ) -> dict[str, Scores]:
        """The same of several roles; those with the same weights are read while these are there."""
        found: dict[str, Scores] = {}
        weights = {role: self._weights_of(role) for role in views}
        for kept in dict.fromkeys(weights.values()):
            other = self._other_model if kept is self.teacher else None
            with kept.swapped_in():
                for role in (role for role in views if weights[role] is kept):
                    found[role] = score(
                        other or self.state,
                        views[role],
                        offsets,
                        temperature=self.temperature,
                        reads=reads.get(role),
                        owners=owners,
                        weights_stay=kept.stay or other is not None,
                    )
        return {role: found[role] for role in views}

    def _weights_of(self, role: str) -> TeacherWeights:
        weights = self._reference if role == "reference" else self.teacher
        assert weights is not None, f"the policy was not told of role {role}"
        return weights

    def park(self) -> None:
        """Until `unpark`, gradients, the optimizer's state and what is kept of teachers take none
        of the device's memory. The weights stay: they can be sent, and read with."""
        if self._parking is None or self.is_parked:
            return
        other = self._other_model.gpt.parameters() if self._other_model is not None else ()
        kept = [*self.teacher.kept, *(self._reference.kept if self._reference else ())]
        self._parking.park(
            keep=[*optimizer_state(self.state), *kept, *(p.detach() for p in other)],
            drop=gradients(self.state),
        )

    @property
    def is_parked(self) -> bool:
        return self._parking is not None and self._parking.is_full

    def unpark(self) -> None:
        """Everything is as it was; gradients are 0."""
        if self._parking is not None:
            self._parking.restore()

    def score_plainly(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs [T - 1] at temperature 1 of every token but the first of each [T] sequence."""
        views = [View(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in sequences]
        offsets = np.cumsum([0, *(len(view.response_ids) for view in views)])
        scores = score(self.state, views, offsets, temperature=1.0)
        return np.split(scores.logprobs.cpu().numpy(), offsets[1:-1])

    def score_in_both(
        self, views: Sequence[View | None], offsets: np.ndarray
    ) -> tuple[PerToken, PerToken]:
        """The student's log-probs with its layers in float8 and in bfloat16."""
        assert self.state.fp8 is not None, "the policy has no other precision"
        both = (replace(self.state.fp8, score=True), None)
        in_float8, plain = (
            score(replace(self.state, fp8=fp8), views, offsets, temperature=self.temperature)
            for fp8 in both
        )
        return in_float8.logprobs, plain.logprobs

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
        """One optimizer step over mini-batch `minibatch` of the batch.

        Nobody may read the parameters before the last one of the batch, but by a forward pass.
        """
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
            lr=self._learning_rate(self.version + 1),
        )
        self.skipped_steps += result.skipped
        self.version += result.outcome == "stepped"
        self._is_gathered &= result.outcome == "empty"
        if not self._is_gathered and minibatch >= int(batch.minibatch_ids.max()):
            self.state.ddp.start_param_sync(force_sync=True)
            self._is_gathered = True
        return result

    def weight_buckets(self, *, whole: bool = False, takes: bool = True) -> Iterator[Bucket]:
        """Full Hugging Face tensors, collective: what engines read, on every rank that takes them.

        Where engines cut their experts over ranks, each rank gets its share of them only;
        `whole`: every tensor on every rank, as exports need.
        """
        plan = self._whole if whole else self._plan
        return reshard(plan, self.parameters, self.layout.place, takes=takes)
