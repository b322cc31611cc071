"""Text: windows, held-out parts, digests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fpt import random_streams
from fpt.files import DataError
from fpt.tasks.base import Stored
from fpt.tasks.text import Text


def written(folder: Path, **files: str | bytes) -> Path:
    """A folder with files, named without their suffix .txt."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}.txt").write_bytes(raw)
    return folder


def held_out(task: Text) -> tuple[Stored, Stored]:
    splits = task.splits("sound")
    assert splits.validation is not None
    assert isinstance(splits.test, Stored)
    return splits.validation, splits.test


def test_each_part_comes_from_its_place_in_each_file(tmp_path: Path) -> None:
    folder = written(
        tmp_path, one="a" * 900 + "b" * 50 + "c" * 50, two="A" * 90 + "B" * 5 + "C" * 5
    )
    task = Text(path=folder, tokens=4)
    validation, test = held_out(task)
    train = task.splits("sound").train
    seen = [train.batch(0, random_streams.TRAINING, step, 64).inputs for step in range(20)]

    assert {chr(byte) for byte in np.unique(seen)} == {"a", "A"}
    assert {chr(byte) for byte in np.unique(validation.examples.inputs)} == {"b", "B"}
    assert {chr(byte) for byte in np.unique(test.examples.inputs)} == {"c", "C"}


@given(size=st.integers(200, 400), tokens=st.integers(1, 12))
def test_each_held_out_byte_is_predicted_once(
    size: int, tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(text)
    _, test = held_out(Text(path=file, tokens=tokens, held_out=0.25))
    part = text[size - round(size * 0.25) + round(size * 0.25) // 2 :]
    targets = test.examples.targets.ravel().astype(np.uint8).tobytes()

    assert targets == part[1 : 1 + len(targets)]
    assert len(part) - 1 - len(targets) < tokens


def test_targets_are_the_next_bytes(tmp_path: Path) -> None:
    text = bytes(range(256)) * 8
    task = Text(path=written(tmp_path, text=text), tokens=16)
    for batch in (
        task.splits("sound").train.batch(0, random_streams.TRAINING, 0, 50),
        *held_out(task)[0].chunks(3),
    ):
        assert np.array_equal(batch.targets, (batch.inputs + 1) % 256)


def test_every_window_of_the_training_part_can_be_drawn(tmp_path: Path) -> None:
    # 0 to 19 train: the windows of 4 + 1 begin at 0 to 15.
    task = Text(path=written(tmp_path, text=bytes(range(40))), tokens=4, held_out=0.5)
    batch = task.splits("sound").train.batch(0, random_streams.TRAINING, 0, 2_000)

    assert set(batch.inputs[:, 0].tolist()) == set(range(16))


def test_the_unigram_is_what_its_formula_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    uniform = Text(path=written(tmp_path, u=rng.bytes(200_000)), tokens=32)
    biased = bytes(rng.choice([97, 98], 40_000, p=[0.75, 0.25]).tolist())
    skewed = Text(path=written(tmp_path / "skewed", s=biased), tokens=32)

    assert uniform.unigram_bits() == pytest.approx(8, abs=0.02)
    assert skewed.unigram_bits() == pytest.approx(
        -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)), abs=0.05
    )
    assert skewed.baseline("sound").accuracy == pytest.approx(0.75, abs=0.05)


def test_a_byte_that_training_never_saw_is_only_improbable(tmp_path: Path) -> None:
    task = Text(path=written(tmp_path, t="a" * 900 + "b" * 100), tokens=4)

    assert np.isfinite(task.unigram_bits())


def test_a_folder_is_read_in_the_order_of_names_and_not_below(tmp_path: Path) -> None:
    folder = written(tmp_path, b="b" * 100, a="a" * 100)
    (folder / "c.csv").write_text("c" * 100)
    written(folder / "below", d="d" * 100)
    validation, _ = held_out(Text(path=folder, tokens=1, held_out=0.5))

    assert bytes(validation.examples.inputs.ravel().tolist()) == b"a" * 25 + b"b" * 24


class TestDigest:
    def test_identity_is_the_content_wherever_it_lies(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = Text(path=written(tmp_path / "here", t="x" * 4_000))
        there = Text(path=written(tmp_path / "there", t="x" * 4_000))
        other = Text(path=written(tmp_path / "other", t="y" * 4_000))
        monkeypatch.chdir(tmp_path)

        assert here.identity() == there.identity() == Text(path=Path("here")).identity()
        assert here.identity() != other.identity()

    def test_with_a_digest_identity_needs_no_text(self, tmp_path: Path) -> None:
        task = Text(path=written(tmp_path, t="x" * 4_000))
        digest = task.splits("sound").digest
        assert digest is not None
        absent = Text(path=tmp_path / "nowhere", digest=digest)

        assert absent.identity() == task.identity()
        with pytest.raises(DataError, match="nowhere: no such file or folder"):
            absent.splits("sound")

    def test_another_text_than_asked_for(self, tmp_path: Path) -> None:
        task = Text(path=written(tmp_path, t="x" * 4_000), digest="0" * 64)
        with pytest.raises(DataError, match=r"the text's digest is [0-9a-f]{64}, but 0{64} was"):
            task.splits("sound")

    def test_a_text_that_changes_is_read_again(self, tmp_path: Path) -> None:
        task = Text(path=written(tmp_path, t="x" * 4_000))
        before = task.splits("sound")
        written(tmp_path, t="y" * 4_000)
        os.utime(tmp_path / "t.txt", ns=(0, 1))
        after = task.splits("sound")

        assert before.digest != after.digest
        assert after.train.batch(0, random_streams.TRAINING, 0, 1).inputs[0, 0] == ord("y")

    def test_a_digest_is_64_hex_digits(self, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="digest"):
            Text(path=tmp_path, digest="abc")


def test_too_little_text_is_said_to_be_too_little(tmp_path: Path) -> None:
    task = Text(path=written(tmp_path, t="x" * 1_000))
    with pytest.raises(DataError, match=r"50 bytes for validation, where a window takes 129"):
        task.splits("sound")


def test_a_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no text \(\*\.txt, \*\.md\)"):
        Text(path=tmp_path).identity()


def test_real_english(data: Path) -> None:
    task = Text(path=data / "text" / "classic_books")

    # The most frequent byte of English is the space.
    assert 0.15 < task.baseline("sound").accuracy < 0.2
    assert 4.3 < task.unigram_bits() < 4.8
