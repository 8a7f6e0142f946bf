"""Pictures as patches: the bundled digits, or a zip of an image folder."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """A training set.

    Attributes:
        name: what it is, for the records.
        inputs: patches, float32, shape ``[examples, T, patch]``.
        labels: int64, shape ``[examples]``.
    """

    name: str
    inputs: Tensor
    labels: Tensor


def load_patches(path: Path | None) -> Patches:
    """Return pictures of a zipped image folder (``train/<class>/*.jpg``), or scikit-learn's digits without a path."""
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        return Patches("digits", _cut(pictures, 1), torch.tensor(digits.target))
    pictures, labels = _read_zip(path)
    return Patches(path.stem, _cut(pictures, 4), labels)


def _cut(pictures: Tensor, side: int) -> Tensor:
    """Standardise pictures ``[n, channels, height, width]`` and cut them into patches of `side` x `side` pixels."""
    mean, spread = pictures.mean((0, 2, 3), keepdim=True), pictures.std((0, 2, 3), keepdim=True)
    columns = torch.nn.functional.unfold((pictures - mean) / spread, side, stride=side)
    return columns.transpose(1, 2).contiguous()


def _read_zip(path: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("train/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        arrays = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return pictures, torch.tensor([classes.index(name.split("/")[1]) for name in names])
