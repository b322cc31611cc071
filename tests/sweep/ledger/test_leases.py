"""One holder at a time, whatever the clocks, kills and pauses of the others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep.ledger import machine
from sweep.ledger.leases import Leases
from sweep.ledger.ledger import Ledger
from sweep.ledger.storage import Entry, LedgerError, StorageError, open_storage


class Clock:
    """A clock that moves when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lease looks as if it was taken on another machine: nothing is known of its process."""
    hosts = iter(range(10**6))
    monkeypatch.setattr(
        machine, "pid_space", lambda: {"host": f"host-{next(hosts)}", "boot": "b", "pids": "p"}
    )


HOLD = """
import sys, time
from sweep.ledger.leases import Leases
from sweep.ledger.ledger import Ledger
from sweep.ledger.storage import open_storage
lease = Leases(open_storage(sys.argv[1])).acquire("driver", ttl=1000)
print(lease.epoch, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def hold() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that holds the lease `driver`."""
    started: list[subprocess.Popen[str]] = []

    def start(place: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_lease_has_one_holder_until_it_is_released(place: str) -> None:
    mine, yours = Leases(open_storage(place)), Leases(open_storage(place))

    lease = mine.acquire("driver")
    assert lease is not None
    assert lease.held
    assert yours.acquire("driver") is None
    assert mine.acquire("driver") is None
    holder = yours.holder("driver")
    assert holder is not None
    assert {"host", "pid", "since", "epoch"} <= holder.keys()
    assert yours.acquire("another") is not None
    lease.release()
    assert not lease.held
    assert yours.holder("driver") is None
    assert (taken := yours.acquire("driver")) is not None
    assert (lease.epoch, taken.epoch) == (1, 2)


def test_epochs_rise_for_good_and_old_ones_are_tidied_away(place: str) -> None:
    storage = open_storage(place)

    for epoch in range(1, 6):
        lease = Leases(storage).acquire("driver")
        assert lease is not None
        assert lease.epoch == epoch
        lease.renew()
        lease.release()

    assert list(storage.list("leases")) == ["leases/driver/5.beat", "leases/driver/5.json"]


@pytest.mark.usefixtures("elsewhere")
def test_a_silent_holder_elsewhere_loses_its_lease_by_the_watchers_clock(tmp_path: Path) -> None:
    storage, clock = open_storage(tmp_path), Clock()
    watcher = Leases(storage, clock)
    lease = Leases(storage).acquire("driver", ttl=30)
    assert lease is not None

    for _ in range(3):
        assert watcher.acquire("driver") is None
        clock.now += 29
        assert watcher.acquire("driver") is None
        assert lease.renew()
    assert watcher.acquire("driver") is None
    clock.now += 30
    taken = watcher.acquire("driver")

    assert taken is not None
    assert taken.epoch == 2
    assert not lease.renew()
    assert not lease.held
    assert taken.renew()
    lease.release()  # it is no longer its to release
    assert Leases(storage).acquire("driver") is None


@pytest.mark.usefixtures("elsewhere")
def test_a_watcher_that_just_came_knows_nothing_yet(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert Leases(storage).acquire("driver", ttl=30) is not None

    clock = Clock()
    clock.now = 1e9

    assert Leases(storage, clock).acquire("driver") is None


def test_on_one_machine_a_killed_holder_is_known_at_once(
    place: str, hold: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = hold(place)
    watcher = Leases(open_storage(place))
    assert watcher.acquire("driver") is None
    holder = watcher.holder("driver")
    assert holder is not None
    assert holder["pid"] == process.pid

    process.send_signal(signal.SIGKILL)
    # Nobody waits for it: it stays a zombie, whose pid exists.
    deadline = time.monotonic() + 20
    while (taken := watcher.acquire("driver")) is None and time.monotonic() < deadline:
        time.sleep(0.01)

    assert taken is not None
    assert taken.epoch == 2


def test_a_process_with_the_pid_of_a_dead_holder_is_not_the_holder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert Leases(storage).acquire("driver") is not None
    path = tmp_path / "leases/driver/1.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"started": str(int(info["started"]) - 1)}))

    taken = Leases(storage).acquire("driver")

    assert taken is not None


@pytest.mark.parametrize(
    ("unseen", "answer", "held"),
    [
        (psutil.NoSuchProcess(77), PermissionError, True),  # hidepid=2, of another user
        (psutil.AccessDenied(77), PermissionError, True),  # hidepid=1
        (OSError(), None, True),  # our own, and no more files may be opened
        (psutil.NoSuchProcess(77), ProcessLookupError, False),
    ],
)
def test_a_holder_that_cannot_be_seen_is_held_to_its_beat(
    tmp_path: Path,
    unseen: Exception,
    answer: type[OSError] | None,
    held: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, clock = open_storage(tmp_path), Clock()
    assert Leases(storage).acquire("driver", ttl=30) is not None
    path = tmp_path / "leases/driver/1.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"pid": 77}))

    def hidden(pid: int) -> None:
        assert pid == 77
        raise unseen

    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (77, 0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(psutil, "Process", hidden)
    monkeypatch.setattr("os.kill", kill)
    watcher = Leases(storage, clock)

    assert (watcher.holder("driver") is not None) == held
    clock.now += 30
    assert watcher.holder("driver") is None


def test_a_holder_that_could_not_see_itself_is_held_to_its_beat(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert Leases(storage).acquire("driver") is not None
    path = tmp_path / "leases/driver/1.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"started": None}))

    assert Leases(storage).acquire("driver") is None


@pytest.mark.parametrize("part", ["host", "boot", "pids"])
def test_a_pid_of_elsewhere_says_nothing(tmp_path: Path, part: str) -> None:
    storage = open_storage(tmp_path)
    assert Leases(storage).acquire("driver") is not None
    path = tmp_path / "leases/driver/1.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"started": "1", part: "another"}))

    assert Leases(storage).acquire("driver") is None


def _race(place: str, _: int) -> list[bool]:
    watcher = Leases(open_storage(place))
    return [watcher.acquire(f"lease-{name}", ttl=1000) is not None for name in range(20)]


def test_of_processes_that_race_one_wins(place: str) -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        won = list(pool.map(_race, [place] * 3, range(3)))

        assert [sum(name) for name in zip(*won, strict=True)] == [1] * 20


class Interrupted:
    """A storage in which something else happens just before objects are created."""

    def __init__(self, place: Path, meanwhile: Callable[[], None]) -> None:
        self._storage = open_storage(place)
        self._meanwhile = meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def create(self, name: str, data: bytes) -> bool:
        self._meanwhile()
        return self._storage.create(name, data)


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_slow_watcher_does_not_take_what_others_took_meanwhile(
    tmp_path: Path, others: int
) -> None:
    kept: list[Any] = []

    def meanwhile() -> None:
        for number in range(others):
            lease = Leases(open_storage(tmp_path)).acquire("driver")
            assert lease is not None
            kept.append(lease)
            if number < others - 1:
                lease.release()

    first = Leases(open_storage(tmp_path)).acquire("driver")
    assert first is not None
    first.release()

    assert Leases(Interrupted(tmp_path, meanwhile)).acquire("driver") is None
    assert kept[-1].renew()
    assert list(open_storage(tmp_path).list("leases/driver")) == [
        f"leases/driver/{others + 1}.beat",
        f"leases/driver/{others + 1}.json",
    ]


@pytest.mark.usefixtures("elsewhere")
def test_the_heartbeat_keeps_a_lease_for_as_long_as_the_block_runs(tmp_path: Path) -> None:
    storage, clock = open_storage(tmp_path), Clock()
    watcher = Leases(storage, clock)
    lease = Leases(storage, clock).acquire("driver", ttl=1.0)
    assert lease is not None

    with lease:
        for _ in range(5):
            assert watcher.acquire("driver") is None
            beat = storage.get("leases/driver/1.beat")
            clock.now += 0.4
            while storage.get("leases/driver/1.beat") == beat:
                time.sleep(0.01)
        assert watcher.acquire("driver") is None
        assert lease.held

    assert watcher.acquire("driver") is not None


class Failing:
    """A storage that can no longer be reached."""

    def list(self, prefix: str) -> dict[str, Entry]:
        raise LedgerError("unreachable")


def test_a_lease_whose_heartbeat_does_not_get_through_is_not_held(tmp_path: Path) -> None:
    clock = Clock()
    lease = Leases(open_storage(tmp_path), clock).acquire("driver", ttl=30)
    assert lease is not None
    clock.now += 20
    assert lease.renew()
    lease.storage = Failing()  # type: ignore[assignment]

    with pytest.raises(LedgerError):
        lease.renew()
    clock.now += 29
    assert lease.held
    clock.now += 1
    assert not lease.held


def test_a_lease_that_was_removed_is_lost(tmp_path: Path) -> None:
    lease = Leases(open_storage(tmp_path)).acquire("driver")
    assert lease is not None
    (tmp_path / "leases/driver/1.json").unlink()

    assert not lease.renew()


def test_what_is_no_lease_is_told(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.put("leases/driver/1.json", b"[]")

    with pytest.raises(LedgerError, match=r"leases/driver: holds no lease of ours; delete"):
        Leases(storage).acquire("driver")
    with pytest.raises(ValueError, match="lease name"):
        Leases(storage).acquire("../driver")


# -------------------------------------------------------------------------------- claims of trials


TRIALS = [f"{number:012x}" for number in range(3)]


def test_of_two_drivers_one_trains_a_trial_until_it_lets_go(place: str) -> None:
    ledger = Ledger(place)
    one, other = ledger.lease("driver-one"), ledger.lease("driver-other")
    assert one is not None
    assert other is not None
    mine, theirs = ledger.reservations(one), ledger.reservations(other)

    assert mine.take(TRIALS[:2]) == set(TRIALS[:2])
    assert mine.take(TRIALS[:1]) == set(TRIALS[:1])  # asked again
    assert theirs.take(TRIALS) == {TRIALS[2]}
    mine.release(TRIALS)
    assert theirs.take(TRIALS) == set(TRIALS)
    assert mine.take(TRIALS) == set()


def test_the_claims_of_a_driver_that_is_gone_are_worth_nothing(place: str) -> None:
    ledger = Ledger(place)
    gone = ledger.lease("driver-one")
    assert gone is not None
    assert ledger.reservations(gone).take(TRIALS) == set(TRIALS)
    gone.release()

    for number in range(3):  # each a successor of the one before, on the same cluster
        lease = ledger.lease("driver-one")
        assert lease is not None
        assert ledger.reservations(lease).take(TRIALS) == set(TRIALS), number
        lease.release()


def test_what_we_failed_to_let_go_of_is_still_ours(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    lease = ledger.lease("driver-one")
    assert lease is not None
    assert ledger.reservations(lease).take(TRIALS) == set(TRIALS)

    assert ledger.reservations(lease).take(TRIALS) == set(TRIALS)


def test_what_storage_kept_us_from_letting_go_of_is_let_go_of_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    one, other = ledger.lease("driver-one"), ledger.lease("driver-other")
    assert one is not None
    assert other is not None
    mine, theirs = ledger.reservations(one), ledger.reservations(other)
    assert mine.take(TRIALS) == set(TRIALS)

    def away(paths: Iterable[str]) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.storage, "delete", away)
        with pytest.raises(StorageError, match="away"):
            mine.release(TRIALS[:2])
    assert theirs.take(TRIALS) == set()
    assert mine.take(TRIALS[:1]) == set(TRIALS[:1])  # to be tried once more
    mine.release(TRIALS[2:])

    assert theirs.take(TRIALS) == set(TRIALS[1:])


def test_what_went_although_its_deletion_was_told_to_have_failed_is_claimed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    gone = ledger.lease("driver-gone")
    one, other = ledger.lease("driver-one"), ledger.lease("driver-other")
    assert gone is not None
    assert one is not None
    assert other is not None
    ledger.reservations(gone).take(TRIALS)
    gone.release()
    mine, theirs = ledger.reservations(one), ledger.reservations(other)
    assert mine.take(TRIALS) == set(TRIALS)  # each with the second number
    delete = ledger.storage.delete

    def half_way(paths: Iterable[str]) -> None:
        for path in paths:
            if TRIALS[0] in path or path.endswith("-1.json"):
                delete([path])
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.storage, "delete", half_way)
        with pytest.raises(StorageError, match="away"):
            mine.release(TRIALS)
    assert theirs.take(TRIALS[:2]) == set(TRIALS[:2])

    assert mine.take(TRIALS) == {TRIALS[2]}
    mine.release([])  # what is left to delete, and nothing of theirs
    assert mine.take(TRIALS[:2]) == set()
    assert theirs.take(TRIALS) == set(TRIALS[:2])
    mine.release(TRIALS)
    theirs.release(TRIALS)
    assert not list(Path(ledger.uri).glob("leases/trials/*"))


def test_a_holder_says_what_it_wants_to_be_known(tmp_path: Path) -> None:
    lease = Ledger(tmp_path).lease("driver-one")
    assert lease is not None
    lease.note = {"running": {"a": 1}}

    assert lease.renew()

    (holder,) = Ledger(tmp_path).holders("driver-")
    assert holder["note"] == {"running": {"a": 1}}
    assert not lease.lost


def test_a_lease_that_cannot_be_given_back_ends_in_silence(tmp_path: Path) -> None:
    """A disk that is full once all is done makes no failure of the run."""
    ledger = Ledger(tmp_path / "results", write=True)
    lease = ledger.lease("driver-here")
    assert lease is not None

    def full(name: str, data: bytes) -> None:
        raise LedgerError("no space left on device")

    with lease:
        lease.storage.put = full  # type: ignore[method-assign]

    assert not lease.held
