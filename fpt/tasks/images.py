"""Image classification: an image is cut into square patches, a token each, row by row.

A patch is written out row by row too, and a pixel channel by channel, as in the paper's code.
Images are stored as they come, (height, width, channels) uint8, and become numbers when they are
handed out: in [0, 1] but for CIFAR-10, which is augmented in training and normalised, as in the
paper's code (its normalisation of MNIST is mean 0, deviation 1). Where a set has no validation
split of its own, one is carved out of the training split: seeded, stratified, the same for every
trial.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from fpt import random_streams
from fpt.files import DataError
from fpt.hub import HubData
from fpt.spec import JSON, DataPath
from fpt.tasks.base import (
    FIXED_SET_SEED,
    Baseline,
    Batch,
    ProtocolName,
    Shape,
    Splits,
    Stored,
    Task,
)
from fpt.tasks.image_files import SPLITS, Images, find_images


class ImageTask(Task):
    """What all image tasks have in common; a subclass says where its images come from."""

    height: ClassVar[int]
    width: ClassVar[int]
    channels: ClassVar[int]
    """Numbers that a token holds of each pixel."""
    brightest: ClassVar[int] = 255
    """The pixel that becomes 1."""
    classes: ClassVar[int] = 10

    patch: int = Field(ge=1)
    """Side of a patch in pixels; divides the image's sides."""
    validation: int = Field(ge=1)
    """Images of the validation split, taken from the training split (protocol sound)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"patch {self.patch} does not divide the {self.height} x {self.width} pixels of "
                f"{self.name}"
            )
        return self

    def published(self) -> tuple[Images, Images]:
        """The training split and the test split, as they are published.

        Raises:
            DataError: If they are missing or not what they should be.
        """
        raise NotImplementedError

    def source_digest(self) -> str | None:
        """The digest of the files that `published` reads; None where they cannot change."""
        return None

    def shape(self, protocol: ProtocolName) -> Shape:
        """A token a patch."""
        return Shape(
            tokens=(self.height // self.patch) * (self.width // self.patch),
            inputs=self.patch**2 * self.channels,
            embedded=False,
            classes=self.classes,
        )

    def splits(self, protocol: ProtocolName) -> Splits:
        """The published splits; under `sound` with a validation split carved out of training."""
        return _splits(self, protocol, self.source_digest())

    def baseline(self, protocol: ProtocolName) -> Baseline:
        """A linear classifier on the pixels, fitted to the training split."""
        return _linear_classifier(self, protocol, self.source_digest())

    def values(self, rng: np.random.Generator | None, pixels: np.ndarray) -> np.ndarray:
        """What a model sees of images.

        Args:
            rng: Given in training, where images may be augmented; None in evaluation.
            pixels: (B, height, width, channels as published) uint8.

        Returns:
            (B, height, width, channels) float32.
        """
        return pixels.astype(np.float32) / self.brightest

    def tokens(self, rng: np.random.Generator | None, batch: Batch) -> Batch:
        """Images (B, height, width, channels as published) uint8 to patches (B, T, F) float32."""
        images = self.values(rng, batch.inputs)
        size, p = len(images), self.patch
        grid = images.reshape(size, self.height // p, p, self.width // p, p, self.channels)
        patches = grid.transpose(0, 1, 3, 2, 4, 5).reshape(size, -1, p * p * self.channels)
        return Batch(patches, batch.targets)


# Kept: the trials of a process share the sets. The digest is there to notice a changed folder.
@functools.lru_cache(maxsize=4)
def _splits(task: ImageTask, protocol: ProtocolName, digest: str | None) -> Splits:
    train, test = task.published()
    sha = hashlib.sha256()
    for images in (train, test):
        sha.update(images.pixels.tobytes() + images.labels.tobytes())

    def stored(images: Images) -> Stored:
        examples = Batch(images.pixels, images.labels[:, None])
        return Stored(examples, task.tokens, augments=getattr(task, "augment", False))

    if protocol == "paper":
        return Splits(train=stored(train), test=stored(test), digest=sha.hexdigest())
    if task.validation >= len(train.labels):
        raise DataError(
            f"{task.name}: validation {task.validation:,} leaves nothing of the "
            f"{len(train.labels):,} training images; set validation to fewer, such as "
            f"{max(1, len(train.labels) // 10)}"
        )
    carved = stratified(train.labels, task.validation)
    return Splits(
        train=stored(train.take(np.flatnonzero(~carved))),
        validation=stored(train.take(np.flatnonzero(carved))),
        test=stored(test),
        digest=sha.hexdigest(),
    )


def stratified(labels: np.ndarray, size: int) -> np.ndarray:
    """A fixed choice of `size` examples with the classes in the proportions of the whole.

    Args:
        labels: (N,) the classes.
        size: At most N.

    Returns:
        (N,) bool, with `size` of them true.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(counts * size, len(labels))
    # What rounding down leaves goes to the classes that it took most from.
    shares[np.argsort(-remainders, kind="stable")[: size - shares.sum()]] += 1
    shuffled = random_streams.generator(FIXED_SET_SEED, random_streams.SPLIT).permutation(
        len(labels)
    )
    chosen = np.zeros(len(labels), dtype=bool)
    for label, share in zip(classes, shares, strict=True):
        chosen[shuffled[labels[shuffled] == label][:share]] = True
    return chosen


@functools.lru_cache(maxsize=16)
def _linear_classifier(task: ImageTask, protocol: ProtocolName, digest: str | None) -> Baseline:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    splits = task.splits(protocol)
    assert isinstance(splits.train, Stored)
    assert isinstance(splits.test, Stored)
    train, test = (_flat(task, stored) for stored in (splits.train, splits.test))
    # One thread: more of them change the last digit, and on a busy machine take ten times as long.
    with threadpool_limits(1), warnings.catch_warnings():
        # 50 iterations: 6 s on MNIST, within 0.3 % of where it converges, and 18 s on 50,000 colour
        # images of 32 x 32, where 200 do a little worse on the test split.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LogisticRegression(max_iter=50)
        classifier.fit(train, splits.train.examples.targets[:, 0])
    right = classifier.predict(test) == splits.test.examples.targets[:, 0]
    return Baseline(float(right.mean()), "multinomial logistic regression on the pixels")


def _flat(task: ImageTask, stored: Stored) -> np.ndarray:
    """(N, height x width x channels) float32, not augmented."""
    flat = np.empty((len(stored), task.height * task.width * task.channels), dtype=np.float32)
    # In pieces: 50,000 colour images are 0.6 GB, and each operation on them would be as much again.
    for start in range(0, len(flat), 1_000):
        pixels = stored.examples.inputs[start : start + 1_000]
        flat[start : start + 1_000] = task.values(None, pixels).reshape(len(pixels), -1)
    return flat


class PublishedImages(ImageTask):
    """Images from a folder of the user's, or from the Hugging Face Hub."""

    colours: ClassVar[tuple[int, ...]]
    """The channels that published images may have."""
    repository: ClassVar[str]
    """The data set on the Hub."""
    files: ClassVar[tuple[str, ...]]
    """What of it is read."""
    column: ClassVar[str]
    """Its column of images."""

    folder: DataPath | None = None
    """A folder with the images: the four idx files (gzipped or not), CIFAR-10's python batches, a
    tree train/<class>/*.png and test/<class>/*.png, or one npz with x_train, y_train, x_test and
    y_test. null: the Hub."""
    revision: str
    """The Hub's revision; not used with a folder."""

    def published(self) -> tuple[Images, Images]:
        """The training split and the test split.

        Raises:
            DataError: If the folder is not whole, or the Hub cannot be reached.
        """
        if self.folder is None:
            where = self.repository
            splits = _from_hub(self.hub_data(), self.column)
        else:
            where = str(self.folder)
            splits = find_images(self.folder, self.classes).read()
        for name, images in zip(SPLITS, splits, strict=True):
            _check_images(self, f"{where}: {name}", images)
        return splits

    def hub(self) -> HubData | None:
        """The data set, but with a folder."""
        return self.hub_data() if self.folder is None else None

    def hub_data(self) -> HubData:
        """The data set on the Hub, whether it is used or not."""
        return HubData(self.repository, self.revision, self.files)

    def source_digest(self) -> str | None:
        """The digest of the folder's images."""
        return None if self.folder is None else find_images(self.folder, self.classes).digest

    def identity(self) -> JSON:
        """The parameters; a folder by its content, the Hub by its revision."""
        out = super().identity()
        if self.folder is not None:
            out |= {"folder": f"sha256:{self.source_digest()}", "revision": None}
        return out


class Mnist(PublishedImages):
    """MNIST: 60,000 + 10,000 handwritten digits of 28 x 28.

    The paper's text says 32 x 32 and 64 tokens; its code does 28 x 28, which are 49 tokens.
    """

    height: ClassVar[int] = 28
    width: ClassVar[int] = 28
    channels: ClassVar[int] = 1
    colours: ClassVar[tuple[int, ...]] = (1,)
    repository: ClassVar[str] = "ylecun/mnist"
    files: ClassVar[tuple[str, ...]] = (
        "README.md", "mnist/train-*.parquet", "mnist/test-*.parquet"
    )  # fmt: skip
    column: ClassVar[str] = "image"

    name: Literal["mnist"] = "mnist"
    patch: int = Field(default=4, ge=1)
    """Side of a patch in pixels; divides 28."""
    validation: int = Field(default=5_000, ge=1)
    """Images of the validation split, taken from the training split (protocol sound)."""
    revision: str = "77f3279092a1c1579b2250db8eafed0ad422088c"
    """The Hub's revision; not used with a folder."""


CIFAR10_MEAN = np.array([0.4914, 0.4822, 0.4465], dtype=np.float32)
CIFAR10_DEVIATION = np.array([0.2023, 0.1994, 0.2010], dtype=np.float32)
"""Of red, green and blue, as in the paper's code. Its deviations are the mean of those within each
image; over all pixels of the training split they are 0.2470, 0.2435 and 0.2616."""

GREY = np.array([0.2989, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue: ITU-R BT.601, as the paper's code has them from torchvision."""

PADDING = 4
"""Black pixels around an image, before a piece of its own size is cut out at random."""
DEGREES = 20.0
"""How far an image is turned at most, either way."""


class Moves(NamedTuple):
    """How each of B images is moved: the arguments of `moved`."""

    top: np.ndarray
    left: np.ndarray
    mirrored: np.ndarray
    degrees: np.ndarray


def moves(rng: np.random.Generator, size: int) -> Moves:
    """Draw how images are moved as the paper trains on them: mirrored half of the time, and turned
    by up to 20 degrees.
    """
    top, left = rng.integers(0, 2 * PADDING + 1, (2, size))
    mirrored = rng.random(size) < 0.5
    return Moves(top, left, mirrored, rng.uniform(-DEGREES, DEGREES, size))


def augmented(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Images as the paper trains on: cut out of a black frame, mirrored half of the time, turned.

    Args:
        rng: All that this depends on but for the images.
        pixels: (B, height, width, channels).
    """
    return moved(pixels, *moves(rng, len(pixels)))


def moved(
    pixels: np.ndarray,
    top: np.ndarray,
    left: np.ndarray,
    mirrored: np.ndarray,
    degrees: np.ndarray,
) -> np.ndarray:
    """Images that are cut out of a black frame, then mirrored, then turned about their centre.

    Turning takes the nearest pixel, and black beyond the edge.

    Args:
        pixels: (B, height, width, channels).
        top: (B,) where the cut begins in the frame, 0 to 2 PADDING.
        left: (B,) likewise.
        mirrored: (B,) bool: left and right are exchanged.
        degrees: (B,) counter-clockwise.
    """
    size, height, width = pixels.shape[:3]
    framed = np.pad(pixels, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    # Each step only picks pixels, so that all three are one look-up, told from the last to the
    # first: where in the cut a pixel of the result comes from, and where that lies in the frame.
    angle = np.radians(degrees)[:, None, None]
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width) - (width - 1) / 2
    row = np.rint(np.sin(angle) * x + np.cos(angle) * y + (height - 1) / 2).astype(np.int64)
    column = np.rint(np.cos(angle) * x - np.sin(angle) * y + (width - 1) / 2).astype(np.int64)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    column = np.where(mirrored[:, None, None], width - 1 - column, column)
    # A corner of the frame is black.
    row = np.where(inside, row + top[:, None, None], 0)
    column = np.where(inside, column + left[:, None, None], 0)
    return framed[np.arange(size)[:, None, None], row, column]


class Cifar10Images(PublishedImages):
    """What both tasks on CIFAR-10 have in common; a subclass says what a pixel's numbers are."""

    height: ClassVar[int] = 32
    width: ClassVar[int] = 32
    repository: ClassVar[str] = "uoft-cs/cifar10"
    files: ClassVar[tuple[str, ...]] = (
        "README.md", "plain_text/train-*.parquet", "plain_text/test-*.parquet"
    )  # fmt: skip
    column: ClassVar[str] = "img"

    validation: int = Field(default=5_000, ge=1)
    """Images of the validation split, taken from the training split (protocol sound)."""
    revision: str = "0b2714987fa478483af9968de7c934580d0bb9a2"
    """The Hub's revision; not used with a folder."""
    augment: bool = True
    """Training images are moved, mirrored and turned at random."""

    def values(self, rng: np.random.Generator | None, pixels: np.ndarray) -> np.ndarray:
        """Augmented in training; in [0, 1]."""
        if rng is not None and self.augment:
            pixels = augmented(rng, pixels)
        return super().values(None, pixels)


class Cifar10(Cifar10Images):
    """CIFAR-10: 50,000 + 10,000 colour photographs of 32 x 32 in ten classes."""

    channels: ClassVar[int] = 3
    colours: ClassVar[tuple[int, ...]] = (3,)

    name: Literal["cifar10"] = "cifar10"
    patch: int = Field(default=4, ge=1)
    """Side of a patch in pixels; divides 32."""

    def values(self, rng: np.random.Generator | None, pixels: np.ndarray) -> np.ndarray:
        """Augmented in training, and normalised by channel."""
        return (super().values(rng, pixels) - CIFAR10_MEAN) / CIFAR10_DEVIATION


class Cifar10Lra(Cifar10Images):
    """CIFAR-10 in grey, a pixel a token: the image task of the Long Range Arena."""

    channels: ClassVar[int] = 1
    colours: ClassVar[tuple[int, ...]] = (3, 1)

    name: Literal["cifar10-lra"] = "cifar10-lra"
    patch: int = Field(default=1, ge=1)
    """Side of a patch in pixels; divides 32."""

    def values(self, rng: np.random.Generator | None, pixels: np.ndarray) -> np.ndarray:
        """Augmented in training, made grey if they have colour, and brought to [-1, 1]."""
        values = super().values(rng, pixels)
        if values.shape[-1] == 3:
            red, green, blue = np.moveaxis(values, -1, 0)
            values = (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[..., None]
        return (values - np.float32(0.5)) / np.float32(0.5)


TRAINING_DIGITS = 1_300
"""Of scikit-learn's 1,797 digits, those to train on."""


class Digits(ImageTask):
    """scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 that are always at hand.

    They have no published split: a fixed one has 1,300 to train on and 497 to test.
    """

    height: ClassVar[int] = 8
    width: ClassVar[int] = 8
    channels: ClassVar[int] = 1
    brightest: ClassVar[int] = 16

    name: Literal["digits"] = "digits"
    patch: int = Field(default=2, ge=1)
    """Side of a patch in pixels; divides 8."""
    validation: int = Field(default=200, ge=1)
    """Images of the validation split, taken from the training split (protocol sound)."""

    def test_examples(self) -> int:
        """Return what is left of 1,797 scans."""
        return 1_797 - TRAINING_DIGITS

    def published(self) -> tuple[Images, Images]:
        """The fixed split."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = Images(digits.images[..., None].astype(np.uint8), digits.target.astype(np.uint8))
        training = stratified(images.labels, TRAINING_DIGITS)
        return images.take(np.flatnonzero(training)), images.take(np.flatnonzero(~training))


def _from_hub(data: HubData, column: str) -> tuple[Images, Images]:
    splits = data.load()

    def images(name: str) -> Images:
        split = splits[name]
        pixels = np.stack([np.asarray(image) for image in split[column]])
        return Images(
            pixels.reshape(*pixels.shape[:3], -1), np.asarray(split["label"], dtype=np.uint8)
        )

    return images("train"), images("test")


def _check_images(task: PublishedImages, where: str, images: Images) -> None:
    shapes = [(task.height, task.width, channels) for channels in task.colours]
    if images.pixels.shape[1:] not in shapes:
        raise DataError(
            f"{where}: images of {images.pixels.shape[1:]}, not of {' or '.join(map(str, shapes))}"
        )
    if len(images.pixels) != len(images.labels):
        raise DataError(
            f"{where}: {len(images.pixels):,} images but {len(images.labels):,} labels; the files "
            "do not belong together"
        )
    if not len(images.labels):
        raise DataError(f"{where}: no images")
    if images.labels.max() >= task.classes:
        raise DataError(f"{where}: labels have to lie between 0 and {task.classes - 1}")
