"""What megatron-core 0.16 gets wrong for us: one named function per fault, each with a test.

Three concern the distributed optimizer: one whatever Adam it is over, two over torch's AdamW, which
Megatron falls back to when neither Transformer Engine nor apex is there; with their FusedAdam these
two do nothing. Three concern experts: two of them without Transformer Engine or on a CPU, one
everywhere. One each concerns the memory of rotary embeddings, what Transformer Engine may fuse, and
parameters that are gathered beside a forward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer


def define_te_general_gemm() -> None:
    """Without Transformer Engine the router asks for a function whose import failed: NameError."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # what it means by "not there"


def count_tokens_to_send_on_a_cpu() -> None:
    """Give all-to-all the split sizes as numbers where they never were on a GPU.

    Megatron turns them into numpy while it copies them off the GPU, and leaves tensors, which
    all-to-all refuses, where there is nothing to copy.
    """
    real: Any = moe_utils.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return real(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move


def forget_routing_after_use(gpt: torch.nn.Module) -> None:
    """Free the routing of each layer with experts when nothing but its backward pass needs it.

    The all-to-all dispatcher keeps it until it routes again, and by the probabilities' graph a
    recomputed layer's input and that input's gradient, long after both were used.
    """
    for layer in gpt.modules():
        if isinstance(layer, MoELayer):
            layer.register_forward_hook(_forget_routing)


def _forget_routing(layer: MoELayer, *_: Any) -> None:
    dispatcher: Any = layer.token_dispatcher
    dispatcher.probs = dispatcher.routing_map = None
    dispatcher.reversed_local_input_permutation_mapping = None


def ask_for_few_rotary_lengths(gpt: GPTModel) -> None:
    """Ask for rotary embeddings of 1,024, 2,048, 4,096, ... positions only.

    Megatron keeps the embeddings of the last 32 lengths that it was asked for, and the longest
    sequence of nearly every micro-batch is another. Transformer Engine's kernel reads no rows
    beyond its sequences; Megatron's own function takes as many rows as the micro-batch has tokens
    for another thing, positions that run on from one sequence to the next: not for local layers.
    """
    rotary: Any = gpt.rotary_pos_emb
    length = rotary.get_rotary_seq_len
    rotary.get_rotary_seq_len = lambda *args, **kwargs: rotary_length(length(*args, **kwargs))


def rotary_length(longest: int) -> int:
    """The next power of two, from 1,024 on."""
    return max(1024, 1 << (longest - 1).bit_length())


def let_weight_gradients_be_accumulated() -> None:
    """Let `gradient_accumulation_fusion` be set where Transformer Engine has the layers.

    Its matrix products add to `main_grad` by themselves. Megatron asks for apex's kernel all the
    same, on behalf of the output layer: it is Megatron's own, and never runs in a HeadlessGPT.
    """
    layers._grad_accum_fusion_available = True


def has_apex_accumulation() -> bool:
    """Whether Megatron's own layers can add to `main_grad` by apex's kernel."""
    return layers._grad_accum_fusion_available


def wait_for_gathered_parameters_once(ddp: DistributedDataParallel) -> None:
    """Ask a bucket that is gathered for nothing more.

    Megatron's hook asks for every parameter of every module, in every forward pass, and each time
    the bucket looks through all its parameters for some in float8, of which we have none: on the
    later stages of a pipeline, whose parameters are one bucket, a square of their number.
    """
    for bucket in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
        finish: Any = bucket.finish_param_sync

        def finish_once(*args: Any, bucket: Any = bucket, finish: Any = finish, **kw: Any) -> None:
            if not bucket.param_gather_dispatched or bucket.param_gather_handle is not None:
                finish(*args, **kw)

        bucket.finish_param_sync = finish_once


def _adams(optimizer: ChainedOptimizer) -> Iterator[torch.optim.Adam]:
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one
            yield part.optimizer


def allocate_adam_state(optimizer: ChainedOptimizer) -> None:
    """Give Adam its state before the first step.

    Megatron's `state_dict` and `load_state_dict` assume that it exists: without, torch's AdamW
    cannot be saved before a step, and FusedAdam saves no moments, which cannot be loaded. What
    Megatron would call for it leaves out the `step` of torch's AdamW.
    """
    for part in optimizer.chained_optimizers:
        fused: Any = part.optimizer
        if fused is not None and not isinstance(fused, torch.optim.Adam):
            part.init_state_fn(fused, part.config)
    for adam in _adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def leave_step_out_of_parameter_state(optimizer: ChainedOptimizer) -> None:
    """Keep AdamW's 0-dimensional `step` out of the per-parameter tensors of a checkpoint.

    Megatron flattens and cuts every entry of the state like the parameter itself; `step` travels
    in the param groups anyway.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer) or not isinstance(
            part.optimizer, torch.optim.Adam
        ):
            continue
        get: Any = part._get_main_param_and_optimizer_states
        write = part._set_main_param_and_optimizer_states

        def get_without(parameter: Any, get: Any = get) -> dict[str, Any]:
            return {name: value for name, value in get(parameter).items() if name != "step"}

        def write_without(
            parameter: Any, tensors: Any, part: Any = part, write: Any = write
        ) -> None:
            group, place = part.model_param_group_index_map[parameter]
            state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
            write(parameter, {**tensors, "step": state["step"]})

        instance: Any = part
        instance._get_main_param_and_optimizer_states = get_without
        instance._set_main_param_and_optimizer_states = write_without


def unshare_step(optimizer: ChainedOptimizer) -> None:
    """After loading, give every parameter its own `step`.

    Megatron puts one tensor in the state of all parameters, and AdamW adds 1 to it once for each.
    """
    for adam in _adams(optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()
