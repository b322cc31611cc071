"""Order, dependencies, retries and giving up, over stub plans: no Ray, no ledger."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.execution.job import Job, Result
from sweep.execution.scheduler import SAME_FAILURE, Event, Scheduler, decide
from sweep.sweepfile.schema import LimitsSpec, RetrySpec


class Stub:
    """A point: all that a scheduler looks at."""

    def __init__(self, name: str, parent: str | None = None) -> None:
        self.trial_id = self.label = self.cell_id = name
        self.parent = parent
        self.config = SimpleNamespace(batch_size=16, kind=name[0])
        self.like = SimpleNamespace(own_classes=())


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials whose names begin with the same letter are of a kind."""
    monkeypatch.setattr("sweep.execution.scheduler.kind_of", lambda config: (config.kind,))


TYPE_ERROR: dict[str, Any] = {"status": "failed", "cause": "code", "exception": "TypeError"}


def scheduler_of(
    *points: Stub | tuple[Stub, ...],
    failures: dict[str, int] | None = None,
    keep: bool | None = None,
    retry: RetrySpec | None = None,
    **options: Any,
) -> tuple[Scheduler, list[Event]]:
    """The scheduler of a pack for each point, or tuple of points."""
    events: list[Event] = []
    pack = replace_pack()
    packs = [point if isinstance(point, tuple) else (point,) for point in points]
    plan: Any = SimpleNamespace(
        sweep=SimpleNamespace(
            keep=SimpleNamespace(trained=keep),
            keeps_backbones={p.parent for members in packs for p in members},
            spec=SimpleNamespace(retry=retry or RetrySpec(), limits=LimitsSpec()),
        ),
        packs=tuple(replace(pack, points=members) for members in packs),
    )
    return Scheduler(plan, failures or {}, events.append, **options), events


def replace_pack() -> Any:
    from sweep.planning.plan import Pack

    return Pack(points=(), resources={"CPU": 1})


def name(job: Job | None) -> str | None:
    return None if job is None else job.points[0].trial_id


def end(scheduler: Scheduler, job: Job | None, status: Any = "done", **why: Any) -> None:
    assert job is not None
    scheduler.ended(job.attempt, [Result(point.trial_id, status, **why) for point in job.points])


def test_packs_come_in_the_plans_order() -> None:
    scheduler, _ = scheduler_of(Stub("a"), Stub("b"), Stub("c"))

    assert [name(scheduler.next()) for _ in range(4)] == ["a", "b", "c", None]
    assert not scheduler.finished


def test_a_user_waits_for_its_pretraining_and_then_comes_in_its_place() -> None:
    scheduler, _ = scheduler_of(Stub("p"), Stub("u", parent="p"), Stub("v"), Stub("w"))

    pretraining = scheduler.next()
    assert name(pretraining) == "p"
    assert pretraining is not None
    assert pretraining.keep_backbones == ("p",)
    assert name(scheduler.next()) == "v"
    end(scheduler, pretraining)
    assert name(scheduler.next()) == "u"
    assert name(scheduler.next()) == "w"


def test_a_pretraining_that_is_done_already_holds_nobody_up() -> None:
    scheduler, _ = scheduler_of(Stub("u", parent="not in the plan"))

    assert name(scheduler.next()) == "u"


def test_a_failed_pretraining_fails_all_that_need_it_directly_or_not() -> None:
    scheduler, events = scheduler_of(
        Stub("p"), Stub("q", parent="p"), Stub("u", parent="q"), Stub("v")
    )

    end(scheduler, scheduler.next(), "failed", cause="code", exception="KeyError", message="'x'")

    assert scheduler.failed["p"] == "KeyError: 'x'"
    assert scheduler.failed.keys() == {"p", "q", "u"}
    assert scheduler.failed["q"] == "p, whose backbone it takes, failed"
    assert [e.trial_id for e in events if e.kind == "trial_failed"] == ["p", "q", "u"]
    end(scheduler, scheduler.next())
    assert scheduler.finished


def test_a_diverged_pretraining_is_an_outcome_and_gives_nobody_a_backbone() -> None:
    scheduler, events = scheduler_of(Stub("p"), Stub("u", parent="p"))

    end(scheduler, scheduler.next(), "diverged")

    assert scheduler.finished
    assert scheduler.failed == {"u": "p, whose backbone it takes, diverged"}
    assert [(e.kind, e.trial_id) for e in events] == [("trial_done", "p"), ("trial_failed", "u")]


@pytest.mark.parametrize("cause", ["worker", "device", "storage", "node", "hung", "preempted"])
def test_what_the_environment_caused_is_tried_again_a_few_times(cause: Any) -> None:
    scheduler, events = scheduler_of(Stub("a"), failures={"a": 4}, retry=RetrySpec(**{cause: 2}))

    attempts = []
    while (job := scheduler.next()) is not None:
        attempts.append(job.attempts["a"])
        end(scheduler, job, "failed", cause=cause, exception="E", message="lost")

    assert attempts == [5, 6, 7]
    assert scheduler.finished
    assert scheduler.failed.keys() == {"a"}
    assert [e.kind for e in events] == ["message", "message", "trial_failed"]


@pytest.mark.parametrize("cause", ["code", "data"])
def test_other_failures_are_not_tried_again(cause: Any) -> None:
    scheduler, _ = scheduler_of(Stub("a"))

    end(scheduler, scheduler.next(), "failed", cause=cause, exception="E", message="m")

    assert scheduler.finished
    assert scheduler.next() is None


def test_an_interrupted_trial_is_neither_failed_nor_done_and_its_users_do_not_run() -> None:
    scheduler, _ = scheduler_of(Stub("p"), Stub("u", parent="p"))

    end(scheduler, scheduler.next(), "failed", cause="interrupted", exception="E", message="m")

    assert scheduler.finished
    assert scheduler.next() is None
    assert not scheduler.failed


def test_the_same_failure_again_and_again_stops_the_sweep() -> None:
    scheduler, events = scheduler_of(*(Stub(f"t{i}") for i in range(20)))

    count = 0
    while (job := scheduler.next()) is not None:
        count += 1
        end(scheduler, job, "failed", cause="code", exception="TypeError", message="no")

    assert count == SAME_FAILURE
    assert scheduler.finished
    assert "TypeError: no" in (scheduler.stopped or "")
    assert events[-1].kind == "message"


def test_a_success_in_between_shows_that_the_sweep_is_worth_going_on() -> None:
    scheduler, _ = scheduler_of(*(Stub(f"t{i}") for i in range(20)))

    for i in range(20):
        if i % SAME_FAILURE == SAME_FAILURE - 1:
            end(scheduler, scheduler.next())
        else:
            end(
                scheduler,
                scheduler.next(),
                "failed",
                cause="code",
                exception="TypeError",
                message="no",
            )

    assert scheduler.stopped is None


def test_different_failures_do_not_stop_the_sweep() -> None:
    scheduler, _ = scheduler_of(*(Stub(f"t{i}") for i in range(20)))

    for i in range(20):
        end(
            scheduler,
            scheduler.next(),
            "failed",
            cause="code",
            exception="TypeError",
            message=str(i),
        )

    assert scheduler.stopped is None


def test_stop_hands_out_nothing_more_and_says_so_once() -> None:
    scheduler, events = scheduler_of(Stub("a"), Stub("b"))

    job = scheduler.next()
    scheduler.stop("because")
    scheduler.stop("again")

    assert scheduler.next() is None
    assert scheduler.finished
    end(scheduler, job)
    assert [e.message for e in events] == ["because", None]


# ------------------------------------------------------------------------------------------- packs


def pack_of(number: int) -> tuple[Stub, ...]:
    return tuple(Stub(f"m{i}") for i in range(number))


def names(job: Job) -> str:
    return " ".join(point.trial_id for point in job.points)


def run_out(scheduler: Scheduler, fails: Any) -> list[str]:
    """Run a scheduler to its end; `fails` says of a job how its trials end: Result's fields."""
    jobs = []
    while (job := scheduler.next()) is not None:
        jobs.append(names(job))
        how = fails(job) or {"status": "done"}
        scheduler.ended(job.attempt, [Result(point.trial_id, **how) for point in job.points])
    return jobs


DIED = {"status": "failed", "cause": "worker", "exception": "E", "message": "the worker died"}
FULL = {"status": "failed", "cause": "memory", "exception": "E", "message": "too large"}
RAISED = {"status": "failed", "cause": "code", "exception": "E", "message": "x", "undecided": True}


def killed_by(bad: str) -> Any:
    return lambda job: DIED if bad in names(job).split() else None


def test_a_pack_whose_worker_died_is_tried_again_as_it_is() -> None:
    scheduler, events = scheduler_of(pack_of(4))
    died: list[int] = []

    jobs = run_out(scheduler, lambda job: None if died else died.append(1) or DIED)

    assert jobs == ["m0 m1 m2 m3"] * 2
    assert not scheduler.failed
    assert events[0].message == (
        "m0 (and 3 more trials): the worker died; it is tried again from its last state"
    )


def test_one_that_kills_its_workers_is_found_and_the_rest_finish() -> None:
    scheduler, events = scheduler_of(pack_of(4))

    jobs = run_out(scheduler, killed_by("m2"))

    assert jobs == ["m0 m1 m2 m3"] * 2 + ["m0 m1", "m2 m3", "m2", "m3", "m2", "m2", "m2"]
    assert scheduler.failed == {"m2": "E: the worker died"}
    assert sorted(e.trial_id or "" for e in events if e.kind == "trial_done") == ["m0", "m1", "m3"]


@pytest.mark.parametrize("how", [FULL, RAISED])
def test_what_a_pack_cannot_do_at_all_is_tried_in_halves_at_once(how: Any) -> None:
    scheduler, events = scheduler_of(pack_of(3))

    jobs = run_out(scheduler, lambda job: how if len(job.points) > 1 else None)

    assert jobs == ["m0 m1 m2", "m0 m1", "m2", "m0", "m1"]
    assert not scheduler.failed
    assert (events[0].message or "").endswith("it is tried in a smaller pack")
    assert (events[1].message or "").endswith("it is tried alone")


def test_one_that_needs_too_much_memory_by_itself_is_tried_last_in_ever_smaller_parts() -> None:
    scheduler, events = scheduler_of(pack_of(2), Stub("a"), Stub("b"))
    parts: list[tuple[str, int]] = []

    def fails(job: Job) -> Any:
        parts.append((names(job), job.accumulation))
        return FULL if "m1" in names(job) and job.accumulation < 4 else None

    run_out(scheduler, fails)

    assert parts == [("m0 m1", 1), ("a", 1), ("b", 1), ("m0", 1), ("m1", 1), ("m1", 2), ("m1", 4)]
    assert not scheduler.failed
    messages = [event.message or "" for event in events if event.kind == "message"]
    assert messages[-1].endswith("it is tried at the end, alone, each batch in 4 parts")


@pytest.mark.parametrize(("budget", "tried"), [(2, [1, 2, 4]), (None, [1, 2, 4, 8, 16]), (0, [1])])
def test_out_of_memory_ends_with_its_budget_or_with_parts_of_one_example(
    budget: int | None, tried: list[int]
) -> None:
    scheduler, _ = scheduler_of(Stub("a"), retry=RetrySpec(memory=budget))
    parts: list[int] = []

    run_out(scheduler, lambda job: parts.append(job.accumulation) or FULL)

    assert parts == tried
    assert scheduler.failed == {"a": "E: too large"}


@pytest.mark.parametrize("device", [{"CPU": 1, "GPU": 1}, {"CPU": 8}])
def test_what_was_out_of_memory_has_its_device_to_itself_and_others_go_on(device: Any) -> None:
    points = [Stub("big"), Stub("huge"), Stub("p"), Stub("a"), Stub("u", parent="p")]
    scheduler, _ = scheduler_of(*points, device=device)
    big, huge, p = scheduler.next(), scheduler.next(), scheduler.next()
    end(scheduler, big, **FULL)
    end(scheduler, huge, **FULL)

    a = scheduler.next()
    assert name(a) == "a"  # what has not failed comes first
    again, other = scheduler.next(), scheduler.next()  # beside p and a, on devices of their own
    assert again is not None
    assert other is not None
    assert (name(again), again.accumulation, again.resources) == ("big", 2, device)
    assert (name(other), other.accumulation, other.resources) == ("huge", 2, device)
    end(scheduler, p)
    u = scheduler.next()  # while what is alone still runs
    assert u is not None
    assert (name(u), u.resources) == ("u", {"CPU": 1})
    for job in (a, again, other, u):
        assert not scheduler.finished
        end(scheduler, job)
    assert scheduler.finished


def test_what_an_earlier_run_found_too_large_has_its_device_to_itself_too() -> None:
    scheduler, _ = scheduler_of(Stub("big"), accumulation={"big": 4}, device={"CPU": 8})

    job = scheduler.next()

    assert job is not None
    assert (job.accumulation, job.resources) == (4, {"CPU": 8})


@pytest.mark.parametrize(("cause", "avoided"), [("device", True), ("node", True), ("hung", False)])
def test_what_a_device_or_a_node_failed_is_tried_elsewhere(cause: Any, avoided: bool) -> None:
    scheduler, _ = scheduler_of(pack_of(2), Stub("other"))
    why = {"cause": cause, "exception": "E", "message": "ECC"}

    for node in ("n1", "n2"):
        job = scheduler.next()
        assert job is not None
        scheduler.ended(
            job.attempt, [Result(p.trial_id, "failed", **why) for p in job.points], node
        )
        if node == "n1":
            end(scheduler, scheduler.next())  # other: of itself it knows nothing bad

    last = scheduler.next()
    assert last is not None
    assert names(last) == "m0 m1"
    assert set(last.avoid) == ({"n1", "n2"} if avoided else set())
    assert not scheduler.failed


def test_what_an_earlier_run_learnt_of_memory_is_not_learnt_again() -> None:
    scheduler, _ = scheduler_of(Stub("big"), Stub("a"), accumulation={"big": 4})

    jobs: list[tuple[str, int]] = []
    run_out(scheduler, lambda job: jobs.append((names(job), job.accumulation)))

    assert jobs == [("a", 1), ("big", 4)]


def test_a_worker_that_dies_elsewhere_each_time_does_not_cut_its_pack() -> None:
    scheduler, _ = scheduler_of(pack_of(2), retry=RetrySpec(worker=3))
    steps = iter([100, 700, 400])

    def fails(job: Job) -> Any:
        step = next(steps, None)
        return None if step is None else {**DIED, "step": step}

    assert run_out(scheduler, fails) == ["m0 m1"] * 4
    assert not scheduler.failed


def test_a_worker_that_dies_elsewhere_each_time_cuts_its_pack_in_the_end() -> None:
    scheduler, _ = scheduler_of(pack_of(2), retry=RetrySpec(worker=2))
    steps = iter([100, 700, 400])

    def fails(job: Job) -> Any:
        step = next(steps, None)
        return None if step is None else {**DIED, "step": step}

    assert run_out(scheduler, fails) == ["m0 m1"] * 3 + ["m0", "m1"]


def test_what_another_driver_trains_is_left_to_it_and_asked_for_again() -> None:
    theirs = {"m1", "b"}
    scheduler, _ = scheduler_of(
        pack_of(2), Stub("b"), claim=lambda ids: [i for i in ids if i not in theirs]
    )

    job = scheduler.next()
    assert job is not None
    assert names(job) == "m0"
    assert scheduler.next() is None
    assert scheduler.claimed_elsewhere == ("m1", "b")
    end(scheduler, job)
    assert not scheduler.finished
    scheduler.retry_deferred(9)
    assert scheduler.next() is None
    theirs.clear()
    scheduler.retry_deferred(9)
    assert run_out(scheduler, lambda job: None) == ["b", "m1"]
    assert scheduler.finished


def test_what_others_train_is_asked_for_a_few_at_a_time_and_on_as_long_as_it_is_free() -> None:
    asked: list[str] = []
    theirs = {str(i) for i in range(10)}

    def claim(ids: Sequence[str]) -> list[str]:
        asked.extend(ids)
        return [i for i in ids if i not in theirs]

    scheduler, _ = scheduler_of(*map(Stub, sorted(theirs)), Stub("mine"), claim=claim)
    assert name(scheduler.next()) == "mine"
    assert scheduler.next() is None
    assert asked == [*sorted(theirs), "mine"]

    asked.clear()
    scheduler.retry_deferred(3)
    assert scheduler.next() is None
    assert asked == ["0", "1", "2"]
    # The next ones, not the same again.
    asked.clear()
    scheduler.retry_deferred(1)
    assert scheduler.next() is None
    assert asked == ["3"]
    # Their driver is gone: one look is enough for all of them.
    theirs.clear()
    scheduler.retry_deferred(1)
    assert [name(scheduler.next()) for _ in range(11)] == [*"4567890123", None]


def test_what_others_train_is_told_while_it_changes() -> None:
    scheduler, _ = scheduler_of(Stub("a"), Stub("b"), Stub("c"), claim=lambda ids: ())
    assert scheduler.next() is None

    class Changing(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            # As the main thread does, between two looks of the one that asks.
            scheduler._elsewhere.rotate()
            return super().__getitem__(index)

    scheduler._packs = Changing(scheduler._packs)

    assert scheduler.claimed_elsewhere == ("a", "b", "c")


def test_what_is_no_quicker_in_packs_is_no_longer_packed() -> None:
    measured: set[tuple[str]] = set()
    looks = 0

    def no_quicker() -> set[tuple[str]]:
        nonlocal looks
        looks += 1
        return measured

    a = [tuple(Stub(f"a{3 * i + j}") for j in range(3)) for i in range(3)]
    b = [tuple(Stub(f"b{2 * i + j}") for j in range(2)) for i in range(3)]
    scheduler, events = scheduler_of(a[0], b[0], a[1], b[1], a[2], b[2], no_quicker=no_quicker)

    first, second = scheduler.next(), scheduler.next()
    assert first is not None
    assert second is not None
    end(scheduler, second)
    assert not looks  # two are too few to tell
    measured.add(("a",))
    end(scheduler, first)
    assert looks == 1
    trained = run_out(scheduler, lambda job: None)
    assert trained == ["a3", "b2 b3", "a6", "b4 b5", "a4", "a5", "a7", "a8"]
    assert looks == 2
    assert not [event for event in events if event.kind == "message"]


def test_who_failed_does_not_tell_whether_packs_help() -> None:
    looks: list[None] = []

    def no_quicker() -> set[tuple[str]]:
        looks.append(None)
        return set()

    a = [tuple(Stub(f"a{3 * i + j}") for j in range(3)) for i in range(2)]
    scheduler, _ = scheduler_of(*a, no_quicker=no_quicker)
    first = scheduler.next()
    assert first is not None

    one, *others = (Result(point.trial_id, "done") for point in first.points)
    scheduler.ended(first.attempt, [replace(one, status="failed", cause="data"), *others])
    assert not looks
    end(scheduler, scheduler.next())
    assert len(looks) == 1


def test_what_was_too_much_for_the_memory_is_cut_before_it_is_tried_again() -> None:
    packs = [tuple(Stub(f"m{4 * i + j}") for j in range(4)) for i in range(2)]
    scheduler, _ = scheduler_of(*packs, Stub("other"))

    trained = run_out(scheduler, lambda job: FULL if len(job.points) > 2 else None)

    assert trained == ["m0 m1 m2 m3", "m4 m5", "other", "m0 m1", "m2 m3", "m6 m7"]


def test_what_becomes_known_is_taken_in_and_what_of_it_was_there_is_told() -> None:
    new, there = Stub("new"), Stub("there")

    def follow(trial_id: str) -> Any:
        if trial_id != "rate":
            return None
        return SimpleNamespace(
            sweep=SimpleNamespace(points=(new, there), keeps_backbones=frozenset()),
            status={"new": "missing", "there": "done"},
            packs=(replace(replace_pack(), points=(new,)),),
        )

    scheduler, events = scheduler_of(Stub("rate"), follow=follow)

    assert run_out(scheduler, lambda job: None) == ["rate", "new"]
    told = [(event.trial_id, event.message) for event in events if event.kind == "trial_done"]
    assert told == [("rate", None), ("there", "was there already"), ("new", None)]


def test_the_seeds_of_one_config_are_no_many_configs() -> None:
    points = [Stub(f"t{i}") for i in range(SAME_FAILURE * 2)]
    for i, point in enumerate(points):
        point.cell_id = "one" if i < SAME_FAILURE + 1 else f"c{i}"
    scheduler, _ = scheduler_of(*points, Stub("x"), Stub("y"))

    jobs = run_out(scheduler, lambda job: {**DIED, "cause": "code"})

    assert len(jobs) == SAME_FAILURE + 1 + SAME_FAILURE - 1
    assert "5 configs in a row" in (scheduler.stopped or "")


def test_what_is_known_of_one_member_is_held_against_it_alone() -> None:
    scheduler, _ = scheduler_of(pack_of(3))
    job = scheduler.next()
    assert job is not None

    scheduler.ended(
        job.attempt,
        [
            Result("m0", "done"),
            Result("m1", "failed", "data", "DataError", "gone"),
            Result("m2", "diverged"),
        ],
    )

    assert scheduler.failed == {"m1": "DataError: gone"}
    assert scheduler.finished


def test_members_that_ended_before_their_worker_died_are_not_tried_again() -> None:
    scheduler, _ = scheduler_of(pack_of(2))
    job = scheduler.next()
    assert job is not None

    scheduler.ended(job.attempt, [Result("m0", "done"), Result("m1", **DIED)])  # type: ignore[arg-type]

    assert run_out(scheduler, lambda job: DIED) == ["m1"] * 3
    assert scheduler.failed.keys() == {"m1"}


def test_storage_that_is_gone_is_no_members_fault() -> None:
    scheduler, _ = scheduler_of(pack_of(2))

    jobs = run_out(scheduler, lambda job: {**DIED, "cause": "storage"})

    assert jobs == ["m0 m1"] * 6
    assert scheduler.failed.keys() == {"m0", "m1"}


def test_an_interrupted_pack_stays_open() -> None:
    scheduler, _ = scheduler_of(pack_of(2))

    assert run_out(scheduler, lambda job: {**DIED, "cause": "interrupted"}) == ["m0 m1"]
    assert not scheduler.failed


def pack_that_ended(size: int, accumulation: int = 1, **more: Any) -> Any:
    return Job(pack_of(size), {"CPU": 1}, {}, accumulation=accumulation, **more)  # type: ignore[arg-type]


def failure(cause: Any, *, undecided: bool = False, step: int | None = None) -> Result:
    return Result("m0", "failed", cause, "E", "message", step=step, undecided=undecided)


DIED_BEFORE = pack_that_ended(2, deaths=1, died_at={"m0": 5})


@pytest.mark.parametrize(
    ("result", "pack", "others", "tries", "decision"),
    [
        (Result("m0", "done"), pack_that_ended(2), 0, 0, "finish"),
        (Result("m0", "diverged"), pack_that_ended(1), 0, 9, "finish"),
        (failure("interrupted"), pack_that_ended(2), 1, 9, "leave"),
        (failure("code", undecided=True), pack_that_ended(2), 1, 0, "split"),
        (failure("memory"), pack_that_ended(2), 1, 9, "split"),
        (failure("memory"), pack_that_ended(1), 0, 0, "alone"),
        (failure("memory"), pack_that_ended(1), 0, 4, "fail"),  # its budget is spent
        (failure("memory"), pack_that_ended(1, 16), 0, 0, "fail"),  # parts of one example
        (failure("worker"), pack_that_ended(2), 1, 9, "chance"),
        (failure("worker", step=5), DIED_BEFORE, 1, 0, "split"),
        (
            failure("worker", step=900),
            DIED_BEFORE,
            1,
            0,
            "chance",
        ),
        (failure("worker"), pack_that_ended(2), 0, 2, "requeue"),
        (failure("worker"), pack_that_ended(2), 0, 3, "fail"),
        (failure("device"), pack_that_ended(2), 1, 2, "requeue"),
        (failure("preempted"), pack_that_ended(2), 1, 10**6, "requeue"),
        (failure("code"), pack_that_ended(1), 0, 0, "fail"),
        (failure("data"), pack_that_ended(2), 1, 0, "fail"),
    ],
)
def test_what_becomes_of_a_trial_is_decided_by_what_is_given(
    result: Result, pack: Any, others: int, tries: int, decision: str
) -> None:
    failed = {"m0": result} | {
        f"m{n}": replace(result, trial_id=f"m{n}") for n in range(1, 1 + others)
    }

    assert decide(result, pack, failed, RetrySpec(), tries) == decision


@given(st.integers(1, 16), st.sets(st.integers(0, 15), max_size=3), st.sampled_from([DIED, RAISED]))
def test_whoever_is_bad_is_found_and_nobody_else(size: int, bad: set[int], how: Any) -> None:
    scheduler, events = scheduler_of(pack_of(size))
    guilty = {f"m{i}" for i in bad if i < size}

    def fails(job: Job) -> Any:
        if not guilty & set(names(job).split()):
            return None
        return {**how, "undecided": how is RAISED and len(job.points) > 1}

    jobs = run_out(scheduler, fails)

    assert scheduler.failed.keys() == guilty
    done = [e.trial_id for e in events if e.kind == "trial_done"]
    assert sorted(map(str, done)) == sorted({f"m{i}" for i in range(size)} - guilty)
    # A bad one costs its pack a second attempt, two halves at each level, and its own attempts.
    assert len(jobs) <= 1 + len(guilty) * (1 + 2 * 4 + 4)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_forest_is_trained_once_each_and_never_before_its_parents(
    back: list[int], slots: int, choice: random.Random
) -> None:
    points = [
        Stub(f"t{i}", parent=f"t{i - step}" if 0 < step <= i else None)
        for i, step in enumerate(back)
    ]
    scheduler, _ = scheduler_of(*points)

    done: list[str] = []
    running: list[Job] = []
    while not scheduler.finished:
        while len(running) < slots and (job := scheduler.next()) is not None:
            assert job.points[0].parent is None or job.points[0].parent in done
            running.append(job)
        job = running.pop(choice.randrange(len(running)))
        done.append(job.points[0].trial_id)
        end(scheduler, job)

    assert sorted(done) == sorted(point.trial_id for point in points)
