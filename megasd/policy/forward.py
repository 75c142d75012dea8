"""One packed forward pass: micro-batch in, final hidden states out."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megasd.policy.megatron.build import Layout
from megasd.policy.sequences import Microbatch


def hidden_states(model: torch.nn.Module, microbatch: Microbatch) -> Tensor:
    """Run this rank's layers: [T, 1, H] (T / tp rows under sequence parallelism)."""
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=microbatch.sequence_starts,
        cu_seqlens_kv=microbatch.sequence_starts,
        max_seqlen_q=microbatch.longest_sequence,
        max_seqlen_kv=microbatch.longest_sequence,
    )
    return model(
        input_ids=microbatch.token_ids[None],
        position_ids=microbatch.position_ids[None],
        attention_mask=None,
        packed_seq_params=packed,
    )


def rows_read(hidden: Tensor, microbatch: Microbatch, layout: Layout) -> Tensor:
    """The final hidden states [n, H] that predict the targets. Prompt tokens cost nothing here."""
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden[:, 0].index_select(0, microbatch.rows)


def run(
    model: torch.nn.Module,
    microbatches: Sequence[Microbatch],
    finish: Callable[[Tensor, Microbatch], Any],
    *,
    backward: bool,
    device: torch.device,
) -> list[Any]:
    """Run micro-batches through Megatron's pipeline schedule.

    `finish(hidden, microbatch)` is called on the last stage. Forward only, it returns anything;
    with `backward` it returns (loss, anything), and the losses are summed, never averaged.
    Returns what it returned, in order, on the last stage; an empty list elsewhere.
    Between stages of a pipeline all micro-batches have one length (`ModelState.pack`).
    """
    config: Any = model.config
    lengths = {len(microbatch.token_ids) for microbatch in microbatches}
    assert len(lengths) == 1 or config.pipeline_model_parallel_size == 1

    def step(batches: Iterator[Microbatch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch = next(batches).to(device)

        def loss(hidden: Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                return finish(hidden, microbatch)
            value, rest = finish(hidden, microbatch)
            return value, torch.ones((), dtype=torch.int, device=device), rest

        return hidden_states(stage, microbatch), loss

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=max(lengths),  # of what one stage gives the next
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
