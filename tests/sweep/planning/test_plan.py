from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fpt.tasks import TASKS
from sweep.ledger.ledger import Committed, Ledger, LedgerError
from sweep.planning.packing import Workers
from sweep.planning.plan import STATUSES, Plan, plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.schema import SweepFileError
from sweep.sweepfile.trials import Point, Sweep
from tests.support import STARTED, failure_row, trial_row

FILE = """\
sweep: demo
trial:
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  steps: 10
backbones:
  second: {task: bit-xor, pretraining: first, seed: 0}
  first: {task: bit-memory, seed: 0}
axes:
  task: [bit-xor]
  pretraining: [random, first, second]
  seed: [0, 1]
"""
FIRST, SECOND = "first", "second"
RANDOM = [f"bit-xor/random/{seed}" for seed in (0, 1)]
ON_FIRST = [f"bit-xor/first/{seed}" for seed in (0, 1)]
ON_SECOND = [f"bit-xor/second/{seed}" for seed in (0, 1)]

Make = Callable[..., tuple[Sweep, Ledger]]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    file = tmp_path / "sweep.yaml"
    file.write_text(FILE)
    return load(file)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results", write=True)


def named(sweep: Sweep, label: str) -> Point:
    return next(point for point in sweep.all if point.label == label)


def train(sweep: Sweep, ledger: Ledger, *labels: str, backbone: bool = True, **row: Any) -> None:
    for label in labels:
        point = named(sweep, label)
        if point in sweep.pretrainings and backbone:
            ledger.put_backbone(point.trial_id, b"weights")
        assert ledger.commit(trial_row(point, **row)) == Committed()


def statuses(planned: Plan) -> dict[str, str]:
    return {point.label: planned.status[point.trial_id] for point in planned.sweep.all}


def to_run(planned: Plan) -> list[str]:
    return [point.label for pack in planned.packs for point in pack.points]


def test_of_an_empty_ledger_all_is_to_be_trained(sweep: Sweep, tmp_path: Path) -> None:
    planned = plan(sweep, tmp_path / "nothing", workers=Workers(2))
    assert not (tmp_path / "nothing").exists()
    assert statuses(planned) == {
        FIRST: "missing", SECOND: "blocked",
        **dict.fromkeys(RANDOM, "missing"), **dict.fromkeys(ON_FIRST + ON_SECOND, "blocked"),
    }  # fmt: skip
    assert to_run(planned) == [FIRST, SECOND, *RANDOM, *ON_FIRST, *ON_SECOND]
    assert (
        planned.why[named(sweep, ON_SECOND[0]).trial_id] == "after second, whose backbone it takes"
    )
    assert all(dict(pack.resources) == {"CPU": 1} for pack in planned.packs)
    assert all(len(pack.points) == 1 for pack in planned.packs)


def test_counts_and_json(sweep: Sweep, ledger: Ledger) -> None:
    train(sweep, ledger, RANDOM[0])
    planned = plan(sweep, ledger)
    assert planned.counts() == {
        "done": 1, "diverged": 0, "missing": 2, "blocked": 5, "failed": 0, "stale": 0
    }  # fmt: skip
    assert tuple(planned.counts()) == STATUSES
    told = json.loads(json.dumps(planned.to_json()))
    assert told["counts"]["missing"] == 2
    assert len(told["trials"]) == len(sweep.all)
    assert told["trials"][2] == {
        "trial_id": named(sweep, RANDOM[0]).trial_id,
        "cell_id": named(sweep, RANDOM[0]).cell_id,
        "label": RANDOM[0],
        "labels": {"task": "bit-xor", "pretraining": "random", "seed": "0"},
        "status": "done",
        "why": None,
        "needs": None,
    }
    assert [ids[0] for ids in told["to_run"]] == [pack.points[0].trial_id for pack in planned.packs]
    assert sum(told["packs"].pop("members").values()) == len(planned.packs)
    assert told["packs"] == {
        "at_a_time": len(psutil.Process().cpu_affinity()), "resources": {"CPU": 1},
        "estimated_saving": round(planned.saving, 3), "measured_no_quicker": 0,
        "measured_not_exact": 0, "seeds_apart": 0,
    }  # fmt: skip


def test_what_is_done_is_not_trained_again(sweep: Sweep, ledger: Ledger) -> None:
    train(sweep, ledger, FIRST, RANDOM[0], ON_FIRST[1])
    train(sweep, ledger, RANDOM[1], outcome="diverged", stopped="diverged")
    planned = plan(sweep, ledger)
    assert statuses(planned) == {
        FIRST: "done", SECOND: "missing", RANDOM[0]: "done", RANDOM[1]: "diverged",
        ON_FIRST[0]: "missing", ON_FIRST[1]: "done", **dict.fromkeys(ON_SECOND, "blocked"),
    }  # fmt: skip
    assert to_run(planned) == [SECOND, ON_FIRST[0], *ON_SECOND]
    train(sweep, ledger, SECOND, ON_FIRST[0], *ON_SECOND)
    assert plan(sweep, ledger).packs == ()


def test_the_rows_of_another_sweep_count(sweep: Sweep, ledger: Ledger, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FILE.replace("demo", "other").replace("[random, first, second]", "[random]"))
    train(load(other), ledger, "bit-xor/random/0")
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "done"


def test_a_lost_backbone_is_trained_again_only_if_it_is_needed(
    sweep: Sweep, ledger: Ledger
) -> None:
    train(sweep, ledger, FIRST, SECOND, backbone=False)
    train(sweep, ledger, *RANDOM, *ON_FIRST, *ON_SECOND)
    assert to_run(plan(sweep, ledger)) == []
    # One trial on the second is missing: both pretrainings have to be trained again.
    (ledger.local or Path()).joinpath(
        "trials", f"{named(sweep, ON_SECOND[1]).trial_id}.parquet"
    ).unlink()
    planned = plan(sweep, ledger)
    assert to_run(planned) == [FIRST, SECOND, ON_SECOND[1]]
    assert statuses(planned)[FIRST] == "missing"
    assert "its backbone is gone" in planned.why[named(sweep, FIRST).trial_id]
    assert statuses(planned)[SECOND] == "blocked"
    ledger.put_backbone(named(sweep, SECOND).trial_id, b"weights")
    assert to_run(plan(sweep, ledger)) == [ON_SECOND[1]]


@pytest.mark.parametrize(
    ("cause", "status"),
    [("code", "failed"), ("data", "failed"), ("memory", "missing"), ("worker", "missing"),
     ("storage", "missing"), ("interrupted", "missing")],
)  # fmt: skip
def test_only_what_has_to_be_mended_waits(
    sweep: Sweep, ledger: Ledger, cause: str, status: str
) -> None:
    ledger.fail(failure_row(named(sweep, RANDOM[0]), cause=cause, message="too large\nby far"))
    planned = plan(sweep, ledger)
    assert statuses(planned)[RANDOM[0]] == status
    assert (RANDOM[0] in to_run(planned)) == (status == "missing")
    if status == "failed":
        assert planned.why[named(sweep, RANDOM[0]).trial_id] == f"{cause}: OverflowError: too large"


def test_the_last_failure_counts_and_forgiveness_ends_it(sweep: Sweep, ledger: Ledger) -> None:
    point = named(sweep, RANDOM[0])
    later = STARTED + dt.timedelta(minutes=1)
    ledger.fail(failure_row(point, attempt="a1", cause="worker"))
    ledger.fail(failure_row(point, attempt="a2", cause="code", at=later))
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "failed"
    ledger.reset_failures([point.trial_id])
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "missing"
    much_later = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1)
    ledger.fail(failure_row(point, attempt="a3", cause="data", at=much_later))
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "failed"
    # A row wins: another machine got it done.
    train(sweep, ledger, RANDOM[0])
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "done"


def test_a_retry_outdoes_a_clock_that_is_ahead(sweep: Sweep, ledger: Ledger) -> None:
    point = named(sweep, RANDOM[0])
    ahead = dt.datetime.now(dt.UTC) + dt.timedelta(minutes=10)
    ledger.fail(failure_row(point, at=ahead))
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "failed"

    ledger.reset_failures([point.trial_id])

    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "missing"


def test_a_mark_of_work_done_twice_lets_nothing_run(sweep: Sweep, ledger: Ledger) -> None:
    # An attempt found a row of somebody else's, and that row was lost since.
    point = named(sweep, RANDOM[0])
    later = STARTED + dt.timedelta(minutes=1)
    ledger.fail(failure_row(point, attempt="a1", cause="code"))
    ledger.fail(failure_row(point, attempt="a2", cause="doubled", at=later))

    planned = plan(sweep, ledger)

    assert statuses(planned)[RANDOM[0]] == "failed"
    assert planned.why[point.trial_id] == "code: OverflowError: too large"
    assert RANDOM[0] not in to_run(planned)


def test_what_needs_a_trial_that_will_not_run_is_blocked_for_good(
    sweep: Sweep, ledger: Ledger
) -> None:
    ledger.fail(failure_row(named(sweep, FIRST)))
    planned = plan(sweep, ledger)
    assert {statuses(planned)[label] for label in (SECOND, *ON_FIRST, *ON_SECOND)} == {"blocked"}
    assert to_run(planned) == RANDOM
    assert (
        "first, whose backbone it takes, failed" in planned.why[named(sweep, ON_FIRST[0]).trial_id]
    )


def test_a_diverged_pretraining_is_not_trained_again(sweep: Sweep, ledger: Ledger) -> None:
    train(sweep, ledger, FIRST, backbone=False, outcome="diverged", stopped="diverged")
    planned = plan(sweep, ledger)
    assert statuses(planned)[FIRST] == "diverged"
    assert to_run(planned) == RANDOM
    assert "diverged" in planned.why[named(sweep, ON_FIRST[0]).trial_id]


def older(point: Point) -> dict[str, Any]:
    """The row of a trial that was trained under an older version of its task."""
    identity = point.config.identity()
    identity["task"]["version"] = 0
    return trial_row(point, trial_id="0" * 11 + "1", task_version=0, config=json.dumps(identity))


def test_stale_trials_are_shown_and_run_only_when_asked(sweep: Sweep, ledger: Ledger) -> None:
    ledger.commit(older(named(sweep, RANDOM[0])))
    planned = plan(sweep, ledger)
    assert statuses(planned)[RANDOM[0]] == "stale"
    assert statuses(planned)[RANDOM[1]] == "missing"
    assert "000000000001" in planned.why[named(sweep, RANDOM[0]).trial_id]
    assert RANDOM[0] not in to_run(planned)
    asked = plan(sweep, ledger, stale=True)
    assert statuses(asked) == statuses(planned)
    assert to_run(asked) == [FIRST, SECOND, *RANDOM, *ON_FIRST, *ON_SECOND]
    train(sweep, ledger, RANDOM[0])
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "done"


def test_what_needs_a_stale_trial_waits_with_it(sweep: Sweep, ledger: Ledger) -> None:
    ledger.commit(older(named(sweep, FIRST)))
    planned = plan(sweep, ledger)
    assert to_run(planned) == RANDOM
    assert "is stale" in planned.why[named(sweep, ON_FIRST[0]).trial_id]
    assert to_run(plan(sweep, ledger, stale=True)) == [
        FIRST, SECOND, *RANDOM, *ON_FIRST, *ON_SECOND,
    ]  # fmt: skip


def test_an_older_identity_is_stale_too(
    sweep: Sweep, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.commit(trial_row(named(sweep, RANDOM[0]), trial_id="0" * 12, identity_version=0))
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "stale"


def test_a_version_bump_makes_a_whole_ledger_stale(
    sweep: Sweep, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(sweep, ledger, FIRST, SECOND, *RANDOM, *ON_FIRST, *ON_SECOND)
    monkeypatch.setattr(TASKS["bit-xor"], "version", 99)
    again = load(sweep.file)
    found = statuses(plan(again, ledger))
    # The ids of what takes the second pretraining's backbone have changed with its own.
    assert found == {
        FIRST: "done", SECOND: "stale", **dict.fromkeys(RANDOM + ON_FIRST, "stale"),
        **dict.fromkeys(ON_SECOND, "blocked"),
    }  # fmt: skip


def test_other_rows_may_be_damaged_but_not_ours(sweep: Sweep, ledger: Ledger) -> None:
    train(sweep, ledger, RANDOM[0])
    trials = (ledger.local or Path()) / "trials"
    (trials / f"{'0' * 12}.parquet").write_bytes(b"PAR1 but not really")
    assert statuses(plan(sweep, ledger))[RANDOM[0]] == "done"
    ours = trials / f"{named(sweep, RANDOM[1]).trial_id}.parquet"
    ours.write_bytes(b"")
    with pytest.raises(LedgerError, match=ours.name):
        plan(sweep, Ledger(ledger.uri))


def test_a_backbone_of_another_file(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "taker.yaml"
    text = FILE[: FILE.index("backbones:")] + (
        "axes:\n  task: [bit-xor]\n  pretraining: ['trial:0123456789ab']\n  seed: [0]\n"
    )
    file.write_text(text)
    planned = plan(file, ledger)
    assert planned.counts()["blocked"] == 1
    assert planned.packs == ()
    assert "0123456789ab, which this file does not train" in next(iter(planned.why.values()))
    (point,) = planned.sweep.points
    ledger.commit(trial_row(point, trial_id="0123456789ab"))
    ledger.put_backbone("0123456789ab", b"weights")
    assert len(plan(file, ledger).packs) == 1


def test_trials_of_one_backbone_come_one_after_another(tmp_path: Path, ledger: Ledger) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "sweep: x\ntrial: {steps: 1, task: bit-xor, pretraining: random}\n"
        "axes:\n  seed: [0, 1, 2]\n  backbone:\n"
        "  - {name: gpt2, layers: 2, width: 32, heads: 2, label: a}\n"
        "  - {name: gpt2, layers: 1, width: 32, heads: 2, label: b}\n"
    )
    planned = plan(str(file), str(ledger.uri), workers=Workers(2, gpus=0.5))
    assert to_run(planned) == ["0/a", "1/a", "2/a", "0/b", "1/b", "2/b"]
    assert all(dict(pack.resources) == {"CPU": 1, "GPU": 0.5} for pack in planned.packs)


def test_a_wrong_file_or_ledger_is_told(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError, match="no such file"):
        plan(tmp_path / "none.yaml", tmp_path / "results")
    (tmp_path / "sweep.yaml").write_text(FILE)
    with pytest.raises(LedgerError):
        plan(tmp_path / "sweep.yaml", "ftp://somewhere/results")


PACKED = """\
sweep: packed
trial:
  task: bit-xor
  backbone: {name: gpt2, layers: 2, width: 32, heads: 2}
  pretraining: random
  backbone_seed: 0
  batch_size: 4
  steps: 10
backbones:
  own: {task: bit-memory, seed: 0}
axes:
  pretraining: [random, own]
  seed: [0, 1, 2]
"""


@pytest.mark.parametrize(
    ("more", "workers", "expected"),
    [
        ("", 1, [1, 3, 3]),
        ("", 2, [1, 2, 1, 2, 1]),  # no worker idles for the sake of a larger pack
        ("pack: auto\n", 1, [1, 3, 3]),
        ("pack: off\n", 1, [1] * 7),
        ("pack: 2\n", 1, [1, 2, 1, 2, 1]),
        ("pack: 1\n", 1, [1] * 7),
    ],
)
def test_trials_that_share_a_backbone_train_together(
    more: str, workers: int, expected: list[int], tmp_path: Path, ledger: Ledger
) -> None:
    file = tmp_path / "packed.yaml"
    file.write_text(PACKED + more)

    planned = plan(file, ledger, workers=Workers(workers))

    assert [len(pack.points) for pack in planned.packs] == expected
    assert (planned.saving > 0) == (max(expected) > 1)
    for pack in planned.packs:
        assert len({point.config.pretraining for point in pack.points}) == 1


def test_what_packs_were_measured_not_to_help_is_left_alone(tmp_path: Path, ledger: Ledger) -> None:
    file, other = tmp_path / "packed.yaml", tmp_path / "other.yaml"
    text = PACKED.replace("[random, own]", "[random]")
    file.write_text(text)
    other.write_text(text.replace("[0, 1, 2]", "[3, 4, 5, 6, 7, 8]"))
    for number, point in enumerate(load(other).points):
        ledger.commit(trial_row(point, pack_size=1 if number < 3 else 3, seconds=1 + number))

    planned = plan(file, ledger, workers=Workers(1))

    assert [len(pack.points) for pack in planned.packs] == [1, 1, 1, 1]
    assert planned.apart == 3
    assert planned.to_json()["packs"]["measured_no_quicker"] == 3
    off = tmp_path / "off.yaml"
    off.write_text(text + "pack: 3\n")  # who gives a number means it
    assert plan(off, ledger, workers=Workers(1)).apart == 0


def test_what_packs_are_not_exact_for_is_left_alone_whoever_asks(
    tmp_path: Path, ledger: Ledger
) -> None:
    file = tmp_path / "packed.yaml"
    file.write_text(PACKED.replace("[random, own]", "[random]") + "pack: 3\n")
    first, *_ = load(file).points
    ledger.commit(trial_row(first, row_padding=0))

    planned = plan(file, ledger, workers=Workers(1))

    left = sum(len(pack.points) for pack in planned.packs)
    assert [len(pack.points) for pack in planned.packs] == [1] * left
    assert (planned.inexact, planned.apart) == (2, 0)
    assert planned.to_json()["packs"]["measured_not_exact"] == 2


STEPS = """\
sweep: steps
trial:
  task: bit-xor
  backbone: {{name: gpt2, layers: 2, width: 32, heads: 2}}
  pretraining: random
  evaluation: {{every: 10}}
  {more}
axes:
  steps: {steps}
  seed: [0]
"""


@pytest.mark.parametrize(
    ("more", "done", "kept", "expected", "why"),
    [
        ("", [10, 20], [10, 20], "20", "goes on from step 20 of "),
        ("", [10, 20], [10], "10", "goes on from step 10 of "),
        ("", [10, 15], [10, 15], "10", "goes on from step 10 of "),  # 15 was out of turn
        ("", [15], [15], None, "its last evaluation, at step 15, is none of this one's"),
        ("", [10], [], None, "its tensors were not kept"),
        ("stop: {patience: 3}", [10], [10], None, "a stop rule ended it, or could have"),
        ("optimizer: {schedule: cosine}", [10], [10], None, "its rate followed a cosine over"),
        ("optimizer: {warmup: 5}", [10], [10], "10", "goes on from step 10 of "),
    ],
)
def test_a_longer_training_goes_on_from_the_longest_shorter_one(
    more: str,
    done: list[int],
    kept: list[int],
    expected: str | None,
    why: str,
    ledger: Ledger,
    tmp_path: Path,
) -> None:
    file = tmp_path / "steps.yaml"
    file.write_text(STEPS.format(more=more, steps=[*done, 40]))
    sweep = load(file)
    for steps in done:
        train(sweep, ledger, f"{steps}/0", steps=steps, evaluate_every=10)
    for steps in kept:
        ledger.put_state(named(sweep, f"{steps}/0").trial_id, b"state")

    planned = plan(sweep, ledger)

    (pack,) = planned.packs
    assert [point.label for point in pack.points] == ["40/0"]
    told = planned.why[pack.points[0].trial_id]
    assert why in told
    assert told.startswith("goes on" if expected else "begins anew, and not from step ")
    name = named(sweep, f"{expected}/0").trial_id if expected else None
    assert dict(pack.extends) == ({pack.points[0].trial_id: name} if name else {})


def test_a_forgotten_trial_that_goes_on_from_a_shorter_one_says_both(
    ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / "steps.yaml"
    file.write_text(STEPS.format(more="", steps=[10, 40]))
    sweep = load(file)
    for steps in (10, 40):
        train(sweep, ledger, f"{steps}/0", steps=steps, evaluate_every=10)
        ledger.put_state(named(sweep, f"{steps}/0").trial_id, b"state")
    short, long = (named(sweep, f"{steps}/0").trial_id for steps in (10, 40))

    assert ledger.forget(long)
    planned = plan(sweep, ledger)

    today = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    told = f"forgotten on {today}; to be trained again; goes on from step 10 of {short}"
    assert planned.why == {long: told}
    assert planned.status[long] == "missing"
    train(sweep, ledger, "40/0")
    assert plan(sweep, ledger).why == {}
