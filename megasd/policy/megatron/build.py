"""From a config to this rank's part of the model: process groups, layers, DDP, optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megasd.policy.backend import Backend
from megasd.policy.checks import UNEVEN, gathers_unevenly
from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig
from megasd.policy.float8 import megatron_options
from megasd.policy.megatron.fixes import (
    allocate_adam_state,
    ask_for_few_rotary_lengths,
    count_tokens_to_send_on_a_cpu,
    define_te_general_gemm,
    forget_routing_after_use,
    has_apex_accumulation,
    leave_step_out_of_parameter_state,
    let_weight_gradients_be_accumulated,
    wait_for_gathered_parameters_once,
)
from megasd.policy.megatron.optimizer_shards import save_ranges_as_boxes
from megasd.policy.megatron.rope import rope_arguments
from megasd.policy.megatron.spec import layer_spec
from megasd.weights.layout import Sizes
from megasd.weights.reshard import Place
from megasd.weights.tables import table_for

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """This rank's coordinates, and the groups it talks to."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    stage_rank: int  # among all ranks of the pipeline stage, in Megatron's order
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup  # ep x etp ranks, etp innermost
    sequence_parallel: bool

    @property
    def stage_size(self) -> int:
        return self.tp_size * self.dp_size

    @property
    def sizes(self) -> Sizes:
        """How many ways the model is cut, for the tables of weights."""
        return Sizes(tp=self.tp_size, pp=self.pp_size, ep=self.ep_size, etp=self.etp_size)

    @property
    def place(self) -> Place:
        """Where this rank stands among those that hold one copy of the model."""
        return Place(
            tp=self.tp_rank,
            pp=self.pp_rank,
            expert=self.ep_rank * self.etp_size + self.etp_rank,
            stage=self.stage_rank,
            tp_group=self.tp_group,
            pp_group=self.pp_group,
            expert_group=self.expert_group,
        )

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks(self) -> bool:
        """True on the one rank of each data-parallel replica that reports per-token values."""
        return self.is_last_stage and self.tp_rank == 0


def start_parallel(parallel: ParallelConfig, backend: Backend, seed: int) -> Layout:
    """Megatron's process groups; torch.distributed is initialised already.

    Raises ValueError for what `gathers_unevenly` on a CPU.
    """
    if not backend.is_cuda and gathers_unevenly(parallel):
        raise ValueError(UNEVEN)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.ranks_per_expert,
        distributed_timeout_minutes=max(1, parallel.timeout_seconds // 60),
        create_gloo_process_groups=False,  # only Megatron's own checkpoints of optimizers use them
    )
    model_parallel_cuda_manual_seed(seed)
    groups: Any = parallel_state  # typed as groups or lists of groups
    layout = Layout(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=groups.get_expert_model_parallel_rank(),
        ep_size=groups.get_expert_model_parallel_world_size(),
        etp_rank=groups.get_expert_tensor_parallel_rank(),
        etp_size=groups.get_expert_tensor_parallel_world_size(),
        stage_rank=dist.get_rank() % (dist.get_world_size() // parallel.pipeline),
        tp_group=groups.get_tensor_model_parallel_group(),
        pp_group=groups.get_pipeline_model_parallel_group(),
        expert_group=groups.get_expert_tensor_and_model_parallel_group(),
        sequence_parallel=parallel.sequence,
    )
    assert dist.get_rank(layout.expert_group) == layout.place.expert, "etp is not innermost"
    return layout


def transformer_config(
    hf_config: Mapping[str, Any], model: ModelConfig, layout: Layout, backend: Backend
) -> TransformerConfig:
    """A Hugging Face config.json in Megatron's words."""
    dtype = DTYPES[model.dtype]
    fused = backend.transformer_engine
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    table, heads = table_for(hf_config), hf_config["num_attention_heads"]
    return TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config["num_key_value_heads"],
        kv_channels=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        ffn_hidden_size=hf_config["intermediate_size"],
        layernorm_epsilon=hf_config["rms_norm_eps"],
        normalization="RMSNorm",
        qk_layernorm=table.qk_norm,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Every parameter is read from the checkpoint: nothing to initialise.
        perform_initialization=False,
        use_cpu_initialization=not backend.is_cuda,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        sequence_parallel=layout.sequence_parallel,
        # Told otherwise, stages ask each other for each shape and wait for the device to answer.
        variable_seq_lengths=False,
        moe_token_dispatcher_type="alltoall",  # micro-batches of two ranks may differ in length
        # Law 2: a token's weight already holds the global denominator, so gradients are summed.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused or (backend.is_cuda and has_apex_accumulation()),
        deterministic_mode=backend.deterministic,
        **recompute,
        **(megatron_options(model.fp8) if model.fp8 else {}),
        **(
            _expert_config(hf_config, table.num_experts, layout, fused) if table.num_experts else {}
        ),
    )


def _expert_config(
    hf_config: Mapping[str, Any], num_experts: int, layout: Layout, fused: bool
) -> dict[str, Any]:
    """The part of `transformer_config` that only a model with experts has.

    No load balancing: in RL its gradient would compete with the reward's.
    """
    return {
        "num_moe_experts": num_experts,
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.etp_size,
        "moe_router_topk": hf_config["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf_config["moe_intermediate_size"],
        # transformers normalises the chosen probabilities, which is a softmax over the chosen.
        "moe_router_pre_softmax": not hf_config.get("norm_topk_prob", False),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


class HeadlessGPT(GPTModel):
    """A GPT whose last stage returns final hidden states; policy/head/head.py reads them.

    The output layer's weight is there (and is trained, saved, tied), but never multiplied here:
    full logits never exist.
    """

    wait_for: Callable[[Tensor], None] | None = None  # a parameter that may not be gathered yet

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """[V / tp, H]: this rank's rows of the output layer, the embedding's when they are tied."""
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        assert weight is not None, "only the last stage has a head"
        if self.wait_for is not None:
            self.wait_for(weight)
        return weight


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tp_size) * tp_size


def build_model(
    hf_config: Mapping[str, Any], model: ModelConfig, layout: Layout, backend: Backend
) -> HeadlessGPT:
    """This rank's stage of the model on its device; the parameters' values are arbitrary."""
    config = transformer_config(hf_config, model, layout, backend)
    if backend.transformer_engine:
        let_weight_gradients_be_accumulated()
    if config.num_moe_experts:
        define_te_general_gemm()
        if not backend.is_cuda:
            count_tokens_to_send_on_a_cpu()
    spec: Any = layer_spec(config, transformer_engine=backend.transformer_engine, vp_stage=None)
    gpt = HeadlessGPT(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocabulary(hf_config["vocab_size"], layout.tp_size),
        max_sequence_length=hf_config["max_position_embeddings"],
        position_embedding_type="rope",
        **rope_arguments(hf_config),
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
    )
    config.fp8 = None  # from here on, where a pass switches it on
    forget_routing_after_use(gpt)
    if backend.transformer_engine:
        ask_for_few_rotary_lengths(gpt)
    return gpt.to(backend.device)


def wrap(gpt: HeadlessGPT) -> DistributedDataParallel:
    """Gradient buffers in float32, summed over the data-parallel ranks once per optimizer step.

    Bucket by bucket, beside the last backward pass of the step (stages of a pipeline that wait for
    the first: after it). Every parameter that learns must have a gradient in every backward pass.
    After a step the parameters are gathered by the next forward pass, as it comes to them. Who
    reads them in another way gathers them first: `ddp.start_param_sync(force_sync=True)`.
    """
    ddp = DistributedDataParallel(
        gpt.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        gpt,
    )

    wait_for_gathered_parameters_once(ddp)

    def wait_for(parameter: Tensor) -> None:
        if bucket := ddp.param_to_bucket_group.get(parameter):  # it learns
            bucket.finish_param_sync()

    gpt.wait_for = wait_for
    gpt.config.no_sync_func, gpt.config.grad_sync_func = ddp.no_sync, ddp.start_grad_sync
    # The token counts that Megatron would divide by are already in the token weights.
    gpt.config.finalize_model_grads_func = lambda model, _num_tokens, **kwargs: (
        finalize_model_grads(model, None, **kwargs)
    )
    return ddp


def build_optimizer(ddp: DistributedDataParallel, optimizer: OptimizerConfig) -> ChainedOptimizer:
    """AdamW with float32 master weights, its state cut over the data-parallel ranks.

    Norms and biases (one-dimensional parameters) are not decayed, as Megatron does.
    """
    config: TransformerConfig = ddp.config
    built = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad_norm,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    assert isinstance(built, ChainedOptimizer)
    allocate_adam_state(built)
    leave_step_out_of_parameter_state(built)
    save_ranges_as_boxes(built)
    for group in built.param_groups:  # what Megatron leaves to its scheduler, which we do without
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    config.grad_scale_func = built.scale_loss
    return built
