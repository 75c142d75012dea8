"""From Megatron shards to full Hugging Face tensors, bucket by bucket.

The plan is computed once from the table and the sizes of the cut. Execution walks its rounds in
one order that is the same on every rank. A round is one bucket of parameters of one pipeline
stage: the stage's ranks gather them over tensor parallelism (those of experts: exchange them over
expert parallelism), merge them, and broadcast the merged bucket to the other stages. While a round
is merged and read, the shards of the next one are on their way. Extra memory is two buckets: one
that shards of two rounds arrive in, one for what is merged. Ranks that take nothing take part only
in what others need of them: a data-parallel replica that feeds no engine does nothing at all.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.weights.bucket import Bucket
from megasd.weights.layout import (
    Sizes,
    held_entries,
    layout_errors,
    local_shape,
    merge,
    rank_experts,
    stage_layers,
)
from megasd.weights.tables.table import Entry, Row, Table, entries_of

DEFAULT_BUCKET_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's numbers within the groups that hold one copy of the model, and those groups.

    A group of size 1 may be None. `expert` numbers the ranks of `expert_group`, ep x etp of them
    with etp innermost; `stage` numbers all ranks of the pipeline stage.
    """

    tp: int = 0
    pp: int = 0
    expert: int = 0
    stage: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What every rank of a stage holds one part of: a dense parameter, or an expert per ep rank."""

    row: Row
    layer: int | None
    slot: int | None = None  # number of the expert within each rank's share

    def entry(self, ep_rank: int, share: int) -> Entry:
        expert = None if self.slot is None else ep_rank * share + self.slot
        return Entry(self.row, self.layer, expert)


@dataclass(frozen=True, slots=True)
class Round:
    """One bucket: units of one stage, all dense or all of experts."""

    stage: int
    units: tuple[Unit, ...]

    @property
    def of_experts(self) -> bool:
        return self.units[0].slot is not None


class ReshardPlan:
    """The rounds for one model, cut and receivers.

    `receivers`: 1, or the number of ranks over which the receiving engines cut their experts
    (contiguous shares, the share of rank i of a stage is number i mod receivers); a rank then
    receives the experts of its share only. Two rounds fit into `bucket_bytes`, but for a larger
    parameter, which travels whole and alone.
    """

    def __init__(
        self,
        table: Table,
        sizes: Sizes,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        receivers: int = 1,
    ) -> None:
        errors = layout_errors(table, sizes)
        if receivers > 1 and table.num_experts % receivers:
            errors.append(f"{receivers} receivers do not divide {table.num_experts} experts")
        if errors:
            raise ValueError("; ".join(errors))
        self.table = table
        self.sizes = sizes
        self.bucket_bytes = bucket_bytes
        self.receivers = receivers if table.num_experts else 1
        self.expert_share = table.num_experts // sizes.ep
        self._rounds: dict[int, list[Round]] = {}  # by bytes of an element

    @cached_property
    def _units(self) -> tuple[tuple[int, list[Unit]], ...]:
        """(stage, units) in order; the dense ones of a stage stand before those of experts."""
        return tuple(
            (stage, units)
            for stage in range(self.sizes.pp)
            for units in (self._dense(stage), self._experts(stage))
            if units
        )

    def _dense(self, stage: int) -> list[Unit]:
        """The layers first: the embedding, often the largest, then has small rounds beside it."""
        units = [
            Unit(row, layer)
            for layer in stage_layers(self.table.num_layers, stage, self.sizes.pp)
            for row in self.table.layers
            if not row.experts
        ]
        if stage == self.sizes.pp - 1:
            units += [Unit(row, None) for row in self.table.last if row.exported]
        return units + [Unit(row, None) for row in self.table.first if stage == 0]

    def _experts(self, stage: int) -> list[Unit]:
        rows = tuple(row for row in self.table.layers if row.experts)
        return [
            Unit(entry.row, layer, entry.expert)
            for layer in stage_layers(self.table.num_layers, stage, self.sizes.pp)
            for entry in entries_of(rows, layer)
            if entry.expert is not None and entry.expert < self.expert_share
        ]

    def unit_elements(self, unit: Unit) -> int:
        """Elements of a unit in the memory of a round: full, or what one receiver takes of it."""
        ways = self.sizes.ways(unit.row)
        one = math.prod(local_shape(unit.row, ways)) * ways
        return one if unit.slot is None else one * self._most_wanted[unit.slot]

    def round_elements(self, one: Round) -> int:
        return sum(map(self.unit_elements, one.units))

    @cached_property
    def _most_wanted(self) -> list[int]:
        """By slot: the most experts of one unit that any receiver wants."""
        return [
            max(
                sum(rank * self.expert_share + slot in wanted for rank in range(self.sizes.ep))
                for wanted in map(self.wanted, range(self.receivers))
            )
            for slot in range(self.expert_share)
        ]

    def wanted(self, stage_rank: int) -> range:
        """The experts that a rank receives, by its number within its stage."""
        return rank_experts(self.table.num_experts, stage_rank % self.receivers, self.receivers)

    def rounds(self, element_bytes: int) -> list[Round]:
        """All rounds in order, for a wire dtype of `element_bytes`."""
        if element_bytes not in self._rounds:
            self._rounds[element_bytes] = self._cut(element_bytes)
        return self._rounds[element_bytes]

    def _cut(self, element_bytes: int) -> list[Round]:
        rounds: list[Round] = []
        for stage, units in self._units:
            bucket: list[Unit] = []
            room = 0
            for unit in units:
                needed = self.unit_elements(unit) * element_bytes
                if bucket and needed > room:
                    rounds.append(Round(stage, tuple(bucket)))
                    bucket = []
                if not bucket:
                    room = self.bucket_bytes // 2
                bucket.append(unit)
                room -= needed
            rounds.append(Round(stage, tuple(bucket)))
        return rounds

    def locate(self, parameters: Mapping[str, Tensor], place: Place) -> dict[Entry, Tensor]:
        """The rank's tensors by entry; missing, unknown and wrongly shaped ones are errors."""
        ep_rank = place.expert // self.sizes.etp
        layers = stage_layers(self.table.num_layers, place.pp, self.sizes.pp)
        first_expert = ep_rank * self.expert_share
        found: dict[Entry, Tensor] = {}
        errors = []
        for name, parameter in parameters.items():
            try:
                entry = self.table.find(name, layers.start, first_expert)
            except ValueError:
                errors.append(f"{name} is unknown")
                continue
            if entry in found:
                errors.append(f"{name} is there twice, under two names")
            expected = local_shape(entry.row, self.sizes.ways(entry.row))
            if parameter.shape != expected:
                errors.append(f"{name} has shape {tuple(parameter.shape)} instead of {expected}")
            found[entry] = parameter
        held = set(held_entries(self.table, self.sizes, place.pp, ep_rank))
        errors += [
            f"{entry.row.megatron[0].format(layer=entry.layer, expert=entry.expert)} is missing"
            for entry in held
            if entry not in found and entry.row.exported
        ]
        errors += [
            f"{entry.hf_names()[0]} does not belong here" for entry in found if entry not in held
        ]
        if errors:
            raise ValueError(f"pipeline stage {place.pp}: " + "; ".join(errors))
        return found


def reshard(
    plan: ReshardPlan,
    parameters: Mapping[str, Tensor],
    place: Place,
    *,
    dtype: torch.dtype | None = None,
    takes: bool = True,
) -> Iterator[Bucket]:
    """Yields every bucket on every rank that takes them, in the order of the plan's rounds.

    Collective over the groups of `place`: all ranks must walk it to the end, also those that get
    no bucket because they do not take any. `parameters` are keyed by the rank's own Megatron names
    (layer 0 is the stage's first). Buckets have `dtype` (None: the parameters' own, which must be
    one), lie on the parameters' device and are good until the next one is asked for.
    Raises ValueError for a parameter that is missing, unknown or of the wrong shape.
    """
    local = plan.locate(parameters, place)
    dtypes = {parameter.dtype for parameter in local.values()}
    if dtype is None:
        if len(dtypes) > 1:
            raise ValueError(f"parameters of several dtypes {dtypes}: pass the one to send")
        (dtype,) = dtypes
    device = next(iter(local.values())).device
    part = _part(plan, place, takes, device)
    if not (part.gathers or part.exchanges or part.merges):
        return
    rounds = plan.rounds(dtype.itemsize)
    largest = max(map(plan.round_elements, rounds))
    merged = torch.empty(largest if part.merges else 0, dtype=dtype, device=device)
    is_cut = plan.sizes.tp > 1 or plan.sizes.ep * plan.sizes.etp > 1
    room = max(largest, plan.bucket_bytes // dtype.itemsize) if is_cut else 0
    gathered = torch.empty(min(room, 2 * largest), dtype=dtype, device=device)
    walk = _Walk(plan, place, part, local, gathered, rounds)
    for number, one in enumerate(rounds):
        shards = walk.arrived(number)
        if not part.merges:
            continue
        entries = walk.received(one)
        shapes = {
            name: tensor.shape
            for entry in entries
            for name, tensor in zip(entry.hf_names(), entry.row.hf, strict=True)
        }
        bucket = Bucket.over(merged, shapes)
        for entry in entries if one.stage == place.pp else ():
            full = [bucket.tensors[name] for name in entry.hf_names()]
            merge(entry.row, shards[entry], full)
        if entries and plan.sizes.pp > 1:
            dist.broadcast(bucket.flat, group=place.pp_group, group_src=one.stage)
        if entries and takes:  # there are rounds whose experts this rank does not want
            yield bucket


class _Part(NamedTuple):
    """What a rank does in a walk, the same on all ranks of the group that does it together."""

    merges: bool  # and broadcasts: it takes the buckets, or a rank of its pp group does
    gathers: bool  # dense shards: a rank of its tp group merges
    exchanges: bool  # experts: a rank of its expert group merges


def _part(plan: ReshardPlan, place: Place, takes: bool, device: torch.device) -> _Part:
    sizes = plan.sizes

    def anywhere(flag: bool, group: dist.ProcessGroup | None, size: int) -> bool:
        if size == 1:
            return flag
        found = torch.tensor(int(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return bool(found)

    merges = anywhere(takes, place.pp_group, sizes.pp)
    gathers = anywhere(merges, place.tp_group, sizes.tp)
    ranks = sizes.ep * sizes.etp if plan.table.num_experts else 1
    return _Part(merges, gathers, anywhere(merges, place.expert_group, ranks))


Shards = dict[Entry, list[Tensor]]
"""Of each parameter, those of all ranks that cut it, in order."""


class _Walk:
    """One rank's part of a walk through the rounds. `memory`: where shards of others arrive.

    Rounds take turns at the two ends of it, so that one can arrive while another is read.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        place: Place,
        part: _Part,
        local: Mapping[Entry, Tensor],
        memory: Tensor,
        rounds: Sequence[Round],
    ) -> None:
        self.plan, self.place, self.memory, self.rounds = plan, place, memory, rounds
        self.part = part
        self.local = {entry: parameter.detach() for entry, parameter in local.items()}
        self.ep_rank = place.expert // plan.sizes.etp
        self._started: dict[int, Callable[[], Shards]] = {}

    def arrived(self, number: int) -> Shards:
        """The shards of a round of this stage; what the next one needs is sent for."""
        arrive = self._started.pop(number, None) or self._start(number)
        beside = [self.plan.round_elements(one) for one in self.rounds[number : number + 2]]
        if len(beside) == 2 and sum(beside) <= len(self.memory):
            self._started[number + 1] = self._start(number + 1)
        return arrive()

    def _start(self, number: int) -> Callable[[], Shards]:
        one = self.rounds[number]
        takes_part = self.part.exchanges if one.of_experts else self.part.gathers
        if one.stage != self.place.pp or not takes_part:
            return dict
        size = self.plan.round_elements(one)
        memory = self.memory[:size] if number % 2 == 0 else self.memory[-size:]
        return self.exchange(one, memory) if one.of_experts else self.gather(one, memory)

    def received(self, one: Round) -> list[Entry]:
        """What this rank has after the round, in order."""
        if not one.of_experts:
            return [Entry(unit.row, unit.layer) for unit in one.units]
        return self._wanted_of(one, range(self.plan.sizes.ep), self.place.stage)

    def gather(self, one: Round, memory: Tensor) -> Callable[[], Shards]:
        """Sends for the shards of every tensor-parallel rank; what is returned waits for them."""
        entries = self.received(one)
        group = self.place.tp_group
        return self._all_gather(entries, [entries], self.plan.sizes.tp, group, memory)

    def exchange(self, one: Round, memory: Tensor) -> Callable[[], Shards]:
        """The same of the experts that this rank wants, of every expert-tensor rank."""
        plan, share = self.plan, self.plan.expert_share
        if plan.receivers > 1:
            return self._all_to_all(one, memory)
        held = [[u.entry(rank, share) for u in one.units] for rank in range(plan.sizes.ep)]
        own, group = held[self.ep_rank], self.place.expert_group
        return self._all_gather(own, held, plan.sizes.etp, group, memory)

    def _all_gather(
        self,
        own: Sequence[Entry],
        held: Sequence[Sequence[Entry]],
        ways: int,
        group: dist.ProcessGroup | None,
        memory: Tensor,
    ) -> Callable[[], Shards]:
        """`held[i]` lies on the ranks i * ways to (i + 1) * ways - 1 of the group, cut in ways."""
        num_ranks = len(held) * ways
        if num_ranks == 1:  # nothing to gather: merging reads the parameters themselves
            return lambda: {entry: [self.local[entry]] for entry in own}
        shapes = [_cut(entry, ways) for entry in own]
        sizes = [math.prod(shape) for shape in shapes]
        buffer = memory[: num_ranks * sum(sizes)].view(num_ranks, -1)
        mine = buffer[dist.get_rank(group)]
        for entry, part in zip(own, mine.split(sizes), strict=True):
            part.view(self.local[entry].shape).copy_(self.local[entry])
        under_way = _all_gather_in_place(buffer, mine, group)

        def arrive() -> Shards:
            _wait(under_way)
            shards: Shards = {}
            for rank, row in enumerate(buffer):
                parts = zip(held[rank // ways], row.split(sizes), shapes, strict=True)
                for entry, part, shape in parts:
                    shards.setdefault(entry, []).append(part.view(shape))
            return shards

        return arrive

    def _all_to_all(self, one: Round, memory: Tensor) -> Callable[[], Shards]:
        """Each rank sends each of its experts to those that want it, and to no one else."""
        etp, me, stage = self.plan.sizes.etp, self.place.expert, self.place.stage
        ranks = range(self.plan.sizes.ep * etp)
        others = [rank for rank in ranks if rank != me]  # nothing travels from a rank to itself
        out = {rank: self._wanted_of(one, [self.ep_rank], stage - me + rank) for rank in others}
        into = {rank: self._wanted_of(one, [rank // etp], stage) for rank in others}
        elements = {rank: [math.prod(_cut(e, etp)) for e in into[rank]] for rank in others}
        received = memory[: sum(map(sum, elements.values()))]
        sent = [self.local[entry].flatten() for entries in out.values() for entry in entries]
        sending = torch.cat([received.new_empty(0), *sent]).to(received.dtype)
        under_way: list[dist.Work | None] = []
        if others:
            under_way = [
                dist.all_to_all_single(
                    received,
                    sending,
                    [sum(elements.get(rank, ())) for rank in ranks],
                    [sum(self.local[e].numel() for e in out.get(rank, ())) for rank in ranks],
                    group=self.place.expert_group,
                    async_op=True,
                )
            ]

        def arrive() -> Shards:
            _wait(under_way)
            parts = iter(received.split([size for sizes in elements.values() for size in sizes]))
            shards: Shards = {}
            for rank in ranks:  # in order, so that the shards of an expert are
                if rank == me:
                    for entry in self._wanted_of(one, [self.ep_rank], stage):
                        shards.setdefault(entry, []).append(self.local[entry])
                for entry in into.get(rank, ()):
                    shards.setdefault(entry, []).append(next(parts).view(_cut(entry, etp)))
            return shards

        return arrive

    def _wanted_of(self, one: Round, ep_ranks: Sequence[int], stage_rank: int) -> list[Entry]:
        wanted = self.plan.wanted(stage_rank)
        entries = [
            unit.entry(rank, self.plan.expert_share) for unit in one.units for rank in ep_ranks
        ]
        return [entry for entry in entries if entry.expert in wanted]


def _all_gather_in_place(
    buffer: Tensor, mine: Tensor, group: dist.ProcessGroup | None
) -> list[dist.Work | None]:
    """Fills the rows of `buffer` [ranks, n]; `mine` is the rank's own, in its place already."""
    if buffer.device.type == "cpu":  # gloo's all-gather is slow, and copies the whole buffer
        return [
            dist.broadcast(row, group=group, group_src=rank, async_op=True)
            for rank, row in enumerate(buffer)
        ]
    # torch 2.13 renamed it and warns about the old name.
    named: Any = dist
    gather = getattr(named, "all_gather_single", None) or named.all_gather_into_tensor
    return [gather(buffer.view(-1), mine, group=group, async_op=True)]


def _wait(under_way: Sequence[dist.Work | None]) -> None:
    for work in under_way:
        if work is not None:
            work.wait()


def _cut(entry: Entry, ways: int) -> tuple[int, ...]:
    return local_shape(entry.row, ways)
