"""Reservations ahead: on a ledger in a folder, whose every call is written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweep.execution.reservations import ReservationsAhead
from sweep.ledger.ledger import Ledger, LedgerError
from sweep.ledger.reservations import Reservations

NAMES = [f"{k:012x}" for k in range(20)]


class Noted:
    """Reservations that note what they are asked for, and fail for as long as they are told to."""

    def __init__(self, claims: Reservations) -> None:
        self.claims = claims
        self.taken: list[list[str]] = []
        self.released: list[list[str]] = []
        self.away = False

    def take(self, ids: Sequence[str]) -> set[str]:
        if self.away:
            raise LedgerError("storage is away")
        self.taken.append(list(ids))
        return self.claims.take(ids)

    def release(self, ids: Iterable[str]) -> None:
        if self.away:
            raise LedgerError("storage is away")
        self.released.append(list(ids))
        self.claims.release(self.released[-1])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results", write=True)


@pytest.fixture
def noted(ledger: Ledger) -> Iterator[Noted]:
    lease = ledger.lease("driver-here")
    assert lease is not None
    with lease:
        yield Noted(ledger.reservations(lease))


def held(ledger: Ledger) -> set[str]:
    folder = Path(ledger.uri, "leases/trials")
    return {file.name.partition("-")[0] for file in folder.glob("*.json")}


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def reserving(noted: Any, upcoming: list[str], ahead: int = 4) -> ReservationsAhead:
    return ReservationsAhead(noted, lambda most: tuple(upcoming[:most]), ahead)


def test_what_comes_next_is_reserved_before_it_is_asked_for(ledger: Ledger, noted: Noted) -> None:
    left = list(NAMES)
    with reserving(noted, left) as ahead:
        wait(lambda: held(ledger) == {*NAMES[:4]})
        asked = len(noted.taken)
        first, left[:2] = left[:2], []
        assert ahead(first) == {*first}
        wait(lambda: held(ledger) == {*NAMES[:6]})
        # What was reserved is not asked for again, and what follows in one go.
        assert noted.taken[asked:] == [NAMES[4:6]]
    assert held(ledger) == {*first}  # they are running: theirs to release


def test_what_has_ended_is_let_go_of_together(ledger: Ledger, noted: Noted) -> None:
    with reserving(noted, []) as ahead:
        assert ahead(NAMES[:10]) == {*NAMES[:10]}
        for name in NAMES[:10]:
            ahead.release([name])
        wait(lambda: not held(ledger))
        assert len(noted.released) <= 2


def test_at_the_end_nothing_is_kept_that_was_not_begun(ledger: Ledger, noted: Noted) -> None:
    with reserving(noted, list(NAMES), ahead=20) as ahead:
        wait(lambda: len(held(ledger)) == 20)
        ahead(NAMES[:1])
        ahead.release(NAMES[:1])
    assert not held(ledger)


def test_what_another_driver_has_is_asked_for_again_after_a_while(
    ledger: Ledger, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.execution.reservations.REFUSED_SECONDS", 0.3)
    other = ledger.lease("driver-elsewhere")
    assert other is not None
    theirs = ledger.reservations(other)
    theirs.take(NAMES[:1])
    ahead = reserving(noted, [])

    assert ahead(NAMES[:2]) == {NAMES[1]}
    theirs.release(NAMES[:1])
    assert ahead(NAMES[:1]) == set()
    assert len(noted.taken) == 1
    wait(lambda: ahead(NAMES[:1]) == {NAMES[0]})


def test_while_storage_is_away_nothing_is_ours_and_nothing_is_lost(
    ledger: Ledger, noted: Noted
) -> None:
    noted.away = True
    with reserving(noted, list(NAMES)) as ahead:
        assert ahead(NAMES[:1]) == set()
        noted.away = False
        wait(lambda: ahead(NAMES[:1]) == {NAMES[0]})
        noted.away = True
        ahead.release(NAMES[:1])
        time.sleep(0.3)
        noted.away = False
        wait(lambda: NAMES[0] not in held(ledger) or bool(noted.released))
