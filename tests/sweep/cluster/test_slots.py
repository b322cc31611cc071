"""Packs that fit at a time: against a placement one by one, GPU by GPU."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.cluster.preflight import Group, Node
from sweep.cluster.slots import count_slots, left_out

NODES = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), max_size=5)
TAKEN = st.one_of(st.integers(1, 4), st.integers(1, 20).map(lambda k: Fraction(k, 20)))


def nodes(*shapes: tuple[int, int]) -> list[Node]:
    return [
        Node(f"{k}", f"10.0.0.{k}", {"CPU": float(cores)} | ({"GPU": float(gpus)} if gpus else {}))
        for k, (cores, gpus) in enumerate(shapes)
    ]


def placed(cores: int, gpus: int, taken: Fraction | int) -> int:
    """Place packs on a node until none fits: a whole number of GPUs, or a part of one."""
    left, count = [Fraction(1)] * gpus, 0
    while count < cores:
        whole = int(taken) if taken >= 1 else 1
        each = Fraction(1) if taken >= 1 else Fraction(taken)
        fit = [k for k, room in enumerate(left) if room >= each][:whole]
        if len(fit) < whole:
            break
        for k in fit:
            left[k] -= each
        count += 1
    return count


@given(NODES, TAKEN)
def test_as_many_fit_as_can_be_placed(shapes: list[tuple[int, int]], taken: Fraction | int) -> None:
    expected = sum(placed(cores, gpus, taken) for cores, gpus in shapes)
    assert count_slots(float(taken), nodes(*shapes), []) == max(1, expected)


@pytest.mark.parametrize(("taken", "slots"), [(0.3, 24), (0.25, 32), (0.1, 64), (1, 8), (2, 4)])
def test_a_fraction_is_counted_a_gpu(taken: float, slots: int) -> None:
    assert count_slots(taken, nodes((64, 8)), []) == slots


def test_without_gpus_there_are_as_many_as_cores() -> None:
    assert count_slots(0, nodes((4, 0), (3, 2)), []) == 7


def test_what_the_autoscaler_may_start_counts() -> None:
    group = Group("workers", {"CPU": 8.0, "GPU": 2.0}, 10)
    assert count_slots(0.5, nodes((1, 0)), [group]) == 40


def test_nodes_without_a_gpu_are_told_of() -> None:
    alive = nodes((8, 2), (16, 0), (16, 0))
    said = left_out(1, alive) or ""
    assert said.startswith("no pack runs on 10.0.0.1, 10.0.0.2: each takes 1 GPU and a core")
    assert left_out(0, alive) is None
    assert left_out(1, nodes((8, 2))) is None
    assert "and 3 more" in (left_out(0.5, nodes((8, 2), *[(4, 0)] * 8)) or "")
