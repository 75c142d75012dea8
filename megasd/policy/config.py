"""Config sections of the policy: model, parallel layout, teacher weights, optimizer."""

from dataclasses import dataclass
from typing import Literal

Layers = Literal["auto", "local", "transformer_engine"]
Recipe = Literal["blockwise", "tensorwise", "delayed"]


@dataclass(frozen=True)
class FP8Config:
    """`model.fp8:` layers that multiply in float8, on GPUs; weights and all else stay bfloat16."""

    recipe: Recipe = "blockwise"
    # blockwise: scales of 128 x 128 weights and of 128 activations; tensorwise: of a tensor;
    # delayed: of a tensor, from the micro-batches before
    train: bool = True  # the update's forward and backward passes
    score: bool = True  # the passes before it: student, teachers, reference
    first_last_bf16: int = 0  # layers at either end that stay bfloat16
    meter_every: int = (
        10  # steps between two comparisons with bfloat16, logged as fp8/...; 0: never
    )


@dataclass(frozen=True)
class ModelConfig:
    """`model:` the Hugging Face folder that the policy starts from."""

    path: str = "???"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of compute; the optimizer keeps float32
    max_context_tokens: int | None = None  # prompt + response; null: max_position_embeddings
    recompute: Literal["none", "full"] = "none"  # full: keep one activation per layer
    layers: Layers = "auto"  # transformer_engine: on GPUs; auto: that where it is installed
    # Tokens whose logits exist at the same time; null: 4096 on GPUs, 1024 on a CPU. Each chunk
    # reads and writes the sums of 8192 rows of the head's gradient: fewer chunks, less of that.
    head_chunk_tokens: int | None = None
    fp8: FP8Config | None = None

    def head_chunk_tokens_on(self, device_type: str) -> int:
        """`head_chunk_tokens`, or its default on cuda or cpu."""
        if self.head_chunk_tokens is not None:
            return self.head_chunk_tokens
        return 4096 if device_type == "cuda" else 1024


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel:` how the model is cut. What is left of the world size is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False  # activations between tensor-parallel regions are cut along tokens
    expert: int = 1  # ranks that share the experts of a layer; they are data parallel otherwise
    expert_tensor: int | None = (
        None  # ranks that share one expert; null: 1, without `expert` tensor
    )
    timeout_seconds: int = 1800  # of a collective, before the run is declared dead

    @property
    def ranks_per_expert(self) -> int:
        """`expert_tensor`, or its default."""
        if self.expert_tensor is not None:
            return self.expert_tensor
        return self.tensor if self.expert == 1 else 1


@dataclass(frozen=True)
class TeacherConfig:
    """`teacher:` the weights that read the privileged context."""

    weights: Literal["live", "snapshot", "ema", "frozen", "checkpoint"] = "live"
    every: int = 10  # snapshot: steps between copies
    decay: float = 0.99  # ema: phi <- decay phi + (1 - decay) theta, once per batch
    path: str | None = None  # checkpoint: the folder of another model with the same vocabulary


@dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer:` AdamW, its schedule, and how a batch becomes optimizer steps."""

    lr: float = 1e-6
    min_lr: float = 0.0  # where cosine and linear lead: one step after the last
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after `warmup_steps`
    warmup_steps: int = 0  # optimizer steps; the k-th is at lr k / warmup_steps
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0  # 0: no clipping; a non-finite norm or loss always skips the step
    max_skipped_in_a_row: int = 5  # skipped optimizer steps, then the run stops; 0: never
    minibatches_per_step: int = 1  # optimizer steps per rollout batch
    max_tokens_per_microbatch: int = 16384  # of one forward pass; whole sequences only
