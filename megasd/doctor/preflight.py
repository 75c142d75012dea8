"""Whether the ranks of a job can work together: run by all of them, before the run itself.

Every rank says what it has; the first rank compares, measures links with all-reduces, and names
the rank or node that is unlike the others, slow, or blind to the run's folder. Each test is over
in seconds; a rank that does not come at all is named when `ARRIVAL_SECONDS` are over.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megasd.doctor.machine import (
    Facts,
    Finding,
    check_folder,
    check_gpus,
    check_transformer_engine,
    gather_facts,
)
from megasd.planner.hardware import GB, GPUS

ARRIVAL_SECONDS = 120  # some nodes start a container or import torch much later than others
NODES = "MEGASD_NODES"  # by a job script: names of the nodes with commas, in the order of the ranks
VISIBLE_SECONDS = 5.0
LINK_SECONDS = 15  # of one all-reduce, before the link is called broken
REPEATS = 5
REACHED = 0.4  # of the published bandwidth: less than this of a link is a fault
SLOWER = 0.5  # than this share of the median node, where no expectation is known
ACROSS = "to other nodes"
PAYLOAD = {"cuda": 256 * 2**20, "cpu": 2**20}  # bytes of an all-reduce

Measure = Callable[[Any, Sequence[int], torch.device], float]


@dataclass(frozen=True, kw_only=True)
class Node:
    """The ranks of one host, in order."""

    host: str
    ranks: list[int]


def all_reduce_bandwidth(group: Any, ranks: Sequence[int], device: torch.device) -> float:
    """Bytes per second through the narrowest place of an all-reduce, as NCCL's tests count them.

    The median of a few; raises RuntimeError where the sum is wrong.
    """
    count = PAYLOAD[device.type] // 4
    seconds = []
    for _ in range(REPEATS + 1):  # the first one connects
        values = torch.ones(count, device=device)
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        _finish(device)
        seconds.append(time.perf_counter() - start)
        if float(values.amin()) != len(ranks) or float(values.amax()) != len(ranks):
            raise RuntimeError(f"an all-reduce over ranks {list(ranks)} gives a wrong sum")
    median = sorted(seconds[1:])[REPEATS // 2]
    return 2 * (len(ranks) - 1) / len(ranks) * count * 4 / median


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def preflight(
    own: Facts,
    folder: Path,
    device: torch.device,
    *,
    expected_network: float | None = None,
    measure: Measure = all_reduce_bandwidth,
) -> list[Finding]:
    """Every finding about the ranks of the default group: collective, the same on all of them.

    `expected_network`: bytes per second of one GPU to other nodes; None: the published figure of
    the GPU, and without one only comparisons between nodes.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    nodes = nodes_of(everyone)
    findings = [Finding("ok", f"{len(everyone)} ranks on {len(nodes)} nodes answer")]
    findings += check_layout_of(nodes)
    findings += differences(everyone)
    findings += _about_each_node(everyone)
    findings += _folder(own, everyone, folder)
    ranks_per_node = min(len(node.ranks) for node in nodes)
    within, across = expectations(own, expected_network, ranks_per_node)
    findings += _links(own, nodes, device, measure, within, across)
    return findings


def nodes_of(everyone: Sequence[Facts]) -> list[Node]:
    """In the order of their first ranks."""
    by_host: dict[str, list[int]] = {}
    for facts in everyone:
        by_host.setdefault(facts.host, []).append(facts.rank)
    return [Node(host=host, ranks=ranks) for host, ranks in by_host.items()]


def check_layout_of(nodes: Sequence[Node]) -> list[Finding]:
    """All nodes have as many ranks, with consecutive numbers."""
    usual = Counter(len(node.ranks) for node in nodes).most_common(1)[0][0]
    found = [
        Finding("wrong", f"node {n.host}: {len(n.ranks)} ranks, the others have {usual}")
        for n in nodes
        if len(n.ranks) != usual
    ]
    return found + [
        Finding(
            "wrong",
            f"node {n.host}: its ranks {n.ranks} are not consecutive; start them node by node "
            "(srun --distribution=block), or tensor parallelism leaves the node",
        )
        for n in nodes
        if n.ranks != list(range(n.ranks[0], n.ranks[0] + len(n.ranks)))
    ]


def differences(everyone: Sequence[Facts]) -> list[Finding]:
    """What is not the same everywhere: the few are named, the many are taken to be right."""
    found = []
    said = [facts.comparable() for facts in everyone]
    for name in sorted({name for one in said for name in one}):
        values = [one.get(name, "unseen") for one in said]
        usual = Counter(values).most_common(1)[0][0]
        odd: dict[tuple[str, str], list[int]] = {}
        for facts, value in zip(everyone, values, strict=True):
            if value != usual:
                odd.setdefault((facts.host, value), []).append(facts.rank)
        found += [
            Finding("wrong", f"node {host} ({_ranks(ranks)}): {name} {value}, elsewhere {usual}")
            for (host, value), ranks in odd.items()
        ]
    return found or [Finding("ok", "GPUs, driver and versions are the same everywhere")]


def _about_each_node(everyone: Sequence[Facts]) -> list[Finding]:
    """What each machine says about its own GPUs, where it is not good."""
    first = {facts.host: facts for facts in reversed(everyone)}
    if all(facts.gpus is None and not facts.visible_gpus for facts in first.values()):
        return [Finding("unseen", "no node shows GPUs: memory, clocks and ECC")]
    bad = [
        Finding(finding.level, f"node {host}: {finding.sentence}")
        for host, facts in sorted(first.items(), key=lambda item: item[1].rank)
        for finding in (*check_gpus(facts), *check_transformer_engine(facts))
        if finding.level != "ok"
    ]
    return bad or [Finding("ok", "GPUs have free memory, no ECC errors, and are not slowed")]


def _folder(own: Facts, everyone: Sequence[Facts], folder: Path) -> list[Finding]:
    """Whether all ranks read in `folder` what the first one wrote, and can write there."""
    made, first = not folder.exists(), [None, f".megasd-preflight-{uuid.uuid4().hex}"]
    if own.rank == 0:
        first[0] = _wrong(check_folder(folder))
        if first[0] is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / first[1]).touch()
    dist.broadcast_object_list(first)
    fault, token = first[0], folder / str(first[1])
    if fault is not None:
        return [Finding("wrong", f"node {everyone[0].host} (rank 0): {fault}")]
    if _appears(token):
        problem = _wrong(check_folder(folder))
    else:
        problem = f"{folder} is not the folder that rank 0 sees; mount the shared one"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # all have looked: the token may go
    if own.rank == 0:
        token.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # somebody has put something into it
                folder.rmdir()
    by_node: dict[tuple[str, str], list[int]] = {}
    for facts, said in zip(everyone, problems, strict=True):
        if said is not None:
            by_node.setdefault((facts.host, said), []).append(facts.rank)
    return [
        Finding("wrong", f"node {host} ({_ranks(ranks)}): {said}")
        for (host, said), ranks in by_node.items()
    ] or [Finding("ok", f"{folder} is visible and can be written on every node")]


def _wrong(findings: Sequence[Finding]) -> str | None:
    return next((finding.sentence for finding in findings if finding.level == "wrong"), None)


def _appears(file: Path) -> bool:
    """A network file system may show a file of another node seconds late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# ---- links -----------------------------------------------------------------------------------


def expectations(
    own: Facts, network: float | None, ranks_per_node: int
) -> tuple[float | None, float | None]:
    """Bytes per second that an all-reduce must reach within a node, and between nodes.

    `network`: of one GPU to other nodes. What all ranks of a node exchange with the next one goes
    through all of its adapters at once, and it is what the bandwidth of an all-reduce counts: the
    bytes that pass the narrowest place, 2 (n - 1) / n of the payload. So a node reaches the sum of
    its adapters, unless the links between its GPUs are slower. None: not known, nodes are compared.
    CPUs must only work: their speed is a matter of what else they run.
    """
    if not own.gpus:
        return 0.0, (network or 0.0) * REACHED
    words = own.gpus[0].name.replace("-", " ").split()
    # Of boards without NVSwitch nothing is expected: what they reach depends on their host.
    is_board = "PCIe" in words or "NVL" in words
    gpu = None if is_board else next((gpu for key, gpu in GPUS.items() if key in words), None)
    within = None if gpu is None else gpu.nvlink_bandwidth
    across = network or (None if gpu is None else gpu.network_bandwidth)
    if across is not None and (gpu is not None or any(word.startswith("SXM") for word in words)):
        across = min(across * ranks_per_node, within or float("inf"))
    return within and within * REACHED, across and across * REACHED


def _links(
    own: Facts,
    nodes: Sequence[Node],
    device: torch.device,
    measure: Measure,
    within: float | None,
    across: float | None,
) -> list[Finding]:
    """All nodes by themselves at once; then neighbours in a ring, two at a time."""
    alone = _measured(own, [node.ranks for node in nodes], device, measure)
    by_node = {i: alone[i] for i in range(len(nodes))}
    findings = slow_nodes(nodes, by_node, within, "within the node")
    if len(nodes) == 1:
        return findings
    best: dict[int, float] = {}
    for pairs in ring_rounds(len(nodes)):
        groups = [nodes[a].ranks + nodes[b].ranks for a, b in pairs]
        for (a, b), speed in zip(pairs, _measured(own, groups, device, measure), strict=True):
            for node in (a, b):  # a good node has at least one good neighbour
                best[node] = max(best.get(node, 0.0), speed)
    return findings + slow_nodes(nodes, best, across, ACROSS)


def ring_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Neighbours of a ring of nodes in rounds of disjoint pairs: each node meets both of its own.

    Of an odd ring the last node meets its second neighbour in a round of its own.
    """
    if count == 2:
        return [[(0, 1)]]
    pairs = [(i, (i + 1) % count) for i in range(count)]
    rounds = [pairs[0 : count - 1 : 2], pairs[1::2]]
    if count % 2:
        rounds = [pairs[0 : count - 1 : 2], pairs[1 : count - 1 : 2], pairs[count - 1 :]]
    return rounds


def _measured(
    own: Facts, groups: Sequence[Sequence[int]], device: torch.device, measure: Measure
) -> list[float]:
    """Of each group at the same time, as its slowest rank sees it; known to all ranks."""
    mine, speed = None, 0.0
    limit = timedelta(seconds=LINK_SECONDS)
    made = [dist.new_group(list(ranks), timeout=limit) for ranks in groups]  # by all, in one order
    for number, (ranks, group) in enumerate(zip(groups, made, strict=True)):
        if own.rank in ranks:
            mine, speed = number, float("inf")
            if len(ranks) > 1:
                try:
                    speed = measure(group, ranks, device)
                except RuntimeError:  # a wrong sum, a broken link, a partner that hangs
                    speed = 0.0
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (mine, speed))
    for group in made:
        if isinstance(group, dist.ProcessGroup):  # else this rank has no part in it
            dist.destroy_process_group(group)
    return [min(value for place, value in said if place == i) for i in range(len(groups))]


def slow_nodes(
    nodes: Sequence[Node], speeds: Mapping[int, float], expected: float | None, where: str
) -> list[Finding]:
    """Nodes below the expectation; without one, those far behind the median."""
    real = sorted(speed for speed in speeds.values() if speed < float("inf"))
    if not real:
        return [Finding("unseen", f"bandwidth {where}: each node has one rank")]
    median = real[len(real) // 2]
    limit = SLOWER * median if expected is None else expected
    compared = "the median" if expected is None else "expected"
    compared += f" is {(median if expected is None else expected) / GB:.2f}"
    slow = {place: speed for place, speed in sorted(speeds.items()) if speed < limit or not speed}
    remedy = "take the node out of the job"
    if len(slow) == len(speeds) > 1 and all(slow.values()) and where == ACROSS:
        remedy = (
            "all are: mend their network, or say what it is in network_gb_per_second of the site"
        )
    found = [
        Finding(
            "wrong",
            f"node {nodes[place].host}: all-reduce {where} "
            + (f"at {speed / GB:.2f} GB/s, {compared}" if speed else "fails or hangs")
            + f"; {remedy}",
        )
        for place, speed in slow.items()
    ]
    unsure = " (no expectation is known: nodes are compared)" if expected is None else ""
    return found or [Finding("ok", f"all-reduce {where}: {real[0] / GB:.2f} GB/s or more{unsure}")]


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


# ---- joining -------------------------------------------------------------------------------


def join(device: torch.device, *, rank: int, world_size: int) -> list[Finding]:
    """Initialises torch.distributed; if ranks do not arrive, says which instead."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun keeps the store of this address itself.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=ARRIVAL_SECONDS)
    own = f"rank {rank} on {node_name()}"
    try:
        store: Any = TCPStore(host, port, is_master=hosts, wait_for_workers=False, timeout=limit)
    except (dist.DistError, RuntimeError) as error:
        return [Finding("wrong", f"{own} cannot reach rank 0 at {host}:{port}: {error}")]
    store = PrefixStore("megasd-preflight", store)
    store.set(f"rank{rank}", own)
    if rank == 0:
        store.set("missing", json.dumps(_missing(store, world_size)))
    try:
        store.wait(["missing"], 2 * limit)
        missing = json.loads(store.get("missing"))
    except (dist.DistError, RuntimeError) as error:
        return [Finding("wrong", f"{own} cannot reach rank 0 any more: {error}")]
    if missing:
        if rank == 0:
            time.sleep(1)  # the store goes with this rank, and the others read it
        return absent(missing, world_size)
    # A collective that hangs raises instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    return []


def node_name() -> str:
    """As the cluster knows it, which may not be the host's own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def absent(missing: Sequence[int], world_size: int) -> list[Finding]:
    """Ranks that did not come, by node where the job script says which nodes it has."""
    nodes, size = os.environ.get(NODES, ""), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    late = f"did not arrive in {ARRIVAL_SECONDS} seconds; look at"
    if not nodes:
        ranks = f"{_ranks(missing)} of {world_size}"
        return [Finding("wrong", f"{ranks} {late} the nodes that should run them")]
    by_node: dict[str, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes.split(",")[rank // size], []).append(rank)
    return [
        Finding("wrong", f"node {node}: its {_ranks(ranks)} of {world_size} {late} it")
        for node, ranks in by_node.items()
    ]


def _missing(store: Any, world_size: int) -> list[int]:
    deadline = time.monotonic() + ARRIVAL_SECONDS
    missing = list(range(world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"rank{rank}"])]
        if missing:
            time.sleep(0.1)
    return missing


def run_preflight(folder: Path, *, expected_network: float | None = None) -> list[Finding]:
    """The whole of it, in a process that torchrun or srun started as one of a job."""
    environment = os.environ
    rank = int(environment.get("RANK", environment.get("SLURM_PROCID", "0")))
    world_size = int(environment.get("WORLD_SIZE", environment.get("SLURM_NTASKS", "1")))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise ValueError(
            f"environment: {' and '.join(missing)} missing; start `megasd doctor --preflight` with "
            "torchrun, or with srun in the job script, which sets them"
        )
    own = dataclasses.replace(gather_facts(rank), host=node_name())
    device = torch.device("cpu")
    if torch.cuda.is_available():  # behind the facts: a context of ours takes memory
        local = int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")))
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if faults := join(device, rank=rank, world_size=world_size):
        return faults
    try:
        return preflight(own, folder, device, expected_network=expected_network)
    finally:
        dist.destroy_process_group()
