"""Cases of the vLLM engine that need several trainer ranks."""

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megasd.weights.bucket import Bucket
from tests.rollout.vllm_models import (
    buckets_of,
    check_greedy,
    greedy_requests,
    make_engine,
    weights_of,
)


def feed_own_worker(folders: list[Path], run_folder: Path) -> list[str]:
    """Two trainer ranks, each with a channel to one of the two workers of an engine on a server."""
    rank = dist.get_rank()
    engine = make_engine(
        folders[0],
        run_folder,
        placement="server",
        tensor=2,
        rank_in_engine=rank,
        engine_size=2,
        group=dist.new_group([0, 1], timeout=timedelta(seconds=300)),
    )
    errors = []
    try:
        for version, folder in enumerate(folders):
            engine.load_weights(buckets_of(weights_of(folder)), version)
            if rank == 0:
                check_greedy(folder, engine.generate(greedy_requests()), version)

        def flip(bucket: Bucket) -> None:
            bucket.flat[0] += 1

        engine.tamper = flip if rank == 1 else None
        try:
            engine.load_weights(buckets_of(weights_of(folders[0])), version=2)
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}")
    finally:
        engine.close()
    return errors
