"""From config to this rank's engine."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megasd.process import together
from megasd.rollout.config import RolloutConfig
from megasd.rollout.engine import RolloutEngine
from megasd.rollout.placement import Gpu, Seat, check_gpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_engine(
    config: RolloutConfig,
    seating: Mapping[int, Seat],  # every rank that takes part in an engine
    *,
    folder: str | Path,  # model.path
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    device: torch.device,
    hf_shapes: Mapping[str, tuple[int, ...]],
    max_tokens: int,  # of a prompt and its response
    run_folder: Path,
) -> RolloutEngine | None:
    """The engine that `rollout.engine` names, on the ranks that have a seat; called by all ranks.

    Each engine's library is imported only when it is chosen.
    """
    seat = seating.get(dist.get_rank())
    group = _engine_group(seating)
    if seat is None:
        return None
    if config.engine == "hf":
        from megasd.rollout.hf import HFEngine

        return HFEngine(folder, tokenizer, dtype=dtype, device=device, batch_size=config.batch_size)
    from megasd.rollout.vllm.engine import VLLMEngine

    if device.type == "cuda" and config.vllm.placement == "colocated":  # every rank has a seat
        check_gpus(seating, together.from_every_rank(_own_gpu(device)))
    return VLLMEngine(
        config.vllm,
        folder,
        tokenizer,
        dtype=dtype,
        device=device,
        hf_shapes=hf_shapes,
        max_tokens=max_tokens,
        run_folder=run_folder,
        name=f"engine{seat.number}",
        rank_in_engine=seat.rank,
        engine_size=seat.size,
        group=group,
    )


def _own_gpu(device: torch.device) -> Gpu:
    from megasd.rollout.vllm.options import visible_device

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return Gpu(socket.gethostname(), uuid, visible_device(device))


def _engine_group(seating: Mapping[int, Seat]) -> dist.ProcessGroup | None:
    """The group of the ranks that share this rank's engine, for objects; None for one rank.

    All ranks make all groups in one order, so that none can wait for another that is never made.
    They wait in it while the owner starts the engine.
    """
    mine: Any = None  # typed as a group or a number by torch
    for number in sorted({seat.number for seat in seating.values() if seat.size > 1}):
        ranks = sorted(rank for rank, seat in seating.items() if seat.number == number)
        group = together.patient_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine
