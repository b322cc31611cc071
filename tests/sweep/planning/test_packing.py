"""How packs are formed, over configs and figures alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fpt.config import TrialConfig
from fpt.packing import RESIDENT_BYTES, pack_key
from sweep.ledger.ledger import Ledger
from sweep.planning import packing
from sweep.planning.packing import (
    CPU_ROWS,
    Device,
    Workers,
    form,
    kind_of,
    no_quicker,
    not_exact,
    saving,
    seeds_apart,
)
from sweep.sweepfile.identity import cell_id, trial_id
from sweep.sweepfile.trials import Point
from tests.support import trial_row


def point(seed: int = 0, bits: int = 5, **fields: Any) -> Point:
    """A trial of 2 x bits tokens."""
    config = TrialConfig.model_validate(
        {
            "task": {"name": "bit-xor", "bits": bits},
            "backbone": {"name": "gpt2", "layers": 2, "width": 32, "heads": 2},
            "pretraining": "random",
            "backbone_seed": 0,
            "batch_size": 4,
            "steps": 100,
            "seed": seed,
            **fields,
        }
    )
    return Point(trial_id(config), cell_id(config), config, {"seed": str(seed)}, "file.yaml:1")


def seeds(count: int, **fields: Any) -> list[Point]:
    return [point(seed, **fields) for seed in range(count)]


def sizes_of(points: list[Point], workers: int = 1, most: int | None = None) -> list[int]:
    return [len(pack) for pack in form([points], Workers(workers), most)]


@pytest.mark.parametrize(
    ("count", "batch", "expected"),
    [
        (16, 4, [16]),  # 40 rows each
        (17, 4, [9, 8]),
        (5, 16, [3, 2]),  # 160 rows: four fit
        (2, 32, [1, 1]),  # 320 rows: two would fit, and save less than members cost
        (3, 100, [1, 1, 1]),
    ],
)
def test_packs_are_as_large_as_pays_and_about_as_large_as_each_other(
    count: int, batch: int, expected: list[int]
) -> None:
    assert sizes_of(seeds(count, batch_size=batch)) == expected


def test_a_gpu_holds_as_many_as_their_launches_pay_for() -> None:
    """Of few rows the launches are nearly all; of GPT-2 base the operations soon are."""
    tiny, base = {}, {"backbone": {"name": "gpt2", "layers": 12, "width": 768, "heads": 12}}

    def packs(workers: Workers, **fields: Any) -> list[int]:
        return [len(pack) for pack in form([seeds(40, batch_size=64, **fields)], workers)]

    gpu = Workers(1, gpus=1, gpu_memory=1e12)
    assert packs(gpu, **tiny) == [40]  # of 640 rows each: on a core not even two
    assert packs(gpu, **base) == [20, 20]
    saved = saving([seeds(16)], gpu), saving([seeds(16, **base)], gpu)
    assert 1 / (1 - saved[0]) == pytest.approx(1.24 / (0.14 + 1.1 / 16), rel=0.01)
    assert saved[0] > saved[1] > 0.5


def test_fixed_seconds_on_a_gpu_are_those_of_layers_and_members() -> None:
    gpu, core = Workers(1, gpus=1), Workers(1)

    def seconds(layers: int, members: int, row: float = 1e6) -> float:
        return gpu.fixed_operations(layers, row, members) / gpu.speed

    assert seconds(12, 1) == pytest.approx(12 * 1.24e-3)  # 12 to 18 ms a step were projected
    assert seconds(24, 1) == pytest.approx(2 * seconds(12, 1))
    assert seconds(12, 16) - seconds(12, 1) == pytest.approx(15 * 12 * 0.14e-3)
    assert seconds(12, 1, row=1e9) == seconds(12, 1)  # launches do not depend on the width
    assert core.fixed_operations(12, 2e6) == 2 * core.fixed_operations(12, 1e6)


def test_packs_on_a_gpu_fit_the_smallest_one_that_was_asked() -> None:
    large, small = (
        Device(name, gigabytes * 10**9, (9, 0)) for name, gigabytes in [("A", 80), ("B", 24)]
    )
    workers = Workers(1, gpus=0.5)

    assert workers.on([]) == workers
    assert Workers(1).on([large]) == Workers(1)
    assert workers.on([large, large]).device_name == "A"
    assert workers.on([large, small]).device_name is None
    assert workers.on([large, small]).memory == 12e9

    wide = seeds(
        8, batch_size=64, backbone={"name": "gpt2", "layers": 12, "width": 768, "heads": 12}
    )
    member = packing._Member.of(wide[0])
    for device in (large, small):
        most = device.memory * 0.5 * packing.MEMORY_SHARE / member.size
        packs = form([wide], workers.on([device]))
        assert max(map(len, packs)) <= max(1, most)


@pytest.mark.parametrize(
    ("count", "workers", "expected"),
    [
        (3, 2, [2, 1]),
        (4, 2, [2, 2]),
        (2, 4, [1, 1]),
        (6, 4, [2, 1, 2, 1]),
        (16, 3, [5, 6, 5]),
        (64, 2, [16, 16, 16, 16]),
        (48, 2, [12, 12, 12, 12]),
    ],
)
def test_no_worker_idles_for_a_larger_pack(count: int, workers: int, expected: list[int]) -> None:
    assert sizes_of(seeds(count), workers) == expected


def test_a_number_is_the_most_members_whether_they_pay_or_not() -> None:
    assert sizes_of(seeds(5, batch_size=64), most=2) == [2, 1, 2]
    assert sizes_of(seeds(5), most=1) == [1] * 5


def test_memory_bounds_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "memory", 5 * packing._Member.of(point()).size)

    assert sizes_of(seeds(4)) == [2, 2]


def test_trials_of_about_as_many_steps_come_together() -> None:
    points = [point(seed, steps=steps) for seed in range(10) for steps in (100, 1000)]

    first, second = form([points], Workers(1), most=10)

    assert {p.config.steps for p in first} == {100}
    assert {p.config.steps for p in second} == {1000}


def test_packs_stand_where_their_first_members_stood_and_members_keep_their_order() -> None:
    other = seeds(2, bits=6)
    points = [*seeds(2), *other, *seeds(4)[2:]]

    assert form([points], Workers(1)) == [tuple(seeds(4)), tuple(other)]


def test_what_trains_attention_and_what_waits_is_not_packed_with_the_others() -> None:
    whole = seeds(2, train="all")
    first, last = seeds(2), [point(9)]

    packs = form([[*whole, *first], last], Workers(1))

    assert packs == [(whole[0],), (whole[1],), tuple(first), tuple(last)]


members = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 5]),
        "batch_size": st.integers(1, 80),
        "steps": st.integers(1, 3) | st.just(1000),
        "backbone_seed": st.sampled_from([0, None]),
        "train": st.sampled_from(["fpt", "all"]),
    }
)


A_WORKER_EACH = [
    {"bits": 2, "batch_size": size, "steps": 1000, "backbone_seed": 0, "train": "fpt"}
    for size in (1, 1, 3)
]


@given(st.lists(members, max_size=25), st.integers(1, 5), st.none() | st.integers(1, 6))
@example(A_WORKER_EACH, 3, None)
def test_each_trial_is_in_one_pack_and_packs_hold_what_they_may(
    fields: list[dict[str, Any]], workers: int, most: int | None
) -> None:
    points = [point(seed, **one) for seed, one in enumerate(fields)]

    packs = form([points], Workers(workers), most)

    assert sorted(p.trial_id for pack in packs for p in pack) == sorted(p.trial_id for p in points)
    assert len(packs) >= min(workers, len(points))
    for pack in packs:
        rows = [p.config.batch_size * 2 * p.config.task.bits for p in pack]  # type: ignore[attr-defined]
        assert len({pack_key(p.config) for p in pack}) == 1
        assert len(pack) == 1 or sum(rows) <= CPU_ROWS or most is not None
        assert most is None or len(pack) <= most
    saved = saving(packs, Workers(workers))
    assert saved < 1
    assert saved >= 0 or most is not None  # a number holds whether packs pay or not


def test_the_estimate_is_that_of_what_was_measured() -> None:
    # GPT-2 base: 1.83 / 1.15 and 1.19 / 1.16 times (design of packs: CPU time, two cores).
    base = {"backbone": {"name": "gpt2", "layers": 12, "width": 768, "heads": 12}}
    assert 1 / (1 - saving([seeds(16, **base)], Workers(1))) == pytest.approx(1.59, abs=0.05)
    memory = seeds(4, bits=60, **base)  # 480 rows
    assert 1 / (1 - saving([memory], Workers(1))) == pytest.approx(1.03, abs=0.02)
    assert saving([[one] for one in memory], Workers(1)) == 0


def test_members_that_end_early_save_no_more_from_then_on() -> None:
    short, long = point(0, steps=10), point(1, steps=1000)
    together = seeds(2, steps=10)

    alike, apart = saving([together], Workers(1)), saving([[short, long]], Workers(1))

    assert alike > 10 * apart > 0


BASE = {"name": "gpt2", "layers": 12, "width": 768, "heads": 12}
TINY = {"name": "gpt2", "size": "tiny"}


def test_seeds_that_draw_a_backbone_each_pack_where_that_pays() -> None:
    def packs(count: int, **fields: Any) -> list[int]:
        return sizes_of(seeds(count, backbone_seed=None, **fields))

    assert packs(16, backbone=TINY) == [16]
    assert packs(3, backbone=TINY, batch_size=16) == [1, 1, 1]
    assert packs(3, backbone=BASE) == [1, 1, 1]
    assert packs(3, backbone={"name": "longformer", "size": "tiny"}) == [1, 1, 1]
    # As measured: 1.28, 1.02 and 0.93 times.
    for count, batch, gain in ((6, 4, 1.28), (3, 16, 1.02), (3, 32, 0.95)):
        pack = seeds(count, backbone_seed=None, backbone=TINY, batch_size=batch)
        assert 1 / (1 - saving([pack], Workers(1))) == pytest.approx(gain, abs=0.04)
    # Seeds that two rates have each are two backbones, and not four.
    own: Any = {"backbone_seed": None, "backbone": TINY}
    alike = [point(s, learning_rate=r, **own) for s in (0, 1) for r in (0.1, 0.2)]
    assert packing.backbones(alike) == 2 == packing.backbones(seeds(2, **own))
    assert packing.backbones(seeds(4)) == 1
    assert saving([alike], Workers(1)) > saving([seeds(4, **own)], Workers(1))


def test_a_number_of_members_holds_for_backbones_of_their_own_too() -> None:
    assert sizes_of(seeds(5, backbone_seed=None, batch_size=64), most=2) == [2, 1, 2]
    assert sizes_of(seeds(5, backbone_seed=None), most=1) == [1] * 5


def test_memory_counts_the_backbones_of_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the width 32, two layers: 98 kB a backbone.
    size, backbone = packing._Member.of(point()).size, 4 * 12 * 2 * 32**2
    monkeypatch.setattr(Workers, "memory", 2 * (4 * size + backbone))

    assert sizes_of(seeds(4)) == [4]
    assert sizes_of(seeds(4, backbone_seed=None)) == [2, 2]


def test_trials_that_a_fixed_draw_would_pack_are_counted() -> None:
    drawn, large = seeds(3, backbone_seed=None), seeds(3, backbone_seed=None, batch_size=64)
    fixed, single = [point(7, backbone_seed=5)], [point(8, bits=6, backbone_seed=None)]
    base = seeds(4, backbone_seed=None, backbone=BASE)
    packs = form([[*drawn, *large, *fixed, *single, *base]], Workers(1))

    assert [len(pack) for pack in packs] == [3, *[1] * 9]
    assert seeds_apart(packs, Workers(1)) == 4
    # Alone for the sake of a worker that would idle.
    assert seeds_apart(form([drawn[:2]], Workers(2)), Workers(2)) == 0


# ------------------------------------------------------------------------------ what was measured


def rows(ledger: Ledger, first: int, size: int, seconds: float, **more: Any) -> None:
    for seed in range(first, first + 3):
        ledger.commit(trial_row(point(seed), pack_size=size, seconds=seconds, **more))


@pytest.mark.parametrize(
    ("alone", "packed", "more", "told"),
    [
        (1.0, 1.1, {}, True),
        (1.0, 1.0, {}, True),
        (1.0, 0.9, {}, False),
        (1.0, 1.1, {"device": "cuda"}, False),
        (1.0, 1.1, {"device_name": "another processor"}, False),
        (1.0, 1.1, {"attempts": 2}, False),
        (1.0, 1.1, {"extended_from": "0" * 12}, False),
        (1.0, 1.1, {"steps_trained": 200}, False),
        (0.1, 0.2, {}, False),  # too short to tell
    ],
)
def test_the_ledger_tells_what_is_no_quicker_in_packs(
    alone: float, packed: float, more: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    rows(ledger, 0, 1, alone)
    rows(ledger, 3, 4, packed, **more)

    found = no_quicker(ledger, "cpu")

    assert found == (frozenset([kind_of(point().config)]) if told else frozenset())
    packs = form([seeds(3)], Workers(1), alone=found)
    assert [len(pack) for pack in packs] == ([1, 1, 1] if told else [3])


def test_one_machine_that_packs_help_is_enough_and_few_rows_are_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    rows(ledger, 0, 1, 1.0)
    ledger.commit(trial_row(point(3), pack_size=2, seconds=1.5))
    ledger.commit(trial_row(point(4), pack_size=2, seconds=1.5))
    assert no_quicker(ledger, "cpu") == frozenset()
    ledger.commit(trial_row(point(5), pack_size=2, seconds=1.5))
    assert no_quicker(ledger, "cpu")
    rows(ledger, 6, 1, 4.0, device_name="another processor")
    rows(ledger, 9, 4, 2.0, device_name="another processor")
    assert no_quicker(ledger, "cpu") == frozenset()


def test_the_ledger_tells_what_is_not_exact_in_packs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    kind = kind_of(point().config)
    assert not_exact(ledger, "cpu") == frozenset()
    ledger.commit(trial_row(point(0), row_padding=None))
    ledger.commit(trial_row(point(1, bits=6), row_padding=16))
    assert not_exact(ledger, "cpu") == frozenset()
    ledger.commit(trial_row(point(2), row_padding=0))
    # Alone, and so of trials that share a backbone as of those that draw one each.
    assert not_exact(ledger, "cpu") == {kind, (*kind[:-1], True)}
    assert not_exact(ledger, "cuda") == frozenset()
    ledger.commit(trial_row(point(3), row_padding=16))  # left alone by then
    assert kind in not_exact(ledger, "cpu")
    ledger.commit(trial_row(point(4), row_padding=32, device_name="another processor"))
    assert not_exact(ledger, "cpu") == frozenset()


def test_packs_of_shared_and_of_drawn_backbones_are_told_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    own = {"backbone_seed": None}
    shared, drawn = kind_of(point().config), kind_of(point(**own).config)
    assert shared != drawn
    assert shared[:-1] == drawn[:-1]

    rows(ledger, 0, 1, 1.0)  # alone both are the same
    for seed in range(3, 6):  # a pack in which each has drawn a backbone: slower
        row = trial_row(point(seed, **own), pack_size=3, attempt="drawn", seconds=1.5)
        ledger.commit(row)
    assert no_quicker(ledger, "cpu") == {drawn}
    rows(ledger, 6, 3, 0.8, attempt="shared")  # and quicker where it is one
    assert no_quicker(ledger, "cpu") == {drawn}
    rows(ledger, 9, 3, 1.2, attempt="slower", device_name="another processor")
    assert no_quicker(ledger, "cpu") == {drawn}


def test_a_gpu_has_room_for_a_set_that_stays_there() -> None:
    drawn = seeds(4, batch_size=64)
    stays = seeds(4, batch_size=64, task={"name": "digits"})
    assert packing.resident(drawn[0].config, Workers(1, gpus=1)) == 0
    assert packing.resident(stays[0].config, Workers(1)) == 0
    assert packing.resident(stays[0].config, Workers(1, gpus=1)) == RESIDENT_BYTES

    member = packing._Member.of(stays[0]).size
    for room, expected in ((4 * member + RESIDENT_BYTES, [4]), (4 * member, [1, 1, 1, 1])):
        workers = Workers(1, gpus=1, gpu_memory=room / packing.MEMORY_SHARE)
        assert [len(pack) for pack in form([stays], workers)] == expected


def test_other_batches_are_another_kind() -> None:
    same = kind_of(point(1, learning_rate=0.5).config) == kind_of(point().config)
    assert same
    for field in ({"batch_size": 5}, {"dropout": 0.0}, {"bits": 6}, {"evaluation": {"every": 7}}):
        assert kind_of(point(**field).config) != kind_of(point().config)
