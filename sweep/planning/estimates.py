"""What a plan will cost: core-hours or GPU-hours with an interval, when it ends, memory, disk.

Seconds a step come from the ledger, from trials with the same `sweep.planning.packing.kind_of`,
on a device of the same name, else on others of the same sort, with a wider interval. A kind that
was never measured is guessed from its floating-point operations by formula (`fpt.flops`), at the
speed at which the ledger's other kinds had theirs done; an empty ledger leaves a speed of ours for
a CPU core, and none for a GPU, on which we have measured nothing. Small products are slower than
their operations say: to the operations of a step those are added that take as long as its fixed
part.

The interval is one of 90 %, and takes in how much trials of a kind differ among themselves, how
much kinds differ from the formula, and that a machine is not as quick today as it was then. It
cannot know of neighbours that are yet to come. On a core, seconds are those that a trial had the
core, where its row tells (`cpu_seconds`): a run beside other work does not raise the next price.

A run keeps its quote in the ledger, as `quotes/<sweep>/<time>.json`, so that `sweep status` can set
it against what the trials then took.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, stdev

from fpt.config import TrialConfig
from fpt.flops import training_flops
from fpt.spec import JSON
from sweep.ledger.ledger import Ledger, new_attempt
from sweep.planning import packing
from sweep.planning.calibration import config_of
from sweep.planning.packing import (
    MEASURED_COLUMNS,
    UNMEASURED_GPU,
    Workers,
    kind_of,
    kinds_in,
    own_seconds,
)
from sweep.planning.plan import Pack, Plan
from sweep.sweepfile.trials import Point, Sweep
from sweep.sweepfile.tuning_spec import ADAPTIVE

Kind = tuple[object, ...]

UNMEASURED = 0.7
"""Standard deviation of the logarithm of seconds, where only a usual speed is known: a factor
of three to either side in the interval."""

GUESSED = 0.35
"""The least such deviation of a kind that is guessed from others, by formula."""

ELSEWHERE = 0.35
"""The same, of a kind that was measured on devices of other names alone."""

DRIFT = 0.12
"""The same, of a machine from one day to another, all kinds together."""

WITHIN = 0.10
"""The same, of single trials of a kind, where the ledger has too few to tell."""

NINETY = 1.645
"""Standard deviations to either side that hold nine tenths of a normal distribution."""

START_SECONDS = 20.0
"""What a run takes beside training: Ray's start, and each worker's imports. On two cores."""

PROCESS = 500e6
"""Bytes of a worker without a model: Python, torch, transformers, Ray."""

ROW, PIECE, RECORD = 9e3, 1.5e3, 40.0
"""Bytes of a trial's row, of a piece of a curve without records, and of a record."""


@dataclass(frozen=True)
class Quote:
    """What is still to be trained, as far as it can be said before. All of it is an estimate."""

    device: str
    """cpu: hours are core-hours; cuda: GPU-hours."""
    hours: float | None
    """Of training, summed over workers; None where some of it has no price."""
    low: float | None
    """Where nine in ten such quotes begin ..."""
    high: float | None
    """... and end."""
    finish_hours: float | None
    """From the start to the end of the run, with the workers of the plan."""
    memory: int | None
    """Bytes of the largest worker."""
    disk: int
    """Bytes that are added to the ledger."""
    measured: int
    """Trials that are priced from what the ledger measured of their kind."""
    guessed: int
    """Trials that are priced by formula, or have no price."""
    operations: float
    """Floating-point operations by formula."""
    note: str
    """What the figures rest on, in words."""
    trials: Mapping[str, float]
    """Trial -> its seconds; those that have no price are left out."""

    def to_json(self) -> JSON:
        """Return the quote without its trials, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "trials"}


@dataclass(frozen=True)
class _Rate:
    """Seconds a step of a kind of trials."""

    seconds: float
    """As trials of it took when alone, or in packs, as the ledger has them."""
    packed: bool
    """Whether that was in packs."""
    trials: int
    deviation: float
    """Of the logarithms, among trials."""
    elsewhere: bool = False
    """Whether they were on devices of other names alone."""


def quote(planned: Plan, ledger: Ledger, *more: Plan) -> Quote:
    """Estimate what a plan would take to train.

    Args:
        planned: The plan.
        ledger: What measured trials are looked up in.
        more: Plans of other files that run after it, for the same workers and of none of its trials
            (`sweep.planning.plan.in_turn`).

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    device = planned.workers.device
    runs = [_all_packs(one) for one in (planned, *more)]
    packs = [pack for run in runs for pack in run]
    points = [point for pack in packs for point in pack.points]
    rates = _measured(ledger, planned.workers) if points else {}
    guess = _Guess.of(rates, ledger, planned.workers) if points else _Guess(planned.workers)
    seconds: dict[str, float] = {}
    own: dict[Kind, list[float]] = defaultdict(list)  # kind -> seconds of its trials
    others = 0.0
    for pack in packs:
        quicker = _quicker(pack, planned.workers)
        for point in pack.points:
            kind = kind_of(point.config)
            rate = rates.get(kind)
            if rate is not None:
                factor = 1.0 if rate.packed else quicker
                taken = point.config.steps * rate.seconds * factor
                own[kind].append(taken)
            elif (step := guess.seconds(point.config)) is not None:
                taken = point.config.steps * step * quicker
                others += taken
            else:
                continue
            seconds[point.trial_id] = taken
    measured = sum(map(len, own.values()))
    hours = low = high = finish = None
    if points and len(seconds) == len(points):
        total = sum(seconds.values())
        spread = _spread(own, rates, others, guess.deviation, total)
        hours = total / 3600
        low, high = (hours * math.exp(sign * NINETY * spread) for sign in (-1, 1))
        finish = 0.0
        for run in filter(None, runs):
            each = [sum(seconds[point.trial_id] for point in pack.points) for pack in run]
            finish += (START_SECONDS + _ends(each, planned.workers.count)) / 3600
    return Quote(
        device=device,
        hours=hours if points else 0.0,
        low=low if points else 0.0,
        high=high if points else 0.0,
        finish_hours=finish if points else 0.0,
        memory=max((_memory(pack, planned.workers) for pack in packs), default=None),
        disk=round(
            sum(
                _disk(point, one.sweep)
                for one, run in zip((planned, *more), runs, strict=True)
                for pack in run
                for point in pack.points
            )
        ),
        measured=measured,
        guessed=len(points) - measured,
        operations=sum(training_flops(point.config) for point in points),
        note=_note(
            device,
            measured,
            sum(len(seconds) for kind, seconds in own.items() if rates[kind].elsewhere),
            len(points) - measured,
            guess,
            len(seconds) < len(points),
            sum(_not_asked_yet(one.sweep) for one in (planned, *more)),
        ),
        trials=seconds,
    )


def _all_packs(planned: Plan) -> tuple[Pack, ...]:
    # Trials that a study has yet to choose a learning rate for cost the same whichever it is.
    later = (Pack((point,), planned.workers.resources) for point in planned.sweep.undecided)
    return (*planned.packs, *later)


def _not_asked_yet(sweep: Sweep) -> int:
    """Return how many trials an adaptive sampler has still to ask for, beyond those of the plan."""
    tunes = [study.tune for study in sweep.studies if study.tune.sampler in ADAPTIVE]
    return sum(one.budget * len(one.seeds) for one in tunes) - len(sweep.tunings) if tunes else 0


def _note(
    device: str,
    measured: int,
    elsewhere: int,
    guessed: int,
    guess: _Guess,
    unpriced: bool,
    later: int,
) -> str:
    if not measured + guessed:
        return "nothing to train"
    parts = []
    if measured:
        text = f"{measured:,} from trials of their kind in the ledger"
        text += f" ({elsewhere:,} of them measured on another model of device)" if elsewhere else ""
        parts.append(text)
    if guessed and unpriced:
        where = "a GPU" if device == "cuda" else "a core"
        parts.append(f"{guessed:,} without a price: nothing like them was measured on {where} yet")
    elif guessed:
        how = (
            "of other kinds in the ledger" if guess.known else "of some core, measured nowhere here"
        )
        parts.append(f"{guessed:,} from their operations by formula, at the speed {how}")
    if later:
        parts.append(f"without {later:,} more that the sampler has yet to ask for")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------- seconds a step


def _measured(ledger: Ledger, workers: Workers) -> dict[Kind, _Rate]:
    """Return what trials took on the workers' sort of device: kind -> rate."""
    measures = [
        "seconds", "cpu_seconds", "steps_trained", "attempts", "extended_from", "device",
        "device_name", "pack_size",
    ]  # fmt: skip
    table = ledger.trials(columns=list({*MEASURED_COLUMNS, *measures}), strict=False)
    found: dict[Kind, _Taken] = {}
    taken = zip(*(table.column(name).to_pylist() for name in measures), strict=True)
    for kinds, (seconds, cpu, steps, attempts, extended, on, model, members) in zip(
        kinds_in(table), taken, strict=True
    ):
        # A row with several attempts counts too: its seconds are of training that was kept.
        if on == workers.device and steps and seconds and attempts and extended is None:
            for kind in kinds:
                both = found.setdefault(kind, {}).setdefault(model, ([], []))
                both[(members or 1) > 1].append(own_seconds(on, seconds, cpu) / steps)
    return {kind: _rate(models, workers.device_name) for kind, models in found.items()}


_Taken = dict[str | None, tuple[list[float], list[float]]]
"""Model of device -> seconds a step of trials of a kind that were alone, and in packs."""


def _rate(models: _Taken, own: str | None) -> _Rate:
    """Return the rate on a model of device, else on the others together."""
    if own in models:
        models = {own: models[own]}
    packed = any(both[True] for both in models.values())
    values = [one for both in models.values() for one in both[packed]]
    logs = [math.log(value) for value in values]
    spread = max(stdev(logs) if len(logs) > 2 else WITHIN, 0.02)
    elsewhere = own is not None and own not in models
    return _Rate(median(values), packed, len(values), spread, elsewhere)


@dataclass(frozen=True)
class _Guess:
    """What is known of kinds that were not measured."""

    workers: Workers
    speed: float | None = None
    """Operations a second; None: nothing is known."""
    deviation: float = 0.0
    """Of the logarithm of the seconds that follow from it."""
    known: bool = False
    """Whether the ledger told."""

    @classmethod
    def of(cls, rates: Mapping[Kind, _Rate], ledger: Ledger, workers: Workers) -> _Guess:
        """Make it from the kinds that were measured."""
        speeds = [
            math.log(cost / rate.seconds)
            for kind, cost in _costs(rates, ledger, workers).items()
            if (rate := rates[kind]).seconds
        ]
        if speeds:
            spread = stdev(speeds) if len(speeds) > 2 else UNMEASURED
            return cls(workers, math.exp(median(speeds)), max(spread, GUESSED), known=True)
        # A GPU's constants are no measurement, unless they were measured.
        known = not workers.gpus or workers.costs != UNMEASURED_GPU
        return cls(workers, workers.speed if known else None, UNMEASURED)

    def seconds(self, config: TrialConfig) -> float | None:
        """Return the seconds of a step of a trial that is alone."""
        return None if self.speed is None else _cost(config, self.workers) / self.speed


def _costs(rates: Mapping[Kind, _Rate], ledger: Ledger, workers: Workers) -> dict[Kind, float]:
    """Return kind -> operations of a step, of the kinds whose config can be read back."""
    table = ledger.trials(columns=[*MEASURED_COLUMNS, "config"], strict=False) if rates else None
    out: dict[Kind, float] = {}
    if table is None:
        return out
    for place, kinds in enumerate(kinds_in(table)):
        wanted = [kind for kind in kinds if kind in rates and kind not in out]
        config = config_of(json.loads(table.column("config")[place].as_py())) if wanted else None
        if config is not None:
            out |= dict.fromkeys(wanted, _cost(config, workers))
    return out


def _cost(config: TrialConfig, workers: Workers) -> float:
    """Return the operations of a step, its share of the evaluations included, and those that would
    take as long as its fixed part; on a core twice what packs count on, which rather underestimate.
    """
    rows = config.batch_size * config.task.shape(config.protocol).tokens
    operations = training_flops(config) / config.steps
    fixed = workers.fixed_operations(config.backbone.layers, operations / rows)
    return operations + (fixed if workers.gpus else 2 * fixed)


def _quicker(pack: Pack, workers: Workers) -> float:
    """Return the part of its time alone that a trial takes in its pack, by formula."""
    if len(pack.points) == 1:
        return 1.0
    return 1.0 - packing.saving([pack.points], workers)


def _spread(
    own: Mapping[Kind, Sequence[float]],
    rates: Mapping[Kind, _Rate],
    others: float,
    deviation: float,
    total: float,
) -> float:
    """Return the standard deviation of the logarithm of all seconds together."""
    squares = (others * deviation) ** 2 + (total * DRIFT) ** 2
    # Another machine is quicker or slower at all kinds alike.
    moved = sum(sum(seconds) for kind, seconds in own.items() if rates[kind].elsewhere)
    squares += (moved * ELSEWHERE) ** 2
    for kind, seconds in own.items():
        rate, sum_ = rates[kind], sum(seconds)
        # Of the kind's mean, as it was measured, and of the mean of as many trials as come.
        squares += (sum_ * rate.deviation) ** 2 * (1 / rate.trials + 1 / len(seconds))
    return math.sqrt(squares) / total if total else 0.0


def _ends(packs: Iterable[float], workers: int) -> float:
    """Return when the last of some packs ends, if each begins as soon as a worker is free."""
    free = [0.0] * workers
    for seconds in packs:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


# --------------------------------------------------------------------------------- memory and disk


def _memory(pack: Pack, workers: Workers) -> int:
    """Return the bytes of a worker at its largest."""
    config = pack.points[0].config
    weights = 4.0 * _weights(config) * packing.backbones(pack.points)
    trained = 16.0 * sum(_trained(point.config) for point in pack.points)
    kept = packing.activations(pack.points) + packing.resident(config, workers)
    return round(PROCESS + weights + trained + kept)


def _weights(config: TrialConfig) -> float:
    """Return the number of parameters of the backbone's layers."""
    return 12.0 * config.backbone.layers * config.backbone.width**2


def _trained(config: TrialConfig) -> float:
    """Return about how many parameters train."""
    backbone, shape = config.backbone, config.task.shape(config.protocol)
    width, layers, trains = backbone.width, backbone.layers, set(config.train)
    sizes = {
        "input": shape.inputs * width,
        "output": width * shape.outputs * shape.numbers,
        "position": shape.tokens * width,
        "norm": 4 * layers * width,
        "attention": 4 * layers * width**2,
        "attention:last": 4 * width**2,
        "feedforward": 8 * layers * width**2,
        "recurrent": 8 * layers * width**2,
    }
    return float(sum(sizes[name] for name in trains if name in sizes))


def _disk(point: Point, sweep: Sweep) -> float:
    """Return the bytes that a trial leaves in the ledger."""
    config, keep = point.config, sweep.keep
    records = 2 * -(-config.steps // config.evaluation.every) + 1
    out = ROW + PIECE + RECORD * records
    if keep.trained:
        out += 4 * _trained(config)
    if point.trial_id in sweep.keeps_backbones:
        out += 4 * _weights(config)
    return out


# ---------------------------------------------------------------------------- quotes that are kept


@dataclass(frozen=True)
class Comparison:
    """A quote beside what its trials took."""

    device: str
    """As in `Quote`."""
    trials: int
    """That the quote was for."""
    done: int
    """Of these."""
    quoted: float
    """Hours that were quoted for those that are done."""
    took: float
    """Hours that they took."""
    hours: float
    """Hours that were quoted for all ..."""
    low: float
    """... and between what."""
    high: float


def keep(made: Quote, planned: Plan, ledger: Ledger) -> None:
    """Write a quote down for `compare`; one without a price is none.

    Raises:
        LedgerError: If the ledger cannot be written.
    """
    if made.hours and made.trials:
        # Those whose learning rate is still to be chosen have yet to get their ids.
        labels = {point.trial_id: point.label for point in planned.sweep.undecided}
        priced = {labels.get(name, name): round(one, 3) for name, one in made.trials.items()}
        record = {**made.to_json(), "trials": priced}
        ledger.notes.put_quote(planned.sweep.name, new_attempt(), record)


def compare(sweep: Sweep, ledger: Ledger) -> Comparison | None:
    """Return a sweep's last quote beside what its trials took; None: there is no quote.

    Raises:
        LedgerError: If the ledger cannot be read.
    """
    made = ledger.notes.last_quote(sweep.name)
    if made is None:
        return None
    ids = {point.label: point.trial_id for point in sweep.points}
    priced: Mapping[str, float] = {ids.get(k, k): seconds for k, seconds in made["trials"].items()}
    rows = _seconds(ledger, priced)
    return Comparison(
        device=made["device"],
        trials=len(priced),
        done=len(rows),
        quoted=sum(priced[name] for name in rows) / 3600,
        took=sum(rows.values()) / 3600,
        hours=made["hours"],
        low=made["low"],
        high=made["high"],
    )


def _seconds(ledger: Ledger, ids: Collection[str]) -> dict[str, float]:
    columns = ["trial_id", "device", "seconds", "cpu_seconds"]
    rows = ledger.trials(list(ids), columns=columns).to_pylist()
    return {
        row["trial_id"]: own_seconds(row["device"], row["seconds"], row["cpu_seconds"])
        for row in rows
    }
