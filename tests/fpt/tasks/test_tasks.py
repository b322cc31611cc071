"""What holds for every task, under both protocols."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpt import random_streams
from fpt.config import TrialConfig
from fpt.tasks import TASKS, Task, homology, images, listops, text
from fpt.tasks.base import Batch, Shape, Stored

PROTOCOLS = ("paper", "sound")


def forget() -> None:
    """Drop what this process keeps of data sets."""
    for cached in (
        homology._epoch,
        homology._sets,
        homology._splits,
        images._splits,
        images._linear_classifier,
        listops._splits,
        text._parts,
    ):
        cached.cache_clear()


def assert_fits(batch: Batch, shape: Shape, size: int) -> None:
    assert len(batch) == size
    if shape.embedded:
        assert batch.inputs.dtype == np.int64
        assert batch.inputs.shape == (size, shape.tokens)
        assert 0 <= batch.inputs.min() <= batch.inputs.max() < shape.inputs
    else:
        assert batch.inputs.dtype == np.float32
        assert batch.inputs.shape == (size, shape.tokens, shape.inputs)
        # Bits, pixels in [0, 1], or pixels that the usual normalisation has spread.
        assert np.abs(batch.inputs).max() <= 3
    assert batch.targets.dtype == np.int64
    assert batch.targets.shape == (size, shape.positions)
    assert 0 <= batch.targets.min() <= batch.targets.max() < shape.classes
    if batch.lengths is not None:
        assert batch.lengths.dtype == np.int64
        assert batch.lengths.shape == (size,)
        assert 1 <= batch.lengths.min() <= batch.lengths.max() <= shape.tokens


def equal(a: Batch, b: Batch) -> bool:
    return np.array_equal(a.inputs, b.inputs) and np.array_equal(a.targets, b.targets)


def rows(stored: Stored) -> set[bytes]:
    """The inputs of a set, an entry each."""
    return {row.tobytes() for row in stored.examples.inputs}


def test_every_task_bears_its_name() -> None:
    for name, task in TASKS.items():
        assert task.model_fields["name"].default == name


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_batches_have_the_shapes_and_types_promised(task: Task, protocol: Any) -> None:
    shape, splits = task.shape(protocol), task.splits(protocol)

    for source in (splits.train, splits.test):
        assert_fits(source.batch(1, random_streams.TRAINING, 3, 7), shape, 7)
    for stored in (splits.validation, splits.test):
        if isinstance(stored, Stored):
            sizes = [len(chunk) for chunk in stored.chunks(32)]
            assert sum(sizes) == len(stored)
            assert set(sizes[:-1]) <= {32}
            assert_fits(next(stored.chunks(5)), shape, 5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_batch_is_a_function_of_seed_stream_and_step(task: Task, protocol: Any) -> None:
    source = task.splits(protocol).train
    batch = source.batch(1, random_streams.TRAINING, 3, 16)
    forget()
    again = task.splits(protocol).train

    assert equal(batch, again.batch(1, random_streams.TRAINING, 3, 16))
    assert not equal(batch, again.batch(2, random_streams.TRAINING, 3, 16))
    assert not equal(batch, again.batch(1, random_streams.EVALUATION, 3, 16))
    assert not equal(batch, again.batch(1, random_streams.TRAINING, 4, 16))


def test_evaluation_sets_are_the_same_for_every_trial(task: Task) -> None:
    first = task.splits("sound")
    forget()
    second = task.splits("sound")

    for name in ("validation", "test"):
        assert equal(getattr(first, name).examples, getattr(second, name).examples)
    assert first.digest == second.digest


@pytest.mark.parametrize("name", ["listops", "mnist", "cifar10", "cifar10-lra", "digits"])
def test_finite_splits_share_no_example(name: str, examples: Any, tmp_path: Path) -> None:
    splits = examples[name](tmp_path).splits("sound")
    assert isinstance(splits.train, Stored)
    assert isinstance(splits.validation, Stored)
    assert isinstance(splits.test, Stored)

    train, validation, test = rows(splits.train), rows(splits.validation), rows(splits.test)

    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_paper_has_no_validation_split_and_sound_reads_whole_sets(task: Task) -> None:
    assert task.splits("paper").validation is None
    sound = task.splits("sound")
    assert isinstance(sound.validation, Stored)
    assert isinstance(sound.test, Stored)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_baseline_lies_between_chance_and_one(task: Task, protocol: Any) -> None:
    baseline = task.baseline(protocol)

    assert 1 / task.shape(protocol).classes <= baseline.accuracy < 1
    assert baseline.rule


def test_identity_is_json_without_paths_and_survives_a_move(make: Any, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    task = make(here)
    identity = task.identity()
    if here.exists():
        shutil.move(here, there)
    moved = make(there)

    assert json.loads(json.dumps(identity)) == identity
    assert identity["name"] == task.name
    assert str(tmp_path) not in json.dumps(identity)
    assert moved.identity() == identity


def test_a_task_survives_being_written_and_read(task: Task) -> None:
    assert type(task).model_validate(task.model_dump(mode="json")) == task
    assert type(task).model_validate_json(task.model_dump_json()) == task


def test_every_parameter_is_explained() -> None:
    for task in TASKS.values():
        unexplained = {
            name
            for name, field in task.model_fields.items()
            if name != "name" and not field.description
        }
        assert not unexplained, task


def test_importing_tasks_imports_nothing_heavy() -> None:
    code = "import sys, fpt.tasks; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"torch", "sklearn", "scipy", "pandas", "pyarrow", "datasets", "PIL"} & set(loaded)


# If one of these changes, what a task of this version means has changed: bump its `version`.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bit-memory", "fcbbf1e1a78ed861"),
        ("bit-xor", "17c658d53a7a0b5e"),
        ("listops", "f9304a3664c374d4"),
        ("digits", "b4c5b9c7d951b749"),
    ],
)
def test_the_numbers_of_a_version_do_not_change(
    name: str, expected: str, examples: Any, tmp_path: Path
) -> None:
    splits = examples[name](tmp_path).splits("sound")
    assert isinstance(splits.test, Stored)
    batches = [splits.train.batch(5, random_streams.TRAINING, 2, 64), *splits.test.chunks(50)]
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.inputs.tobytes() + batch.targets.tobytes())

    assert TASKS[name].version == 1
    assert digest.hexdigest()[:16] == expected


NORMS = 25 * 2 * 768
"""Gains and biases of GPT-2 base: two a layer and the last one."""


# The paper's code, GPT-2 base: input layer, output layer and norms, without positions.
@pytest.mark.parametrize(
    ("task", "trained"),
    [
        (TASKS["bit-memory"](), 154_468),
        (TASKS["bit-xor"](), 41_474),
        (TASKS["listops"](), 57_610),
        (TASKS["mnist"](), 59_146),
        (TASKS["cifar10"](), 83_722),
        (TASKS["cifar10-lra"](), 47_626),
        (TASKS["remote-homology"](), 984_240),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shapes_give_the_published_counts_of_parameters(task: Task, trained: int) -> None:
    shape = task.shape("paper")
    into = shape.inputs * 768 if shape.embedded else (shape.inputs + 1) * 768

    assert into + NORMS + (768 + 1) * shape.classes * shape.outputs == trained


@pytest.mark.parametrize(
    ("name", "protocol", "tokens", "inputs"),
    [
        ("bit-memory", "paper", 120, 50),
        ("bit-xor", "paper", 10, 1),
        ("listops", "paper", 512, 15),
        ("listops", "sound", 2000, 16),
        ("mnist", "paper", 49, 16),
        ("cifar10", "paper", 64, 48),
        ("cifar10-lra", "paper", 1024, 1),
        ("remote-homology", "sound", 1024, 30),
        ("digits", "sound", 16, 4),
    ],
)
def test_default_shapes_are_the_papers(name: str, protocol: Any, tokens: int, inputs: int) -> None:
    shape = TASKS[name]().shape(protocol)

    assert (shape.tokens, shape.inputs) == (tokens, inputs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_task_trains_to_its_end(task: Task, protocol: Any) -> None:
    from fpt.trainer import train

    trial = TrialConfig(
        task=task,
        protocol=protocol,
        backbone={"name": "gpt2", "layers": 1, "width": 16, "heads": 2},  # type: ignore[arg-type]
        pretraining="random",
        dropout=0,
        batch_size=2,
        steps=2,
        evaluation={"every": 2, "batches": 1, "training_set": 4},  # type: ignore[arg-type]
        seed=0,
    )
    training = train([trial])
    splits = {record.split for record in training}
    outcome = training.outcomes[0]

    assert outcome.outcome == "done"
    assert splits == ({"train", "test"} if protocol == "paper" else {"train", "validation", "test"})
    assert outcome.test_accuracy is not None
    assert outcome.training_set_loss is not None
    assert (outcome.validation_accuracy is None) == (protocol == "paper")
