"""How long a save keeps the training waiting, against Megatron's own save and its async one.

    python tools/bench_checkpoint.py                     # a Qwen3 of 63M parameters, one rank
    python tools/bench_checkpoint.py --ranks 2 --json    # the last line is one JSON object

Gloo ranks on a CPU, data parallel, float32 weights and Adam. A save begins between two optimizer
steps on the same batch, and steps follow until it is complete. The variants take turns, each time
in fresh processes, for a fork changes what memory costs after it; the first of three saves of a
process warms up and is not counted. Medians of all others, of the slower rank.

    megasd            Checkpoints.save_if_due: plan and copy, then threads write
    megatron          dist_checkpointing.save of the same state, as Megatron-LM calls it by default:
                      torch_dist, shards spread over the data-parallel ranks; forked writers
    megatron async    the same with async_sharded_save and Megatron's AsyncCallsQueue, which forks a
                      process; what it asks of CUDA is answered by policy/megatron/cpu.py. It copies
                      nothing that lies in host memory already: on a CPU the fork is its copy, and
                      the pages that the next step writes are copied then, one by one

`waits`: what the training stands still for, the end of the save included; `state` of it goes into
the sharded state dict, which is the policy's own for all. `step`: a step while it is written, over
a quiet one. `lost`: by how much later the training ends, by waits and slower steps. `complete`:
from the start until the checkpoint can be loaded; only ours has then been read back for its
checksums.

All force .distcp files and .metadata to disk (fsync). Ours also does common.pt, metadata.json,
manifest.json and the folders, which Megatron leaves to the system; they are kilobytes.

Last, what a restore costs: the check of every byte, and the load after it and without it. Files are
dropped from the page cache before the check and before the load alone, if the system lets go.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from bench_sync import MALLOC

from megasd.testing.ranks import Ranks

VARIANTS = ("megasd", "megatron", "megatron async")
LAST_FILE = "metadata.json"  # of Megatron's saves
SAVES = 2  # counted, of each process
EVERY = 1000  # steps from save to save; one is complete long before

Figures = dict[str, list[float]]  # of one rank, save by save


def main() -> None:
    os.environ.update(MALLOC)  # the ranks start with them
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of a step's batch")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each variant")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    runs: dict[str, list[list[Figures]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        fresh(1, make_model, folder, args.hidden, args.layers)
        for _ in range(args.repeats):
            for variant in VARIANTS:
                runs[variant].append(fresh(args.ranks, measure, folder, variant, args.tokens))
    report(runs, args.ranks, as_json=args.json)


def fresh(ranks: int, case: Callable[..., Any], *args: Any) -> Any:
    """The results of `case(*args)` on ranks that start for it and end."""
    group = Ranks(ranks, timeout_seconds=1800)
    try:
        return group.run(case, *args, world_size=ranks)
    finally:
        group.close()


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """FOLDER/model: random weights of Qwen3's proportions."""
    from megasd.testing.tiny import tiny_qwen3

    sizes = {"heads": hidden // 64, "kv_heads": hidden // 128, "intermediate": 3 * hidden}
    tiny_qwen3(folder / "model", hidden=hidden, layers=layers, head_dim=128, **sizes)


def measure(folder: Path, variant: str, tokens: int) -> Figures:
    """On every rank: figures of saves, and of restoring what we wrote."""
    import torch.distributed as dist

    from megasd.policy import backend

    training = Training(folder / "model", tokens, backend.start("cpu"))
    policy, saves = training.policy, folder / "saves"
    if dist.get_rank() == 0:
        shutil.rmtree(saves, ignore_errors=True)
        saves.mkdir()
        os.sync()  # nobody pays for what another wrote
    dist.barrier()
    if variant == "megasd":
        save = Ours(policy, saves)
    else:
        save = Peer(policy, saves / "peer", is_async=variant == "megatron async")
    training.around(save)
    figures = by_name([training.around(save) for _ in range(SAVES)])
    figures["bytes"] = [sum(file.stat().st_size for file in save.folder.iterdir())]
    figures["parameters"] = [sum(parameter.numel() for parameter in policy.parameters.values())]
    if variant == "megasd":
        restore(policy, save.folder)  # the first faults its memory in
        figures |= by_name([restore(policy, save.folder) for _ in range(SAVES)])
    return figures


def by_name(rows: Sequence[dict[str, float]]) -> Figures:
    return {name: [row[name] for row in rows] for name in rows[0]}


class Training:
    """A policy and one batch of two responses per rank."""

    def __init__(self, model: Path, tokens: int, started: Any) -> None:
        import torch
        import torch.distributed as dist

        from megasd.algorithms.sft import SFT
        from megasd.losses.config import MismatchConfig
        from megasd.policy.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
        from megasd.policy.policy import Policy
        from megasd.types import ResponseBatch, View

        self.policy = Policy(
            model=ModelConfig(path=str(model), dtype="float32"),
            parallel=ParallelConfig(),
            optimizer=OptimizerConfig(lr=1e-6, max_tokens_per_microbatch=tokens),
            teacher=TeacherConfig(),
            backend=started,
            temperature=1.0,
            mismatch=MismatchConfig(level="off"),
            total_steps=10 * EVERY,
            seed=0,
        )
        count, length = 2 * dist.get_world_size(), tokens // 4
        ids = np.arange(1, length + 1)
        self.views = [View(prompt_ids=ids, response_ids=ids) for _ in range(count)]
        self.offsets = np.arange(count + 1) * length
        self.algorithm = SFT()
        self.batch = ResponseBatch(
            rewards=torch.zeros(count),
            is_correct=torch.zeros(count, dtype=torch.bool),
            group_ids=torch.arange(count),
            minibatch_ids=torch.zeros(count, dtype=torch.int64),
            rollout_ids=torch.repeat_interleave(torch.arange(count), length),
            response_mask=torch.ones(count * length, dtype=torch.bool),
            max_response_tokens=length,
        )
        self.credit = self.algorithm.assign_credit(self.batch, 0)

    def step(self) -> float:
        """Seconds of an optimizer step."""
        began = time.perf_counter()
        self.policy.update(
            self.views, self.offsets, self.batch, self.credit, self.algorithm, minibatch=0
        )
        return time.perf_counter() - began

    def around(self, save: "Save") -> dict[str, float]:
        """Quiet steps, a save, steps until it is complete everywhere, and one more."""
        import torch.distributed as dist

        quiet = statistics.median(self.step() for _ in range(3))
        save.prepare()
        dist.barrier()
        started, began = time.time(), time.perf_counter()
        save.begin()
        waits = time.perf_counter() - began
        busy: list[float] = []
        while not save.is_complete:
            busy.append(self.step())
            began = time.perf_counter()
            save.look()
            waits += time.perf_counter() - began
        after = self.step()  # after a fork its pages are faulted in again
        return {
            "waits": waits,
            "step": statistics.mean(busy) / quiet if busy else 0.0,
            "lost": waits + sum(busy) + after - (len(busy) + 1) * quiet,
            "complete": save.completed_at() - started,
            "quiet": quiet,
        }


class Save(Protocol):
    """One way to save, again and again; all ranks call it."""

    @property
    def folder(self) -> Path:
        """The checkpoint, when it is complete."""
        ...

    def prepare(self) -> None:
        """Before the clock starts."""
        ...

    def begin(self) -> None:
        """Ends when the training may go on."""
        ...

    def look(self) -> None:
        """After every step until it is complete."""
        ...

    @property
    def is_complete(self) -> bool:
        """The same on every rank."""
        ...

    def completed_at(self) -> float:
        """As `time.time()` counts."""
        ...


class Ours:
    """`Checkpoints` of a run that saves every EVERY steps."""

    def __init__(self, policy: Any, folder: Path) -> None:
        from megasd.checkpoint.checkpoints import Checkpoints
        from megasd.checkpoint.config import CheckpointConfig
        from megasd.data.prompts import Prompts
        from megasd.types import Prompt

        prompts = Prompts([Prompt(index=0, messages=(), token_ids=np.arange(3))], seed=0)
        config = CheckpointConfig(every=EVERY, keep=1)
        self._checkpoints = Checkpoints(config, folder, policy, prompts)
        self._saves = 0

    @property
    def folder(self) -> Path:
        from megasd.checkpoint.checkpoints import newest

        found = newest(self._checkpoints.folder)
        assert found is not None, "a save was begun and is complete"
        return found

    def prepare(self) -> None:
        self._saves += 1

    def begin(self) -> None:
        self._checkpoints.save_if_due(EVERY * self._saves - 1, last=False)

    def look(self) -> None:
        self._checkpoints.save_if_due(EVERY * self._saves, last=False)

    @property
    def is_complete(self) -> bool:
        return self._checkpoints._writing is None

    def completed_at(self) -> float:
        return self.folder.stat().st_ctime  # when it was renamed


class Peer:
    """Megatron's save, as Megatron-LM calls it."""

    def __init__(self, policy: Any, folder: Path, *, is_async: bool) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self.folder = folder
        self._policy, self._is_async = policy, is_async
        self._calls = AsyncCallsQueue()

    def prepare(self) -> None:
        import torch.distributed as dist

        if dist.get_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()

    def begin(self) -> None:
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )

        from megasd.checkpoint.model_state import sharded_state

        data_parallel: Any = parallel_state.get_data_parallel_group()
        request = dist_checkpointing.save(
            sharded_state(self._policy, loading=False),
            str(self.folder),
            FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), data_parallel),
            async_sharded_save=self._is_async,
        )
        if request is not None:
            self._calls.schedule_async_request(request)

    def look(self) -> None:
        self._calls.maybe_finalize_async_calls()

    @property
    def is_complete(self) -> bool:
        return self._calls.get_num_unfinalized_calls() == 0

    def completed_at(self) -> float:
        return (self.folder / LAST_FILE).stat().st_mtime


def restore(policy: Any, folder: Path) -> dict[str, float]:
    """Seconds from the disk: the check, the load after it, and the load alone; and of a state."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megasd.checkpoint.manifest import look_at_files, share_of, wrong_checksums
    from megasd.checkpoint.model_state import restore_state, sharded_state

    def check() -> None:
        files, wrong, _ = look_at_files(folder)
        assert not wrong, wrong
        share = share_of(files, dist.get_rank(), dist.get_world_size())
        wrong, trouble = wrong_checksums(folder, files, share)
        assert not wrong, wrong
        assert not trouble, trouble

    def load() -> None:
        loaded: Any = dist_checkpointing.load(sharded_state(policy, loading=True), str(folder))
        restore_state(policy, loaded)

    def seconds(work: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - began

    state = seconds(lambda: sharded_state(policy, loading=False))
    forget(folder)
    check_seconds, load_after = seconds(check), seconds(load)
    forget(folder)
    return {
        "state": state,
        "check": check_seconds,
        "load after it": load_after,
        "load alone": seconds(load),
    }


def forget(folder: Path) -> None:
    """Asks the system to drop its pages of the files; they are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(runs: dict[str, list[list[Figures]]], ranks: int, *, as_json: bool) -> None:
    figures = {
        variant: {
            key: statistics.median(
                float(value)
                for results in repeats
                for value in np.max([rank[key] for rank in results], axis=0)
            )
            for key in repeats[0][0]
        }
        for variant, repeats in runs.items()
    }
    ours, peer, _ = (figures[variant] for variant in VARIANTS)
    gigabytes = ours["bytes"] / 1e9
    print(
        f"{ours['parameters'] / 1e6:.0f}M parameters, {gigabytes:.2f} GB, {ranks} ranks, "
        f"{SAVES * len(runs['megasd'])} saves; a quiet step {ours['quiet']:.2f} s, state "
        f"{ours['state']:.2f} s"
    )
    print(f"{'':16}{'waits, s':>10}{'complete, s':>13}{'GB/s':>7}{'step':>8}{'lost, s':>10}")
    for variant, of in figures.items():
        slower = f"{of['step']:.2f}x" if of["step"] else "-"
        print(
            f"{variant:16}{of['waits']:10.2f}{of['complete']:13.2f}"
            f"{gigabytes / of['complete']:7.2f}{slower:>8}{of['lost']:10.2f}"
        )
    keys = ("check", "load after it", "load alone")
    print("restore: " + ", ".join(f"{key} {ours[key]:.2f} s" for key in keys))
    print(f"wait_ratio={ours['waits'] / peer['waits']:.3f}")
    if as_json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
