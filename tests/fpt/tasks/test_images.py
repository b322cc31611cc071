"""Image tasks: patches, splits, augmentation, and data that is not what it should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from fpt import random_streams
from fpt.files import DataError
from fpt.hub import HubData, is_fixed
from fpt.tasks import images
from fpt.tasks.base import Batch, Stored
from fpt.tasks.images import Cifar10, Cifar10Lra, Digits, Mnist, augmented, moved, stratified

Write = Callable[..., Path]


def photographs(size: int) -> np.ndarray:
    """Colour images without a black pixel."""
    return np.random.default_rng(3).integers(1, 256, (size, 32, 32, 3), dtype=np.uint8)


def still(pixels: np.ndarray, **changed: list[float]) -> np.ndarray:
    """`moved`, where only what is named moves."""
    arguments: dict[str, list[float]] = {
        "top": [4] * len(pixels),
        "left": [4] * len(pixels),
        "mirrored": [False] * len(pixels),
        "degrees": [0] * len(pixels),
    }
    arrays = {name: np.array(value) for name, value in (arguments | changed).items()}
    return moved(pixels, **arrays)


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    data=st.data(),
)
def test_a_stratified_choice_keeps_the_proportions(counts: list[int], data: st.DataObject) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    size = data.draw(st.integers(0, len(labels)))
    chosen = stratified(labels, size)

    assert chosen.sum() == size
    assert np.array_equal(chosen, stratified(labels, size))
    for label, count in enumerate(counts):
        assert abs(chosen[labels == label].sum() - count * size / len(labels)) <= 1


@pytest.mark.parametrize("task", [Digits(patch=2), Digits(patch=4), Mnist(patch=7)], ids=str)
def test_patches_are_read_row_by_row(task: Digits | Mnist) -> None:
    side, p = task.height, task.patch
    image = np.arange(side * side, dtype=np.uint8).reshape(1, side, side, 1)
    tokens = task.tokens(None, Batch(image, np.zeros((1, 1)))).inputs[0]
    corners = [(y, x) for y in range(0, side, p) for x in range(0, side, p)]

    assert len(tokens) == len(corners) == task.shape("sound").tokens
    for token, (y, x) in zip(tokens, corners, strict=True):
        expected = image[0, y : y + p, x : x + p, 0].ravel() / task.brightest
        assert token == pytest.approx(expected)


def test_a_pixel_is_written_channel_by_channel() -> None:
    pixels = photographs(1)
    tokens = Cifar10().tokens(None, Batch(pixels, np.zeros((1, 1)))).inputs[0]

    assert tokens.shape == (64, 48)
    row, column, y, x, channel = 5, 2, 3, 1, 2
    value = pixels[0, 4 * row + y, 4 * column + x, channel] / 255
    expected = (value - 0.4465) / 0.2010
    assert tokens[8 * row + column, 12 * y + 3 * x + channel] == pytest.approx(expected, rel=1e-5)


@given(top=st.integers(0, 8), left=st.integers(0, 8))
def test_a_cut_out_of_a_black_frame(top: int, left: int) -> None:
    pixels = photographs(1)
    found = still(pixels, top=[top], left=[left])[0]

    for y in range(32):
        for x in range(32):
            from_y, from_x = y + top - 4, x + left - 4
            inside = 0 <= from_y < 32 and 0 <= from_x < 32
            expected = pixels[0, from_y, from_x] if inside else np.zeros(3)
            assert np.array_equal(found[y, x], expected)


def test_mirrored_images_are_mirrored() -> None:
    pixels = photographs(3)
    found = still(pixels, mirrored=[True, False, True])

    assert np.array_equal(found[0], np.asarray(Image.fromarray(pixels[0]).transpose(0)))
    assert np.array_equal(found[1], pixels[1])
    assert np.array_equal(found[2], pixels[2, :, ::-1])


def turned_by_torch(pixels: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """The nearest pixel, zeros outside, by the functions that torchvision turns tensors with."""
    angle = torch.deg2rad(torch.from_numpy(degrees))
    zero = torch.zeros_like(angle)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
    theta = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    grid = torch.nn.functional.affine_grid(theta, list(values.shape), align_corners=False)
    out = torch.nn.functional.grid_sample(values, grid, mode="nearest", align_corners=False)
    return out.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_turned_images_are_turned_as_torch_and_pillow_turn_them() -> None:
    degrees = np.array([*np.random.default_rng(4).uniform(-20, 20, 30), 0, 20, -20])
    pixels = photographs(len(degrees))
    found = still(pixels, degrees=list(degrees))

    assert np.array_equal(found, turned_by_torch(pixels, degrees))
    assert np.array_equal(found[-3], pixels[-3])
    for ours, image, angle in zip(found, pixels, degrees, strict=True):
        # Pillow computes in fixed point: a pixel whose source lies half-way may differ.
        theirs = np.asarray(Image.fromarray(image).rotate(angle))
        assert (ours == theirs).all(axis=-1).mean() > 0.99


def test_images_are_cut_then_mirrored_then_turned() -> None:
    pixels = photographs(1)
    cut = np.zeros_like(pixels)
    cut[0, 3:, :29] = pixels[0, :29, 3:]
    expected = turned_by_torch(np.ascontiguousarray(cut[:, :, ::-1]), np.array([13.0]))

    found = still(pixels, top=[1], left=[7], mirrored=[True], degrees=[13])
    assert np.array_equal(found, expected)


def test_what_is_drawn_fills_the_ranges_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, np.ndarray] = {}

    def note(pixels: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
        drawn.update(zip(("top", "left", "mirrored", "degrees"), arrays, strict=True))
        return pixels

    monkeypatch.setattr(images, "moved", note)
    augmented(np.random.default_rng(0), np.zeros((9_000, 1, 1, 1)))

    for name in ("top", "left"):
        assert np.bincount(drawn[name]) == pytest.approx(1_000, abs=150)
        assert set(drawn[name]) == set(range(9))
    assert np.corrcoef(drawn["top"], drawn["left"])[0, 1] == pytest.approx(0, abs=0.05)
    assert drawn["mirrored"].mean() == pytest.approx(0.5, abs=0.03)
    counts, _ = np.histogram(drawn["degrees"], bins=8, range=(-20, 20))
    assert counts.sum() == 9_000
    assert counts == pytest.approx(9_000 / 8, abs=150)


@pytest.mark.parametrize("task", [Cifar10, Cifar10Lra])
def test_only_training_images_are_augmented(
    task: type[Cifar10 | Cifar10Lra], write_npz: Write, tmp_path: Path
) -> None:
    folder = write_npz(tmp_path)
    plain, moving = task(folder=folder, augment=False), task(folder=folder)
    sources = [one.splits("paper").train for one in (plain, moving)]
    training = [source.batch(1, random_streams.TRAINING, 5, 16) for source in sources]
    evaluation = [source.batch(1, random_streams.EVALUATION, 5, 16) for source in sources]

    assert np.array_equal(evaluation[0].inputs, evaluation[1].inputs)
    assert not np.array_equal(training[0].inputs, training[1].inputs)
    assert np.array_equal(training[0].targets, training[1].targets)
    assert plain.identity() == moving.identity() | {"augment": False}
    # Each image is drawn for by itself: no two black edges are the same.
    black = moving.values(None, np.zeros((1, 32, 32, 3), dtype=np.uint8))[0, 0, 0]
    edges = (training[1].inputs.reshape(16, -1, len(black)) == black).all(axis=-1)
    assert len({row.tobytes() for row in edges}) == 16


def test_colours_are_normalised_as_in_the_papers_code() -> None:
    pixels = photographs(2)
    mean, deviation = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(
        deviation
    )

    found = Cifar10().values(None, pixels)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


def test_colour_becomes_grey_by_brightness() -> None:
    pixels = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    pixels[0, 0, :5] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30]]
    grey = (Cifar10Lra().values(None, pixels)[0, 0, :6, 0] + 1) / 2

    levels = 0.2989 * 10 + 0.587 * 20 + 0.114 * 30
    assert grey == pytest.approx([0.2989, 0.587, 0.114, 0.9999, levels / 255, 0], abs=1e-6)


def test_grey_images_are_left_as_they_are() -> None:
    pixels = photographs(1)[..., :1]

    expected = pixels.astype(np.float64) / 127.5 - 1
    assert Cifar10Lra().values(None, pixels) == pytest.approx(expected, abs=1e-6)


def test_digits_are_split_once_and_for_all() -> None:
    paper, sound = Digits().splits("paper"), Digits().splits("sound")
    assert isinstance(paper.train, Stored)
    assert isinstance(paper.test, Stored)
    assert isinstance(sound.train, Stored)
    assert isinstance(sound.test, Stored)
    assert sound.validation is not None

    assert (len(paper.train), len(paper.test)) == (1_300, 497)
    assert (len(sound.train), len(sound.validation), len(sound.test)) == (1_100, 200, 497)
    assert np.array_equal(paper.test.examples.inputs, sound.test.examples.inputs)
    for stored in (sound.train, sound.validation, sound.test):
        shares = np.bincount(stored.examples.targets[:, 0], minlength=10) / len(stored)
        assert shares == pytest.approx(0.1, abs=0.012)


def test_a_linear_classifier_knows_most_digits() -> None:
    assert 0.9 < Digits().baseline("sound").accuracy < 0.99


def test_patches_have_to_fit() -> None:
    with pytest.raises(ValidationError, match="patch 5 does not divide the 28 x 28 pixels"):
        Mnist(patch=5)


def test_validation_has_to_leave_something(write_idx: Write, tmp_path: Path) -> None:
    task = Mnist(folder=write_idx(tmp_path, train=50), validation=50)
    with pytest.raises(DataError, match="validation 50 leaves nothing of the 50"):
        task.splits("sound")


def test_zipped_files_are_read_too(write_idx: Write, tmp_path: Path) -> None:
    plain = Mnist(folder=write_idx(tmp_path / "plain")).splits("paper")
    zipped = Mnist(folder=write_idx(tmp_path / "zipped", zipped=True)).splits("paper")

    assert plain.digest == zipped.digest


def test_validation_for_a_small_folder_is_suggested(write_npz: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"5,000 leaves nothing of the 240 .*to fewer, such as 24"):
        Cifar10(folder=write_npz(tmp_path)).splits("sound")


def test_a_classifier_sees_what_the_model_sees(write_batches: Write, tmp_path: Path) -> None:
    colour, grey = (
        task(folder=write_batches(tmp_path), validation=40) for task in (Cifar10, Cifar10Lra)
    )
    stored = colour.splits("sound").train
    assert isinstance(stored, Stored)

    flat = images._flat(colour, stored)
    assert flat.shape == (200, 3072)
    assert images._flat(grey, stored).shape == (200, 1024)
    assert flat == pytest.approx(colour.values(None, stored.examples.inputs).reshape(200, -1))


def test_identity_tells_folder_from_hub(write_idx: Write, tmp_path: Path) -> None:
    folder = write_idx(tmp_path)
    hub, other, local = Mnist(), Mnist(revision="main"), Mnist(folder=folder)

    assert hub.identity() != other.identity()
    assert local.identity()["folder"].startswith("sha256:")
    assert Mnist(folder=folder, revision="main").identity() == local.identity()


@pytest.mark.parametrize(
    ("task", "shape", "problem"),
    [
        (Mnist, (28, 28, 3), r"images of \(28, 28, 3\), not of \(28, 28, 1\)"),
        (Cifar10, (32, 32, 1), r"images of \(32, 32, 1\), not of \(32, 32, 3\)"),
        (
            Cifar10Lra,
            (28, 28, 1),
            r"images of \(28, 28, 1\), not of \(32, 32, 3\) or \(32, 32, 1\)",
        ),
    ],
)
def test_images_of_another_size(
    task: type[Mnist], shape: tuple[int, ...], problem: str, tmp_path: Path
) -> None:
    pixels, labels = np.zeros((5, *shape), dtype=np.uint8), np.zeros(5, dtype=int)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    with pytest.raises(DataError, match=f"train: {problem}"):
        task(folder=tmp_path).splits("paper")


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"y_test": np.zeros(4, dtype=int)}, "test: 5 images but 4 labels"),
        ({"y_test": np.full(5, 10)}, "test: labels have to lie between 0 and 9"),
        (
            {"x_test": np.zeros((0, 28, 28), dtype=np.uint8), "y_test": np.zeros(0, dtype=int)},
            "test: no images",
        ),
    ],
)
def test_labels_have_to_fit(changed: dict[str, np.ndarray], problem: str, tmp_path: Path) -> None:
    pixels, labels = np.zeros((5, 28, 28), dtype=np.uint8), np.zeros(5, dtype=int)
    arrays = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels}
    np.savez(tmp_path / "a.npz", **(arrays | changed))
    with pytest.raises(DataError, match=problem):
        Mnist(folder=tmp_path).splits("paper")


@pytest.mark.parametrize(
    ("task", "repository"),
    [(Mnist, "ylecun/mnist"), (Cifar10, "uoft-cs/cifar10"), (Cifar10Lra, "uoft-cs/cifar10")],
)
def test_the_hub_offline_says_what_to_do(task: type[Mnist], repository: str) -> None:
    with pytest.raises(DataError, match=rf"{repository}: not in the .* name a folder"):
        task().splits("sound")


@pytest.mark.parametrize(("task", "column"), [(Mnist, "image"), (Cifar10, "img")])
def test_what_the_hub_gives_is_what_a_folder_gives(
    task: type[Mnist | Cifar10],
    column: str,
    write_idx: Write,
    write_npz: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    write = write_idx if task is Mnist else write_npz
    local = task(folder=write(tmp_path, train=30, test=20))
    hub = {
        name: datasets.Dataset.from_dict(
            {
                column: [image.squeeze() for image in split.pixels],
                "label": split.labels.tolist(),
            },
            features=datasets.Features(
                {column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
            ),
        )
        for name, split in zip(("train", "test"), local.published(), strict=True)
    }
    asked: list[HubData] = []

    def load(data: HubData) -> object:
        asked.append(data)
        return hub

    monkeypatch.setattr(HubData, "load", load)

    for ours, theirs in zip(local.published(), task().published(), strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.labels, theirs.labels)
    assert asked == [HubData(task.repository, task().revision, task.files)]
    assert task().hub() == asked[0]
    assert local.hub() is None


@pytest.mark.parametrize("task", [Mnist, Cifar10, Cifar10Lra])
def test_the_revision_is_a_commit(task: type[Mnist | Cifar10]) -> None:
    assert is_fixed(task().revision)


def test_the_real_mnist(data: Path) -> None:
    splits = Mnist(folder=data / "mnist").splits("sound")
    assert isinstance(splits.train, Stored)
    assert isinstance(splits.test, Stored)
    assert splits.validation is not None

    assert (len(splits.train), len(splits.validation), len(splits.test)) == (55_000, 5_000, 10_000)
    # Published: the mean and the deviation of the training pixels, and the first labels.
    pixels = np.concatenate([splits.train.examples.inputs, splits.validation.examples.inputs])
    assert pixels.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std() / 255 == pytest.approx(0.3081, abs=1e-4)
    assert splits.test.examples.targets[:6, 0].tolist() == [7, 2, 1, 0, 4, 1]


@pytest.mark.parametrize("task", [Cifar10, Cifar10Lra])
def test_the_real_cifar10(task: type[Cifar10 | Cifar10Lra], data: Path) -> None:
    splits = task(folder=data / "cifar10", validation=500).splits("sound")
    assert isinstance(splits.train, Stored)
    assert isinstance(splits.test, Stored)
    assert splits.validation is not None

    assert (len(splits.train), len(splits.validation), len(splits.test)) == (4_500, 500, 1_000)
    for stored, each in ((splits.train, 450), (splits.validation, 50), (splits.test, 100)):
        assert np.bincount(stored.examples.targets[:, 0]).tolist() == [each] * 10
    assert splits.digest is not None
    # Published of all 50,000: what an image is normalised with.
    pixels = splits.train.examples.inputs / 255
    assert pixels.mean(axis=(0, 1, 2)) == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)
    assert pixels.std(axis=(0, 1, 2)) == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-3)
    each_image = pixels.std(axis=(1, 2)).mean(axis=0)
    assert each_image == pytest.approx(images.CIFAR10_DEVIATION, abs=5e-3)


@pytest.mark.slow
def test_a_linear_classifier_on_real_photographs(data: Path) -> None:
    accuracy = Cifar10(folder=data / "cifar10").baseline("paper").accuracy

    assert 0.25 < accuracy < 0.4


@pytest.mark.slow
def test_a_linear_classifier_on_the_real_mnist(data: Path) -> None:
    accuracy = Mnist(folder=data / "mnist").baseline("paper").accuracy

    assert accuracy == pytest.approx(0.92, abs=0.01)
