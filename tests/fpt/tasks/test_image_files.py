"""Published formats of labelled images: what is read, and what is refused."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpt.files import DataError
from fpt.tasks.image_files import BATCHES, IDX, find_images

Write = Callable[..., Path]

BATCHES_FOLDER = "cifar-10-batches-py"


def write_tree(folder: Path, *, classes: str = "abcdefghij", each: int = 2) -> Path:
    """PNG files of colour images, all of one colour that tells class, split and number."""
    for split, blue in (("train", 0), ("test", 100)):
        for number, name in enumerate(classes):
            inner = folder / split / name
            inner.mkdir(parents=True, exist_ok=True)
            for row in range(each):
                Image.new("RGB", (32, 32), (number, row, blue)).save(inner / f"{row}.png")
    return folder


def npz(folder: Path, **changed: np.ndarray | None) -> Path:
    pixels, labels = np.ones((3, 28, 28), dtype=np.uint8), np.array([1, 2, 3])
    arrays = {"x_train": pixels, "y_train": labels, "x_test": pixels, "y_test": labels} | changed
    np.savez(folder / "some.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


def refused(folder: Path, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        find_images(folder, 10).read()
    assert str(folder) in str(error.value)


# --- Which format


def test_a_folder_without_images_says_what_is_wanted(tmp_path: Path) -> None:
    refused(tmp_path, r"holds no images: .*idx.*data_batch_1.*/<class>/\*.png.*x_train.*y_test$")
    refused(tmp_path / "nowhere", "no such folder; set folder to one that holds the four idx")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file, not a folder")


def test_an_archive_that_is_not_unpacked_yet(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").touch()
    refused(tmp_path, "holds no images.*; unpack cifar-10-python.tar.gz there")


def test_two_formats_in_a_folder(write_idx: Write, tmp_path: Path) -> None:
    npz(write_idx(tmp_path))
    refused(tmp_path, r"holds images twice \(idx files, some.npz\); keep one")


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store", "._1.png", ".directory", ".nfs0001", "Thumbs.db", "thumbs.db", "ehthumbs.db",
        "Desktop.ini", "desktop.ini", "Icon\r", "__MACOSX/._1.png", "@eaDir/1.png", "lost+found/x",
    ],
)  # fmt: skip
def test_what_systems_leave_behind_is_passed_over(name: str, tmp_path: Path) -> None:
    expected = find_images(write_tree(tmp_path / "plain"), 10)
    littered = write_tree(tmp_path / "littered")
    for folder in (littered, littered / "train", littered / "train" / "a", littered / "test"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    found = find_images(littered, 10)

    assert found.digest == expected.digest
    assert len(found.read()[0].labels) == 20


# --- idx


@pytest.mark.parametrize("missing", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_half_of_the_idx_files(missing: str, write_idx: Write, tmp_path: Path) -> None:
    (write_idx(tmp_path) / missing).unlink()
    refused(tmp_path, rf"{missing}: missing .*holds the four files")


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-1], r"promises 188,160 bytes .* has 188,159"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "not an idx file of images"),
        ("t10k-labels-idx1-ubyte", lambda b: b + b"\0", r"promises 60 bytes of data, it has 61"),
        ("t10k-labels-idx1-ubyte", lambda b: b"", "begins with nothing"),
        ("t10k-labels-idx1-ubyte", lambda b: b"<htm" + b[4:], "begins with 3c68746d"),
    ],
)
def test_a_damaged_idx_file_is_named(
    file: str, damage: Callable[[bytes], bytes], problem: str, write_idx: Write, tmp_path: Path
) -> None:
    path = write_idx(tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, f"{file}: .*{problem}")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: gzip.decompress(b), lambda b: b[:40] + b[44:]]
)
def test_a_damaged_gzip_is_named(
    damage: Callable[[bytes], bytes], write_idx: Write, tmp_path: Path
) -> None:
    path = write_idx(tmp_path, zipped=True) / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, rf"{path.name}: cannot be read .*; fetch it again")


# --- CIFAR-10's python batches


def python_2_batch(planes: np.ndarray, labels: list[int]) -> bytes:
    """A batch opcode by opcode, as Python 2 and its numpy wrote the published ones."""

    def text(value: bytes) -> bytes:
        return b"U" + struct.pack("B", len(value)) + value

    content = planes.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01M" + struct.pack("<H", len(planes)) + b"M\x00\x0c\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", len(content)) + content + b"tb"
    )
    numbers = b"".join(b"K" + struct.pack("B", label) for label in labels)
    entries = (
        text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels")
        + b"](" + numbers + b"e" + text(b"data") + array
    )  # fmt: skip
    return b"\x80\x02}(" + entries + b"u."


def test_batches_as_they_were_published(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected = []
    for name in BATCHES:
        images = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, 300).tolist()
        planes = images.transpose(0, 3, 1, 2).reshape(300, -1)
        (tmp_path / name).write_bytes(python_2_batch(planes, labels))
        expected.append((images, labels))
    train, test = find_images(tmp_path, 10).read()

    assert np.array_equal(train.pixels, np.concatenate([images for images, _ in expected[:5]]))
    assert train.labels.tolist() == [label for _, labels in expected[:5] for label in labels]
    assert np.array_equal(test.pixels, expected[5][0])
    assert test.labels.tolist() == expected[5][1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_that_were_written_anew(
    protocol: int, write_batches: Write, tmp_path: Path
) -> None:
    expected = find_images(write_batches(tmp_path / "a"), 10).read()
    found = find_images(write_batches(tmp_path / "b", protocol=protocol), 10).read()

    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.labels, theirs.labels)


def test_batches_with_or_without_their_folder(write_batches: Write, tmp_path: Path) -> None:
    folder = write_batches(tmp_path)

    assert find_images(folder, 10).digest == find_images(folder / BATCHES_FOLDER, 10).digest


@pytest.mark.parametrize("missing", ["data_batch_3", "test_batch"])
def test_a_batch_is_missing(missing: str, write_batches: Write, tmp_path: Path) -> None:
    (write_batches(tmp_path) / BATCHES_FOLDER / missing).unlink()
    refused(tmp_path, rf"{missing}: missing; .*are the six files data_batch_1, .*unpack")


@pytest.mark.parametrize("size", [0, 1, 100, 5_000, 140_000])
def test_a_batch_that_ends_too_soon(size: int, write_batches: Write, tmp_path: Path) -> None:
    file = write_batches(tmp_path) / BATCHES_FOLDER / "data_batch_2"
    os.truncate(file, size)
    refused(tmp_path, r"data_batch_2: cannot be read as a batch of CIFAR-10: .*unpack")


PIXELS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "not a batch of CIFAR-10"),
        ({b"data": PIXELS}, "labels have to be whole numbers"),
        ({b"labels": [1, 2]}, "not a batch of CIFAR-10"),
        (
            {b"data": PIXELS[:, 1:], b"labels": [1, 2]},
            "not a batch .* array of bytes, 3,072 an image",
        ),
        ({b"data": PIXELS.astype(float), b"labels": [1, 2]}, "not a batch .* array of bytes"),
        ({b"data": PIXELS, b"labels": [1]}, "2 images but 1 labels"),
        ({b"data": PIXELS, b"labels": [1, 2.5]}, "labels have to be whole numbers"),
        ({b"data": PIXELS, b"labels": [[1], [2, 3]]}, "labels have to be whole numbers"),
        ({b"data": PIXELS, b"labels": [1, -1]}, "labels have to lie between 0 and 255"),
        ({b"data": PIXELS, b"fine_labels": [1, 2]}, "labels have to be whole numbers"),
    ],
)
def test_a_pickle_that_is_no_batch(
    content: object, problem: str, write_batches: Write, tmp_path: Path
) -> None:
    file = write_batches(tmp_path) / BATCHES_FOLDER / "data_batch_4"
    file.write_bytes(pickle.dumps(content, protocol=2))
    refused(tmp_path, f"data_batch_4: {problem}")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {0}",), "posix.system"),
        (eval, ("open({0!r}, 'w')",), "eval"),
        (getattr, ("{0}", "upper"), "getattr"),
        (np.load, ("{0}",), "numpy.load"),
        (Path, ("{0}",), "pathlib"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_cannot_call_a_function(
    function: Callable[..., object],
    arguments: tuple[str, ...],
    name: str,
    protocol: int,
    write_batches: Write,
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    file = write_batches(tmp_path) / BATCHES_FOLDER / "test_batch"
    call = Call(function, *(argument.format(str(trace)) for argument in arguments))
    content = {b"data": PIXELS, b"labels": [1, 2], b"more": call}
    file.write_bytes(pickle.dumps(content, protocol=protocol))

    refused(tmp_path, rf"test_batch: .*asks for [\w.]*{name}")
    assert not trace.exists()


# --- PNG files


def test_a_tree_of_png_files(tmp_path: Path) -> None:
    train, test = find_images(write_tree(tmp_path, each=3), 10).read()

    assert train.pixels.shape == (30, 32, 32, 3)
    assert train.labels.tolist() == test.labels.tolist() == sorted(3 * [*range(10)])
    assert train.pixels[:, 5, 5, 0].tolist() == train.labels.tolist()
    assert train.pixels[:, 5, 5, 1].tolist() == 10 * [0, 1, 2]
    assert set(test.pixels[..., 2].ravel()) == {100}


def test_classes_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["dog", "cat", "frog", "bird", "deer", "ship", "horse", "truck", "plane", "car"]
    for split in ("train", "test"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (4, 6), len(name)).save(tmp_path / split / name / "0.PNG")
    train, _ = find_images(tmp_path, 10).read()

    assert train.pixels.shape == (10, 6, 4, 1)
    assert train.pixels[:, 0, 0, 0].tolist() == [4, 3, 3, 4, 3, 4, 5, 5, 4, 5]


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    write_tree(tmp_path, each=1)
    for file in tmp_path.rglob("*.png"):
        with Image.open(file) as image:
            image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4).save(file)
    train, _ = find_images(tmp_path, 10).read()

    assert train.pixels[:, 5, 5, 0].tolist() == train.labels.tolist()


def test_the_digest_of_a_tree_knows_which_class_a_file_is_in(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "a")
    digest = find_images(folder, 10).digest
    assert find_images(write_tree(tmp_path / "b"), 10).digest == digest

    shutil.move(folder / "train" / "b" / "1.png", folder / "train" / "a" / "2.png")
    moved = find_images(folder, 10).digest
    shutil.move(folder / "train" / "a" / "2.png", folder / "train" / "b" / "1.png")

    assert moved != digest
    assert find_images(folder, 10).digest == digest


def test_a_split_or_a_class_is_missing(tmp_path: Path) -> None:
    shutil.rmtree(write_tree(tmp_path / "a") / "test")
    refused(tmp_path / "a", "test: missing; a tree of PNG files has")
    shutil.rmtree(write_tree(tmp_path / "b") / "train" / "c")
    refused(tmp_path / "b", r"train: has 9 folders \(a, b, d, .*not one for each of the 10 classes")
    folder = write_tree(tmp_path / "c")
    (folder / "test" / "c").rename(folder / "test" / "k")
    refused(tmp_path / "c", "the same classes; only one has c, k")
    shutil.rmtree(write_tree(tmp_path / "d") / "test" / "c")
    (tmp_path / "d" / "test" / "c").mkdir()
    refused(tmp_path / "d", "c: holds no PNG file")


def test_a_file_that_is_no_png(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "a")
    (folder / "train" / "a" / "1.jpg").touch()
    refused(folder, "1.jpg: not a PNG file")
    folder = write_tree(tmp_path / "b")
    Image.new("RGB", (32, 32)).save(folder / "train" / "d" / "1.png", format="JPEG")
    refused(folder, "1.png: cannot be read as a PNG")


@pytest.mark.parametrize("size", [0, 10, 40, 70])
def test_a_png_that_ends_too_soon(size: int, tmp_path: Path) -> None:
    file = write_tree(tmp_path) / "test" / "e" / "1.png"
    assert file.stat().st_size > size + 20
    os.truncate(file, size)
    refused(tmp_path, r"1\.png: cannot be read as a PNG .*; fetch it again")


def test_a_png_of_another_size(tmp_path: Path) -> None:
    folder = write_tree(tmp_path)
    Image.new("RGB", (32, 31)).save(folder / "test" / "e" / "1.png")
    refused(folder, r"e/1\.png: an image of \(31, 32, 3\), while .*0\.png is of \(32, 32, 3\)")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "1", "I;16"])
def test_a_png_that_is_neither_rgb_nor_grey(mode: str, tmp_path: Path) -> None:
    folder = write_tree(tmp_path)
    Image.new(mode, (32, 32)).save(folder / "test" / "e" / "1.png")
    refused(folder, f"1.png: a PNG of mode {mode}; save it as RGB or as 8-bit grey")


# --- npz


def test_an_npz(tmp_path: Path) -> None:
    train, test = find_images(npz(tmp_path, y_train=np.array([[4], [5], [6]])), 10).read()

    assert train.pixels.shape == (3, 28, 28, 1)
    assert train.labels.dtype == np.uint8
    assert train.labels.tolist() == [4, 5, 6]
    assert test.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"y_test": None, "x_train": None}, "has no x_train, y_test; wanted are x_train, y_train"),
        ({"x_test": np.zeros((3, 28, 28))}, r"x_test: float64 of shape \(3, 28, 28\)"),
        ({"x_test": np.zeros((3, 784), dtype=np.uint8)}, r"x_test: uint8 of shape \(3, 784\)"),
        ({"y_train": np.array([0.5, 1, 2])}, "y_train: labels have to be whole numbers"),
        ({"y_train": np.eye(3, dtype=int)}, "y_train: labels have to be whole numbers"),
        ({"y_train": np.array([1, 2, 256])}, "y_train: labels have to lie between 0 and 255"),
        ({"y_train": np.array([1, 2, None])}, "some.npz: cannot be read .*allow_pickle"),
    ],
)
def test_an_npz_of_something_else(
    changed: dict[str, np.ndarray | None], problem: str, tmp_path: Path
) -> None:
    refused(npz(tmp_path, **changed), problem)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-30],
        lambda b: b"",
        lambda b: b"\x93NUMPY" + b,
        lambda b: b[:300] + b"\xff\xff" + b[302:],
    ],
)
def test_a_damaged_npz(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = npz(tmp_path) / "some.npz"
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path, "some.npz: cannot be read .*; fetch it again")


# --- Real data


def test_the_real_files(data: Path) -> None:
    mnist = find_images(data / "mnist", 10)
    photographs = find_images(data / "cifar10", 10)

    assert [split.pixels.shape for split in mnist.read()] == [
        (60_000, 28, 28, 1),
        (10_000, 28, 28, 1),
    ]
    assert [split.pixels.shape for split in photographs.read()] == [
        (5_000, 32, 32, 3),
        (1_000, 32, 32, 3),
    ]
    for split, each in zip(photographs.read(), (500, 100), strict=True):
        assert np.bincount(split.labels).tolist() == [each] * 10
    assert mnist.digest != photographs.digest


def test_real_images_survive_every_format(data: Path, tmp_path: Path) -> None:
    splits = find_images(data / "cifar10", 10).read()
    for name, split in zip(("train", "test"), splits, strict=True):
        for label in range(10):
            inner = tmp_path / "tree" / name / str(label)
            inner.mkdir(parents=True)
            for row, image in enumerate(split.pixels[split.labels == label][:20]):
                Image.fromarray(image).save(inner / f"{row:02}.png")
    read = find_images(tmp_path / "tree", 10).read()

    for found, split in zip(read, splits, strict=True):
        for label in range(10):
            expected = split.pixels[split.labels == label][:20]
            assert np.array_equal(found.pixels[found.labels == label], expected)


def test_the_names_of_the_idx_files() -> None:
    assert set(IDX) == {
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    }
