"""Which trials of a plan train side by side: by rows, by memory, and so that no worker idles.

A row is a token of an example. A step costs what its rows cost and, however few they are, a fixed
part more: on a CPU core what some more rows would, on a GPU the launches of its kernels, a number a
layer and a few more a member. The fixed part the members of a pack share. So a pack pays where
trials have few rows, up to a total beyond which it saves memory and no time. All this is by
formula, without torch; where the ledger has measured that trials are no quicker in a pack than
alone, they are left alone.

Workers come before packs: three trials on two cores are a pack of two and one alone.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

import psutil

from fpt import packing
from fpt.config import TrialConfig
from fpt.tasks.bits import BitTask
from sweep.ledger import machine, provenance
from sweep.ledger.columns import WORKLOAD, workload_key
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.trials import Point

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "StepCosts",
    "Workers",
    "form",
    "kind_of",
    "kinds_in",
    "no_quicker",
    "not_exact",
    "saving",
    "seeds_apart",
    "sizes",
]

CPU_ROWS = 640
"""Rows of a step up to which a pack pays on a CPU core. Measured with GPT-2 base in fp32 (16 trials
of 40 rows take 1.6 times less than alone, 4 of 480 rows 1.03 times less); a tiny backbone behaves
alike."""

CPU_FIXED_ROWS = 25
"""What a step on a CPU core costs beside its rows, in rows: fits GPT-2 base; a tiny backbone has
about 50, so that what packs save is rather underestimated."""

CPU_LAYER_SECONDS = 0.5e-3
"""Seconds a layer of a step on a CPU core that members share also where each has a backbone of its
own: what is in no product. The rest of the fixed part is each member's, as its weights are read."""

CPU_DRAWN_ROW = 0.06
"""The part by which a row costs more there. With this and the former, a tiny backbone gains 1.28
times with 6 trials of 40 rows, 1.02 with 3 of 160 and nothing with 3 of 320: measured, on a loaded
machine. GPT-2 base would gain nothing."""

CPU_SPEED = 30e9
"""Operations a second of a core that has measured nothing yet. Two kinds of core had 15e9 to 60e9
with backbones of 4 layers of 128 and of 12 of 768."""


@dataclass(frozen=True)
class StepCosts:
    """What a step takes on a GPU."""

    layer: float
    """Seconds of each layer, beside its operations."""
    member: float
    """Seconds of each member in each layer, beside its operations."""
    speed: float
    """Operations a second."""


UNMEASURED_GPU = StepCosts(1.1e-3, 0.14e-3, 30e12)
"""Of a GPU that has measured nothing yet (`sweep.planning.calibration`). From the kernels that a
step of GPT-2 launched before layers were stacked, counted: 32 a layer, and 8.5 more a member; at
some 15 to 35 microseconds each, Python included. Not measured on a GPU, and rather too cautious:
a step of as many members now launches what one of two does."""

WORTH = 0.05
"""The part of the time that packs have to save, by this formula, to be formed at all: members cost
a little that it leaves out. A tiny backbone gained 1.06 times with 3 trials of 160 rows, nothing
with 2 of 256."""

ACTIVATIONS = 17
"""Numbers of a row's width that a layer keeps for the backward pass; measured with GPT-2 base."""

MEMORY_SHARE = 0.5
"""Of a worker's memory, what the activations of a pack, and the backbones of its members beyond the
first one, may take."""

GPU_MEMORY = 16e9
"""Bytes that a GPU is taken to have before one was asked (`sweep.cluster.preflight`)."""

ENOUGH = 3
"""Trials that must have been measured alone, and as many in packs, for the figures to count."""

LEAST_SECONDS = 1.0
"""Seconds of training of a trial for its figures to count: those of shorter ones are mostly a
process's first steps."""

BALANCED = 8
"""Packs a worker, up to which the last ones are made to end together. Of more, an idle worker at
the end is a small part of the whole."""


MEASURED_COLUMNS = (*WORKLOAD, "pack_size", "attempt", "backbone_seed")
"""What `kinds_in` reads."""


@dataclass(frozen=True)
class Device:
    """A GPU of a node, as it calls itself (`sweep.cluster.preflight`)."""

    name: str
    """Its model: NVIDIA H100 80GB HBM3."""
    memory: int
    """Bytes."""
    capability: tuple[int, int]
    """Its compute capability."""


@dataclass(frozen=True)
class Workers:
    """What packs are trained by."""

    count: int
    """Packs at a time."""
    gpus: float = 0
    """GPUs of a worker, or the fraction of one; 0: it trains on a core."""
    gpu_memory: float = GPU_MEMORY
    """Bytes of a GPU, of the smallest one that a worker may get."""
    gpu_name: str | None = None
    """Model of the GPUs, if it is known and the same for all."""
    costs: StepCosts = UNMEASURED_GPU
    """Of a step on such a GPU."""

    @classmethod
    def here(cls) -> Workers:
        """A worker for each core that this process may use."""
        return cls(machine.cores())

    def on(self, devices: Sequence[Device]) -> Workers:
        """Return these workers on GPUs that were asked what they are."""
        if not self.gpus or not devices:
            return self
        names = {one.name for one in devices}
        memory = min(float(one.memory) for one in devices)
        return replace(self, gpu_memory=memory, gpu_name=names.pop() if len(names) == 1 else None)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What it trains on."""
        return "cuda" if self.gpus else "cpu"

    @property
    def resources(self) -> Mapping[str, float]:
        """What a worker takes of a machine, in Ray's words: {"CPU": 1}, {"CPU": 1, "GPU": 1}."""
        return {"CPU": 1.0} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def device_name(self) -> str | None:
        """Return the model of what it trains on; None if that is not known."""
        return self.gpu_name if self.gpus else provenance.processor()

    @property
    def speed(self) -> float:
        """Return the operations a second of one that has measured nothing yet."""
        return self.costs.speed if self.gpus else CPU_SPEED

    def fixed_operations(
        self, layers: int, row: float, members: int = 1, backbones: int = 1
    ) -> float:
        """Return what a step costs beside its rows, as operations that take as long.

        Args:
            layers: Of the backbone.
            row: Operations of a row.
            members: Of the pack.
            backbones: Different ones that its members have.
        """
        if not self.gpus:
            alone = CPU_FIXED_ROWS * row
            shared = min(alone, layers * CPU_LAYER_SECONDS * CPU_SPEED)
            return alone + (backbones - 1) * (alone - shared)
        costs = self.costs
        return layers * (costs.layer + members * costs.member) * costs.speed

    @property
    def memory(self) -> float:
        """Bytes that a worker has: its GPU's, or of this machine's memory the share of a core.

        Workers on other machines are taken to be like those on this one.
        """
        if self.gpus:
            return self.gpu_memory * min(self.gpus, 1.0)
        total: int = psutil.virtual_memory().total
        return total / (os.cpu_count() or 1)


def form(
    stages: Iterable[Collection[Point]],
    workers: Workers,
    most: int | None = None,
    alone: Collection[tuple[object, ...]] = (),
) -> list[tuple[Point, ...]]:
    """Form packs.

    Args:
        stages: Trials that can start at the same time, in the order to train them; packs are formed
            within a stage.
        workers: By what they are trained.
        most: The most members of a pack; None: as many as pay.
        alone: Kinds that packs do not help, as `no_quicker` and `not_exact` tell them.

    Returns:
        The packs in order: each stands where its first member stood, its members in their order.
    """
    return [
        tuple(one.point for one in sorted(pack, key=_place))
        for points in stages
        for pack in _balanced(_alike(points, alone), workers, most)
    ]


def sizes(packs: Iterable[Sequence[Point]]) -> dict[int, int]:
    """Members -> number of packs that have as many, the largest packs first."""
    return dict(sorted(Counter(map(len, packs)).items(), reverse=True))


def saving(packs: Iterable[Sequence[Point]], workers: Workers) -> float:
    """The part of the time in training, summed over workers, that packs save. An estimate."""
    apart = together = 0.0
    for pack in packs:
        members = [_Member.of(point) for point in pack]
        together += _cost(members, workers)
        apart += sum(_cost([one], workers) for one in members)
    return 1 - together / apart if apart else 0.0


def activations(pack: Iterable[Point]) -> int:
    """Bytes that the members of a pack keep for the backward pass, at most, by formula."""
    return sum(_Member.of(point).size for point in pack)


def resident(config: TrialConfig, workers: Workers) -> int:
    """Return the bytes of a GPU that a training set may take: of one that is drawn there, none."""
    drawn = isinstance(config.task, BitTask)
    return packing.RESIDENT_BYTES if workers.gpus and not drawn else 0


def step_operations(config: TrialConfig) -> float:
    """Return the operations of a step of a trial, as packs count them: of products with frozen
    weights, forward and backward.
    """
    tokens, backbone = config.task.shape(config.protocol).tokens, config.backbone
    return config.batch_size * tokens * 4.0 * _layer_weights(backbone.layers, backbone.width)


def _layer_weights(layers: int, width: int) -> int:
    return 12 * layers * width**2


def backbones(pack: Iterable[Point]) -> int:
    """Return how many different backbones the members of a pack have."""
    return len({_draw(point.config) for point in pack})


def seeds_apart(packs: Iterable[Sequence[Point]], workers: Workers) -> int:
    """Trials that are alone because each seed has drawn a backbone of its own: those that could not
    be packed as they are, or would gain too little.

    With one `backbone_seed` for all they could be packed, and a table's intervals would leave out
    the draw.
    """
    alike: dict[object, list[_Member]] = defaultdict(list)
    for pack in packs:
        config = pack[0].config
        drawn = config.drawn_from is not None and config.backbone_seed is None
        if len(pack) == 1 and drawn and packing.packs(config):
            key = _key(config.model_copy(update={"backbone_seed": 0}))
            alike[key].append(_Member.of(pack[0]))
    return sum(
        len(pack)
        for members in alike.values()
        if len({one.point.config.seed for one in members}) > 1
        if not _packs_draws(members, workers)
        for pack in _divided([replace(one, draw=None) for one in members], workers, None)
        if len(pack) > 1
    )


def _packs_draws(members: Sequence[_Member], workers: Workers) -> bool:
    """Whether trials that draw a backbone each are packed all the same, where workers are few."""
    each = packing.draws_its_own(members[0].point.config)
    return each and any(len(pack) > 1 for pack in _divided(members, workers, None))


def own_seconds(device: str, seconds: float, cpu_seconds: float | None) -> float:
    """Return what a trial's training took where it had its core to itself, as far as rows say.

    On a core that is shared, wall time says how busy the machine was; CPU time is there in rows
    that were written since there is such a column. A worker of several threads has more CPU time
    than wall time.
    """
    return seconds if device != "cpu" or cpu_seconds is None else min(seconds, cpu_seconds)


def no_quicker(ledger: Ledger, device: str) -> frozenset[tuple[object, ...]]:
    """What the ledger has measured to take as long in packs as alone, or longer.

    Compared are the medians of the seconds a step of trials of the same backbone, task, groups and
    batch size, on processors (or GPUs) of one name. A kind of trial is in the answer if packs have
    helped it on none of these.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    sizes = ledger.trials(columns=["pack_size"], strict=False).column("pack_size")
    if not any(size and size > 1 for size in sizes.unique().to_pylist()):
        return frozenset()
    measures = (
        "seconds", "cpu_seconds", "steps_trained", "attempts", "extended_from", "device",
        "device_name",
    )  # fmt: skip
    table = ledger.trials(columns=[*MEASURED_COLUMNS, *measures], strict=False)
    taken: dict[tuple[object, ...], dict[str, tuple[list[float], list[float]]]] = {}
    for row, own in zip(table.to_pylist(), kinds_in(table), strict=True):
        # What several attempts took may have been taken in packs of several sizes.
        whole = row["attempts"] == 1 and row["extended_from"] is None and row["steps_trained"]
        whole = whole and row["seconds"] >= LEAST_SECONDS
        if whole and row["device"] == device and row["pack_size"] is not None:
            took = own_seconds(device, row["seconds"], row["cpu_seconds"]) / row["steps_trained"]
            for kind in own:
                both = taken.setdefault(kind, {}).setdefault(row["device_name"], ([], []))
                both[row["pack_size"] > 1].append(took)
    helped: dict[tuple[object, ...], bool] = {}
    for kind, machines in taken.items():
        for single, packed in machines.values():
            if min(len(single), len(packed)) >= ENOUGH:
                helped[kind] = helped.get(kind, False) or median(packed) < median(single)
    return frozenset(kind for kind, better in helped.items() if not better)


def not_exact(ledger: Ledger, device: str) -> frozenset[tuple[object, ...]]:
    """Return the kinds of trials that would not have the bits in packs that they have alone.

    A processor says so with a `row_padding` of 0 in a row. A kind of trial is in the answer if all
    that trained such trials, by their names, say so.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    paddings = ledger.trials(columns=["row_padding"], strict=False).column("row_padding")
    if 0 not in paddings.unique().to_pylist():
        return frozenset()
    columns = [*MEASURED_COLUMNS, "device", "device_name", "row_padding"]
    table = ledger.trials(columns=columns, strict=False)
    least: dict[tuple[object, ...], dict[str, int]] = defaultdict(dict)
    for row, own in zip(table.to_pylist(), kinds_in(table), strict=True):
        name, padding = row["device_name"], row["row_padding"]
        if row["device"] == device and padding is not None:
            for kind in own:
                least[kind][name] = min(padding, least[kind].get(name, padding))
    return frozenset(kind for kind, found in least.items() if not any(found.values()))


def kind_of(config: TrialConfig) -> tuple[object, ...]:
    """Return what a trial's seconds a step, and what packs do to them, depend on beside the
    machine: its workload, and whether each member of a pack has drawn a backbone.
    """
    return (*workload_key(config), packing.draws_its_own(config))


def kinds_in(table: pa.Table) -> list[tuple[tuple[object, ...], ...]]:
    """Return for each of the ledger's trials the kinds, as `kind_of` has them, that it tells of.

    A trial that was alone tells of both those that share a backbone and those that draw one each:
    alone they are the same. One of a pack tells of what its pack was.

    Args:
        table: With `MEASURED_COLUMNS`.
    """
    plain = zip(*(table.column(name).to_pylist() for name in WORKLOAD), strict=True)
    how = ("pack_size", "attempt", "backbone_seed")
    rows = list(zip(*(table.column(name).to_pylist() for name in how), strict=True))
    draws: dict[object, set[object]] = defaultdict(set)
    for _, attempt, seed in rows:
        draws[attempt].add(seed)
    return [
        tuple(
            (*kind, drawn)
            for drawn in ((False, True) if (size or 1) == 1 else (len(draws[attempt]) > 1,))
        )
        for kind, (size, attempt, _) in zip(plain, rows, strict=True)
    ]


def _key(config: TrialConfig) -> tuple[object, ...]:
    # The members of a pack also share the examples' task. A user's own task may have fields that
    # cannot be hashed.
    return (*packing.pack_key(config), config.task.model_dump_json(), config.protocol)


@dataclass(frozen=True, slots=True)
class _Member:
    """A trial, as far as packs are concerned."""

    point: Point
    place: int
    """In its stage."""
    steps: int
    rows: int
    """Of a step."""
    size: int
    """Bytes that its activations take, at most: attention's weights are not always kept."""
    operations: float
    """Of a row: of products with frozen weights, forward and backward."""
    backbone: int
    """Bytes of the weights of its backbone's layers."""
    draw: int | None
    """The seed of a backbone of its own; None: the pack's."""

    @classmethod
    def of(cls, point: Point, place: int = 0) -> _Member:
        config, backbone = point.config, point.config.backbone
        tokens = config.task.shape(config.protocol).tokens
        rows = config.batch_size * tokens
        row = ACTIVATIONS * backbone.width + 3 * backbone.heads * tokens
        size = 4 * backbone.layers * row * rows
        weights = _layer_weights(backbone.layers, backbone.width)
        return cls(
            point, place, config.steps, rows, size, 4.0 * weights, 4 * weights, _draw(config)
        )


def _draw(config: TrialConfig) -> int | None:
    return config.drawn_from if packing.draws_its_own(config) else None


def _alike(points: Iterable[Point], alone: Collection[tuple[object, ...]]) -> list[list[_Member]]:
    """The trials that could train together."""
    found: dict[object, list[_Member]] = {}
    for place, point in enumerate(points):
        config = point.config
        apart = not packing.packs(config) or (alone and kind_of(config) in alone)
        key = point.trial_id if apart else _key(config)
        found.setdefault(key, []).append(_Member.of(point, place))
    return list(found.values())


def _place(one: _Member) -> int:
    return one.place


def _divided(
    members: Sequence[_Member], workers: Workers, most: int | None, parts: int = 1
) -> list[list[_Member]]:
    """Trials that could train together, in packs of about as many rows: as few as pay (or as `most`
    allows), but at least `parts`.

    Trials of about as many steps come together, since a pack shrinks as its members end.
    """
    if len(members) == 1:
        return [list(members)]
    members = sorted(members, key=lambda one: (-one.steps, -one.rows))
    # Where a number of trials is given, rows do not count.
    weights = [one.rows if most is None else 1 for one in members]
    total = sum(weights)
    least = min(parts, len(members))
    parts = max(parts, math.ceil(total / (most or _most_rows(members, workers))))
    packs = _cut(members, weights, parts)
    while len(packs) < least or not all(_fits(pack, workers, most) for pack in packs):
        parts += max(1, parts // 20)
        packs = _cut(members, weights, parts)
    return [
        part
        for pack in packs
        for part in ([pack] if most or _pays(pack, workers) else [[one] for one in pack])
    ]


def _cut(members: Sequence[_Member], weights: Sequence[int], parts: int) -> list[list[_Member]]:
    """Cut a sequence into so many parts of about the same weight; a few may be missing."""
    cut: dict[int, list[_Member]] = defaultdict(list)
    before, total = 0, sum(weights)
    for one, weight in zip(members, weights, strict=True):
        middle = 2 * before + weight
        cut[-(-middle * parts // (2 * total))].append(one)
        before += weight
    return list(cut.values())


def _fits(pack: Sequence[_Member], workers: Workers, most: int | None) -> bool:
    rows = sum(one.rows for one in pack)
    pays = rows <= _most_rows(pack, workers) if most is None else len(pack) <= most
    further = len({one.draw for one in pack}) - 1
    memory = sum(one.size for one in pack) + further * pack[0].backbone
    memory += resident(pack[0].point.config, workers)
    room = memory <= workers.memory * MEMORY_SHARE
    return len(pack) == 1 or (pays and room)


def _most_rows(members: Sequence[_Member], workers: Workers) -> float:
    """Return the rows of a step up to which a pack of such members pays: on a GPU, until what one
    more member saves, its part of the layers' launches, is little beside what it costs.
    """
    if not workers.gpus:
        return CPU_ROWS
    layers, costs = members[0].point.config.backbone.layers, workers.costs
    rows = sum(one.rows for one in members) / len(members)
    cost = layers * costs.member * costs.speed + rows * members[0].operations
    return max(1.0, layers * costs.layer * costs.speed / (WORTH * cost)) * rows


def _pays(pack: Sequence[_Member], workers: Workers) -> bool:
    return _cost(pack, workers) <= (1 - WORTH) * sum(_cost([one], workers) for one in pack)


def _balanced(
    alike: Sequence[Sequence[_Member]], workers: Workers, most: int | None
) -> list[list[_Member]]:
    """Packs in order: more and smaller ones for as long as all of them together are done sooner, or
    fewer workers idle.
    """

    def cost(pack: Sequence[_Member]) -> float:
        # Packs of a given size are meant, whether they pay or not.
        return _cost(pack if most is None else [replace(one, draw=None) for one in pack], workers)

    groups = [_divided(members, workers, most) for members in alike]
    packs, kin = _in_order(groups)
    while len(packs) <= BALANCED * workers.count:
        costs = [cost(pack) for pack in packs]
        best, candidates = _schedule(costs, workers)
        if len(packs) < workers.count:
            candidates = sorted(range(len(packs)), key=costs.__getitem__)
        for index in reversed(candidates):
            group, members = kin[index], alike[kin[index]]
            if len(groups[group]) == len(members):
                continue
            finer = list(groups)
            finer[group] = _divided(members, workers, most, len(groups[group]) + 1)
            tried, tried_kin = _in_order(finer)
            if _schedule([cost(pack) for pack in tried], workers)[0] < best:
                groups, packs, kin = finer, tried, tried_kin
                break
        else:
            break
    return packs


def _in_order(groups: Sequence[Sequence[list[_Member]]]) -> tuple[list[list[_Member]], list[int]]:
    """Packs by the places of their first members, and the number of the group of each."""
    found = [
        (min(map(_place, pack)), number, pack)
        for number, packs in enumerate(groups)
        for pack in packs
    ]
    found.sort(key=lambda one: one[0])
    return [pack for _, _, pack in found], [number for _, number, _ in found]


def _schedule(costs: Sequence[float], workers: Workers) -> tuple[tuple[float, int], list[int]]:
    """When the last of some packs ends and how many workers idle throughout (the less the better),
    and the packs of the worker that ends last.
    """
    free = [(0.0, number) for number in range(workers.count)]
    given: list[list[int]] = [[] for _ in free]
    for index, cost in enumerate(costs):
        at, number = heapq.heappop(free)
        given[number].append(index)
        heapq.heappush(free, (at + cost, number))
    end, last = max(free)
    return (end, sum(not own for own in given)), given[last]


def _cost(pack: Sequence[_Member], workers: Workers) -> float:
    """Return what a pack takes to train, as operations that take as long."""
    layers, row = pack[0].point.config.backbone.layers, pack[0].operations
    rows, members = sum(one.rows for one in pack), len(pack)
    draws = Counter(one.draw for one in pack)
    total, done, backbones = 0.0, 0, len(draws)
    for one in sorted(pack, key=lambda one: one.steps):
        each = row * (1 + CPU_DRAWN_ROW) if backbones > 1 and not workers.gpus else row
        step = workers.fixed_operations(layers, row, members, backbones) + rows * each
        total += (one.steps - done) * step
        done, rows, members = one.steps, rows - one.rows, members - 1
        draws[one.draw] -= 1
        backbones -= not draws[one.draw]
    return total
