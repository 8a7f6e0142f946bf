"""Real data in standard layouts: Keras' ``.npz``, image folders or zips of them, plain text; and the bundled digits."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

_SPLIT_SEED = 0
_MOST_VALIDATION = 5000
_DIGITS_TEST = 360
_PICTURES = {".jpg", ".jpeg", ".png"}


class DataError(ValueError):
    """A path that holds no data in a layout that is known."""


@dataclass(frozen=True)
class Split:
    """Examples.

    Attributes:
        inputs: pictures, uint8 ``[n, channels, height, width]``, or numbers of characters, int64 ``[n, T]``.
        labels: classes, int64 ``[n]``, or the next characters, int64 ``[n, T]``.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def choose(self, index: Tensor) -> Split:
        """Return these examples."""
        return Split(self.inputs[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Examples to train on, to choose learning rates on, and to test.

    Attributes:
        name: of the data.
        kind: ``"table"`` for an npz, ``"folder"``, ``"text"``, ``"digits"`` or ``"digit pixels"``.
        train: examples to train on.
        validation: examples that choose learning rates; a fixed tenth of what came to train on, 5,000 at most.
        test: examples of which only figures are reported.
        classes: how many there are; for text, different characters.
    """

    name: str
    kind: str
    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def fingerprint(self) -> str:
        """Name, sizes, and a checksum of all examples."""
        checksum = 0
        for split in (self.train, self.validation, self.test):
            for tensor in (split.inputs, split.labels):
                checksum = zlib.crc32(tensor.contiguous().numpy().tobytes(), checksum)
        return f"{self.name} {len(self.train)} + {len(self.validation)} + {len(self.test)} {checksum:08x}"

    @property
    def is_text(self) -> bool:
        """Whether labels are the next of a sequence."""
        return self.train.labels.dim() == 2


def load(path: Path | None, *, tokens: int = 64) -> Dataset:
    """Return the data at a path, or the digits bundled with scikit-learn.

    Args:
        path: a Keras ``.npz`` (``x_train``, ``y_train``, ``x_test``, ``y_test``), an image folder or a zip of one
            (``train/<class>/*.jpg``, ``test/<class>/*.jpg``), a plain text, or None.
        tokens: characters in an example of a text.

    Raises:
        DataError: if the path is none of these.
    """
    if path is None:
        return _load_digits()
    if not path.exists():
        raise DataError(f"there is nothing at {str(path)!r}; give a .npz, an image folder, a zip of one, or a text")
    if path.is_dir() or path.suffix == ".zip":
        return _load_folder(path)
    if path.suffix == ".npz":
        return _load_table(path)
    if path.suffix in {".txt", ".md", ".text"}:
        return _load_text(path, tokens)
    raise DataError(f"{path.name!r} ends in {path.suffix!r}; known are .npz, .zip, .txt, and directories of pictures")


def load_digit_pixels() -> Dataset:
    """Return the bundled digits as texts: 64 pixels in a row, of 17 shades, each to be told from those before it."""
    digits = _load_digits()

    def read(split: Split) -> Split:
        shades = split.inputs.flatten(1).long()
        return Split(shades[:, :-1].contiguous(), shades[:, 1:].contiguous())

    parts = (read(digits.train), read(digits.validation), read(digits.test))
    return Dataset("digit pixels", "digit pixels", *parts, classes=17)


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8)
    everything = Split(inputs, torch.from_numpy(classes).long())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    rest, test = everything.choose(order[_DIGITS_TEST:]), everything.choose(order[:_DIGITS_TEST])
    return Dataset("digits", "digits", *_hold_out(rest), test, classes=10)


def _load_table(path: Path) -> Dataset:
    with np.load(path) as table:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(table.files)
        if missing:
            raise DataError(f"{path.name} has {sorted(table.files)}, but lacks {sorted(missing)}")
        arrays = {name: torch.from_numpy(table[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    splits = []
    for part in ("train", "test"):
        inputs, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].flatten().long()
        if inputs.dtype != torch.uint8 or inputs.dim() not in {3, 4} or len(inputs) != len(labels):
            raise DataError(
                f"x_{part} of {path.name} must be uint8 [n, height, width] or [n, height, width, channels] with "
                f"as many labels, but is {inputs.dtype} {tuple(inputs.shape)} with {len(labels)} labels"
            )
        splits.append(Split(inputs.unsqueeze(1) if inputs.dim() == 3 else inputs.permute(0, 3, 1, 2), labels))
    classes = int(splits[0].labels.max()) + 1
    return Dataset(path.stem, "table", *_hold_out(splits[0]), splits[1], classes)


def _load_folder(path: Path) -> Dataset:
    from PIL import Image

    found: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    for name, content in _list_pictures(path):
        part, label = PurePosixPath(name).parts[-3:-1]
        picture = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        found[part].append((label, torch.from_numpy(picture).permute(2, 0, 1)))
    if not found["train"] or not found["test"]:
        counts = {part: len(pictures) for part, pictures in found.items()}
        raise DataError(f"{path.name} must hold train/<class>/* and test/<class>/* as .jpg or .png, but has {counts}")
    names = sorted({label for label, _ in found["train"]})
    splits = []
    for pictures in found.values():
        labels = torch.tensor([names.index(label) for label, _ in pictures])
        splits.append(Split(torch.stack([picture for _, picture in pictures]), labels))
    return Dataset(path.stem, "folder", *_hold_out(splits[0]), splits[1], len(names))


def _list_pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and content of every picture of ``train`` and ``test``, wherever in the archive those two lie."""

    def is_wanted(name: str) -> bool:
        parts = PurePosixPath(name).parts
        is_picture = PurePosixPath(name).suffix.lower() in _PICTURES
        return is_picture and len(parts) >= 3 and parts[-3] in {"train", "test"}

    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if is_wanted(file.relative_to(path).as_posix()))
        yield from ((file.relative_to(path).as_posix(), file.read_bytes()) for file in files)
        return
    with zipfile.ZipFile(path) as archive:
        yield from ((name, archive.read(name)) for name in sorted(archive.namelist()) if is_wanted(name))


def _load_text(path: Path, tokens: int) -> Dataset:
    text = path.read_text(encoding="utf-8")
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    codes = torch.tensor([numbers[character] for character in text])
    if len(codes) < 40 * (tokens + 1):
        raise DataError(f"{path.name} has {len(codes)} characters; needed are {40 * (tokens + 1)} at least")
    # In the order of the text, so that what is tested is not between what was trained on.
    ends = (int(0.9 * len(codes)), int(0.95 * len(codes)))
    splits = []
    for part in (codes[: ends[0]], codes[ends[0] : ends[1]], codes[ends[1] :]):
        windows = part[: (len(part) - 1) // tokens * tokens + 1].unfold(0, tokens + 1, tokens)
        splits.append(Split(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return Dataset(path.stem, "text", *splits, classes=len(characters))


def _hold_out(split: Split) -> tuple[Split, Split]:
    """Return what is left to train on, and what learning rates are chosen on."""
    count = min(_MOST_VALIDATION, len(split) // 10)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_SPLIT_SEED + 1))
    return split.choose(order[count:]), split.choose(order[:count])
