"""Writing a checkpoint beside the training: the ranks plan and copy, a thread of each writes.

What Megatron's `dist_checkpointing.save` does in one go, in three parts. `stage` ends with copies
in host memory that no later step changes; the thread writes, forces to disk and checksums this
rank's files; the first rank's thread, once all have, writes what describes them and renames the
folder. The threads talk over a process group of their own, so a checkpoint is complete as soon as
it is written, whatever the ranks are doing by then.
"""

import functools
import io
import queue
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megasd.checkpoint.manifest import MANIFEST_FILE, Files, describe, write_manifest
from megasd.process import together
from megasd.process.durable import force_to_disk
from megasd.process.waiting import waiting_for

_COMMON_FILE = "common.pt"
_FORMAT = ("torch_dist", 1)

# A queue of Megatron's writer that would cost a process for each rank; here nobody uses it.
filesystem_async._get_write_results_queue = lambda: None


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's plan of who writes which shard; the writing is ours."""

    writer: Any
    metadata: Any  # of the whole checkpoint, on the first rank

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """What this rank has to write: copies, and Megatron's plan."""

    plan: _Plan
    buckets: list[Any]  # one per file: (path, name, (byte items, tensor items))
    common: bytes  # what is not sharded, on the first rank


class Shared:
    """Who writes what several ranks hold alike: each of them a part, the same in every save."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """`ranks`: those that hold what this one holds. Called by all ranks."""
        self._group: dist.ProcessGroup | None = None
        self._distribution: ShardDistribution | None = None
        for members in sorted(set(together.from_every_rank(tuple(ranks)))):
            group = together.patient_group(members) if len(members) > 1 else None
            if dist.get_rank() in members:
                self._group = group

    def spread(self, shards: dict[str, Any]) -> None:
        """Marks as written here what this rank is to write, and the rest as written elsewhere."""
        if self._group is None:
            return
        if self._distribution is None:  # the ranks tell each other what they hold
            self._distribution = determine_main_replica_uniform_distribution(shards, self._group)
        distribute_main_replicas_with_precomputed_distribution(
            shards, self._group, self._distribution
        )


def stage(
    state: dict[str, Any], folder: Path, *, shared: Shared, is_cuda: bool, validate: bool
) -> Staged:
    """Plan and copy; called by all ranks, and `folder` exists.

    Weights are `shared`; of the optimizer each rank holds a part of its own. `validate`: that each
    shard is saved once. Every rank hears of all shards for it.
    """
    sharded: Any
    sharded, common = save_preprocess(state, validate_access_integrity=validate)
    shared.spread({name: sharded[name] for name in ("model", "teacher") if name in sharded})
    plan = _Plan(*_FORMAT)
    plan.async_save(sharded, folder)
    copy = functools.partial(torch.Tensor.to, device="cpu", non_blocking=is_cuda, copy=True)
    buckets = [
        (path, name, (items, [(item, copy(tensor)) for item, tensor in tensors]))
        for path, name, (items, tensors) in plan.writer.write_buckets
    ]
    if is_cuda:
        torch.cuda.synchronize()
    plan.writer.write_buckets = None  # it refers to the tensors that were copied
    own = _as_bytes(common) if dist.get_rank() == 0 else b""
    return Staged(plan=plan, buckets=buckets, common=own)


def _as_bytes(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


class Writing:
    """A checkpoint on its way to the disk: started by all ranks, at once on each."""

    def __init__(
        self, staged: Staged, partial: Path, group: dist.ProcessGroup, publish: Callable[[], None]
    ) -> None:
        """`publish` runs on the first rank when all is on the disk, and gives it its name."""
        self.failure: str | None = "the writer has not finished"  # None: all went well
        self._staged: Staged | None = staged
        self._partial = partial
        self._group = group
        self._publish = publish
        self._thread = threading.Thread(target=self._run, name="megasd-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, *, patiently: bool) -> None:
        """`patiently`: as long as it takes; on all ranks at once, for the watchdog's sake."""
        with waiting_for(lambda: f"the files of {self._partial}", may_take_long=patiently):
            self._thread.join()

    def _run(self) -> None:
        try:
            self.failure = self._write_together()
        except BaseException as error:  # a rank is gone, say: the thread has nobody to tell
            self.failure = f"rank {dist.get_rank()}: {in_words(error)}"
        if self.failure is not None and dist.get_rank() == 0:  # make room at once
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write_together(self) -> str | None:
        """What went wrong on any rank."""
        staged, self._staged = self._staged, None
        assert staged is not None
        results, files, failure = [], {}, None
        try:
            results, files = _write(staged, self._partial)
        except Exception as error:
            failure = in_words(error)
        said = together.to_first_rank((results, files, failure), self._group)
        outcome = None if said is None else self._finish(staged.plan, said)
        return together.from_first_rank(outcome, self._group)

    def _finish(self, plan: _Plan, said: list[Any]) -> str | None:
        """On the first rank, when every rank has written: what went wrong, or None."""
        if failures := [f"rank {i}: {one[2]}" for i, one in enumerate(said) if one[2] is not None]:
            return "; ".join(failures)
        try:
            plan.writer.finish(plan.metadata, [results for results, _, _ in said])
            save_config(CheckpointingConfig(*_FORMAT), str(self._partial))
            files = {name: entry for _, files, _ in said for name, entry in files.items()}
            rest = [p.name for p in self._partial.iterdir() if p.name not in files]
            write_manifest(self._partial, files | describe(self._partial, rest))
            force_to_disk(*(self._partial / name for name in (*rest, MANIFEST_FILE)), self._partial)
            self._publish()
        except Exception as error:
            return f"rank 0: {in_words(error)}"
        return None


def _write(staged: Staged, folder: Path) -> tuple[list[Any], Files]:
    """This rank's files, on the disk: Megatron's account of them, and ours."""
    if dist.get_rank() == 0:
        (folder / _COMMON_FILE).write_bytes(staged.common)
    results: list[Any] = []
    files: Files = {}
    with ThreadPoolExecutor(max(1, len(staged.buckets))) as threads:
        for written, described in threads.map(
            functools.partial(_write_file, staged), staged.buckets
        ):
            results += written
            files |= described
    return results, files


def _write_file(staged: Staged, bucket: Any) -> tuple[list[Any], Files]:
    """One of them, by Megatron's writer; it ends with fsync."""
    writer, results, place = staged.plan.writer, queue.SimpleQueue(), queue.Queue()
    place.put(0)
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    # Unwrapped: the wrapper keeps the garbage collector of the whole process off.
    write = type(writer).write_preloaded_data.__wrapped__
    write(transforms, 0, bucket, results, place, use_fsync=True)
    _, written = results.get_nowait()
    if isinstance(written, Exception):
        _let_go(written)
        raise OSError(in_words(written))
    path, name, _ = bucket
    return written, describe(Path(path).parent, [name])


def _let_go(error: BaseException | None) -> None:
    """Drops the frames of an error, and what they hold.

    Megatron's writer keeps its error in a frame of the error's own traceback: together they would
    hold this rank's copies, and torch's half-written file, until the garbage collector comes by.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # a frame leads to its callers, and what they hold
        error = error.__context__


def in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__
