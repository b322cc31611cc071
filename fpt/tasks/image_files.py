"""Labelled images in the formats that they are published in, as they lie in a folder.

Four formats, told apart by what the folder holds: MNIST's idx files, CIFAR-10's python batches, a
tree of PNG files by class, and one npz. A download that stopped half-way, or a file of another
kind, is an error that names the file. Data is never code: nothing that is read here can run.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpt.files import DataError, content_digest
from fpt.tasks import pickles

IDX = tuple(
    f"{split}-{kind}"
    for split in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)
"""MNIST's files, each gzipped (with .gz) or not."""

BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
"""CIFAR-10's python batches; the last one is the test split."""

BATCHES_FOLDER, BATCHES_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
"""What the batches' archive is called, and the folder in it."""

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
"""The arrays of an npz: images (N, height, width[, channels]) uint8, and labels (N,) or (N, 1)."""

SPLITS = ("train", "test")
"""The two splits that image sets are published with; a tree of PNG files has a folder for each."""


LEFT_BEHIND = frozenset(
    (
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx",
        "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
        "network trash folder", "temporary items",
    )
)  # fmt: skip
"""What Windows, macOS, Linux and network drives leave in folders, in lower case. Names that begin
with a dot (.DS_Store, ._1.png, .directory) are left aside as well."""


@dataclass(frozen=True)
class Images:
    """A split as it is published."""

    pixels: np.ndarray
    """(N, height, width, channels) uint8."""
    labels: np.ndarray
    """(N,) uint8."""

    def take(self, index: np.ndarray) -> Images:
        """The images at `index`."""
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class ImageFiles:
    """The files of one format, found whole by their names; what is in them is not read yet."""

    digest: str
    """SHA-256 over the files' names and contents."""
    read: Callable[[], tuple[Images, Images]]
    """The training split and the test split. Raises DataError if a file is not what it should be;
    whether images and labels are as many and of the right size is for the caller to check."""


def _entries(folder: Path) -> list[Path]:
    """Return what people put into a folder, sorted."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.name.lower() not in LEFT_BEHIND
    )


def find_images(folder: Path, classes: int) -> ImageFiles:
    """The labelled images that a folder holds, whatever their format.

    Args:
        folder: Where they lie. Files of no format are left aside, and so is what systems leave
            behind, in every folder: hidden files and those in `LEFT_BEHIND`.
        classes: How many classes there are; a tree of PNG files has a folder for each.

    Raises:
        DataError: If there are no images, images in two formats, or a part is missing.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {problem}; set folder to one that holds {_FORMATS}")
    names = {entry.name for entry in _entries(folder)}
    batches = folder / BATCHES_FOLDER if BATCHES_FOLDER in names else folder
    archives = sorted(folder / name for name in names if name.endswith(".npz"))
    found: dict[str, Callable[[], ImageFiles]] = {}
    if {name.removesuffix(".gz") for name in names} & set(IDX):
        found["idx files"] = functools.partial(_idx_images, folder)
    if BATCHES_FOLDER in names or names & set(BATCHES):
        found["CIFAR-10's python batches"] = functools.partial(_batch_images, batches)
    if any((folder / split).is_dir() for split in SPLITS):
        found["train/ and test/"] = functools.partial(_tree_images, folder, classes)
    found |= {file.name: functools.partial(_npz_images, file) for file in archives}
    if len(found) > 1:
        raise DataError(
            f"{folder}: holds images twice ({', '.join(found)}); keep one of them in the folder"
        )
    if not found:
        hint = f"; unpack {BATCHES_ARCHIVE} there" if BATCHES_ARCHIVE in names else ""
        raise DataError(f"{folder}: holds no images: wanted are {_FORMATS}{hint}")
    (images,) = found.values()
    return images()


_FORMATS = (
    f"the four idx files ({', '.join(IDX)}), CIFAR-10's python batches (data_batch_1 to 5 and "
    "test_batch), a tree train/<class>/*.png and test/<class>/*.png, or one npz with the arrays "
    f"{', '.join(ARRAYS)}"
)


# --- The idx format: a magic number (0, 0, type, dimensions), big-endian sizes, the values


def _idx_images(folder: Path) -> ImageFiles:
    files = []
    for name in IDX:
        plain, zipped = folder / name, folder / f"{name}.gz"
        if not (plain.is_file() or zipped.is_file()):
            raise DataError(
                f"{plain}: missing (and so is {zipped.name}); a folder of idx files holds the four "
                f"files {', '.join(IDX)}, gzipped or not"
            )
        files.append(plain if plain.is_file() else zipped)

    def read() -> tuple[Images, Images]:
        train_pixels, train_labels, test_pixels, test_labels = map(_idx, files)
        return Images(train_pixels, train_labels), Images(test_pixels, test_labels)

    return ImageFiles(content_digest(files), read)


def _idx(file: Path) -> np.ndarray:
    """(N,) labels or (N, height, width, 1) images, uint8.

    Raises:
        DataError: If the file is not a whole idx file.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
    dimensions = 3 if "-images-" in file.name else 1
    header = 4 + 4 * dimensions
    magic = struct.pack(">BBBB", 0, 0, 8, dimensions)
    if data[:4] != magic or len(data) < header:
        raise DataError(
            f"{file}: not an idx file of {'images' if dimensions == 3 else 'labels'}: it begins "
            f"with {data[:4].hex() or 'nothing'}, not with {magic.hex()}; fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise DataError(
            f"{file}: its header promises {expected:,} bytes of data, it has "
            f"{len(data) - header:,}; fetch it again"
        )
    values = np.frombuffer(data, dtype=np.uint8, offset=header)
    return values.reshape((*shape, 1) if dimensions == 3 else shape)


# --- CIFAR-10's python batches: pickled dictionaries, a row of 3,072 bytes an image, planes of red,
# --- green and blue


def _batch_images(folder: Path) -> ImageFiles:
    files = [folder / name for name in BATCHES]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file}: missing; CIFAR-10's python batches are the six files "
                f"{', '.join(BATCHES)}; unpack {BATCHES_ARCHIVE} again"
            )

    def read() -> tuple[Images, Images]:
        *train, test = map(_batch, files)
        joined = Images(
            np.concatenate([batch.pixels for batch in train]),
            np.concatenate([batch.labels for batch in train]),
        )
        return joined, test

    return ImageFiles(content_digest(files), read)


def _batch(file: Path) -> Images:
    try:
        # Python 2 wrote the published ones: their keys are bytes. Newer ones may have text.
        content = pickles.loads(file.read_bytes(), encoding="bytes")
        entries = content if isinstance(content, dict) else {}
        data, labels = (entries.get(k.encode(), entries.get(k)) for k in ("data", "labels"))
        pixels = np.asarray(data)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read as a batch of CIFAR-10: {error}; unpack {BATCHES_ARCHIVE} "
            "again"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32:
        raise DataError(
            f"{file}: not a batch of CIFAR-10: its data has to be an array of bytes, 3,072 an image"
        )
    planes = pixels.reshape(-1, 3, 32, 32)
    images = Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), _labels(str(file), labels))
    # Here, where the file is known: six files that are wrong together may add up.
    if len(images.pixels) != len(images.labels):
        raise DataError(
            f"{file}: {len(images.pixels):,} images but {len(images.labels):,} labels; unpack "
            f"{BATCHES_ARCHIVE} again"
        )
    return images


# --- A tree of PNG files: <split>/<class>/*.png; classes in the order of their folders' names


def _tree_images(folder: Path, classes: int) -> ImageFiles:
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise DataError(
                f"{folder / split}: missing; a tree of PNG files has train/<class>/*.png and "
                "test/<class>/*.png"
            )
    splits = [_folders(folder / split) for split in SPLITS]
    labels = [[inner.name for inner in split] for split in splits]
    for split, names in zip(SPLITS, labels, strict=True):
        if len(names) != classes:
            raise DataError(
                f"{folder / split}: has {len(names)} folders ({', '.join(names) or 'none'}), not "
                f"one for each of the {classes} classes"
            )
    if labels[0] != labels[1]:
        odd = ", ".join(sorted(set(labels[0]) ^ set(labels[1])))
        raise DataError(
            f"{folder}: train and test have to have the same classes; only one has {odd}"
        )
    # A planner asks for the digest of each trial's task, and there may be 60,000 files to look at.
    # They are looked at again when a file has come, gone or been renamed, which changes the folder.
    changed = tuple(inner.stat().st_mtime_ns for split in splits for inner in split)
    return _tree(folder, tuple(labels[0]), changed)


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


@functools.lru_cache(maxsize=4)
def _tree(folder: Path, classes: tuple[str, ...], changed: tuple[int, ...]) -> ImageFiles:
    files = [[_pngs(folder / split / name) for name in classes] for split in SPLITS]
    digest = hashlib.sha256()
    for split, by_class in zip(SPLITS, files, strict=True):
        for name, images in zip(classes, by_class, strict=True):
            digest.update(f"{split}/{name}\0{content_digest(images)}\0".encode())

    def read() -> tuple[Images, Images]:
        train, test = map(_png_split, files)
        return train, test

    return ImageFiles(digest.hexdigest(), read)


def _pngs(folder: Path) -> list[Path]:
    files = _entries(folder)
    for file in files:
        if file.suffix.lower() != ".png" or not file.is_file():
            raise DataError(f"{file}: not a PNG file; a class's folder holds nothing else")
    if not files:
        raise DataError(f"{folder}: holds no PNG file; every class has at least one in each split")
    return files


def _png_split(by_class: list[list[Path]]) -> Images:
    files = [file for files in by_class for file in files]
    first = _png(files[0])
    pixels = np.empty((len(files), *first.shape), dtype=np.uint8)
    for row, file in enumerate(files):
        image = _png(file)
        if image.shape != first.shape:
            raise DataError(
                f"{file}: an image of {image.shape}, while {files[0]} is of {first.shape}; all "
                "have to have the same height, width and channels"
            )
        pixels[row] = image
    counts = [len(files) for files in by_class]
    return Images(pixels, np.repeat(np.arange(len(counts), dtype=np.uint8), counts))


def _png(file: Path) -> np.ndarray:
    """(height, width, 1 or 3) uint8."""
    # Slow to import, and of no use to those who have another format.
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            mode = image.mode
            if mode == "P" and "transparency" not in image.info:
                mode = "RGB"
            pixels = np.asarray(image.convert(mode))
    # What Pillow raises on a damaged file; SyntaxError is its word for a broken PNG.
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{file}: cannot be read as a PNG ({error}); fetch it again") from error
    if mode not in ("L", "RGB"):
        raise DataError(
            f"{file}: a PNG of mode {mode}; save it as RGB or as 8-bit grey, without transparency"
        )
    return pixels.reshape(*pixels.shape[:2], -1)


# --- One npz


def _npz_images(file: Path) -> ImageFiles:
    def read() -> tuple[Images, Images]:
        try:
            with file.open("rb") as stream:
                if not zipfile.is_zipfile(stream):
                    raise zipfile.BadZipFile("it is not a whole npz")
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as archive:
                    arrays = {name: archive[name] for name in ARRAYS if name in archive}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error
        missing = [name for name in ARRAYS if name not in arrays]
        if missing:
            raise DataError(f"{file}: has no {', '.join(missing)}; wanted are {', '.join(ARRAYS)}")
        train, test = (
            Images(
                _pixels(f"{file}: x_{split}", arrays[f"x_{split}"]),
                _labels(f"{file}: y_{split}", arrays[f"y_{split}"]),
            )
            for split in SPLITS
        )
        return train, test

    return ImageFiles(content_digest([file]), read)


def _pixels(where: str, pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise DataError(
            f"{where}: {pixels.dtype} of shape {pixels.shape}; images have to be bytes (uint8) of "
            "(images, height, width) or (images, height, width, channels)"
        )
    return pixels[..., None] if pixels.ndim == 3 else pixels


def _labels(where: str, labels: Any) -> np.ndarray:
    """(N,) uint8 of whole numbers in a list or an array, (N,) or (N, 1)."""
    try:
        array = np.asarray(labels)
    except ValueError:  # lists of several lengths
        array = np.empty(0, dtype=object)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{where}: labels have to be whole numbers, one an image")
    if array.size and not 0 <= array.min() <= array.max() <= 255:
        raise DataError(f"{where}: labels have to lie between 0 and 255")
    return array.astype(np.uint8)
