"""The digits that are bundled with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.errors import MissingExtraError

_TEST_EXAMPLES = 360
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Pictures ``[B, 8, 8]`` with mean near 0 and deviation near 1, and their classes ``[B]``."""

    train_pictures: Tensor
    train_classes: Tensor
    test_pictures: Tensor
    test_classes: Tensor

    @property
    def description(self) -> str:
        """The data in words."""
        train, test = len(self.train_classes), len(self.test_classes)
        return f"scikit-learn digits, 8 × 8 pixels, {train} to train on and {test} to test"

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for ever, in an order that depends on the seed and the batch size only."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train_classes), generator=generator)
            for index in order.split(batch_size):
                # The last, short batch of a pass is left out: all steps are then equally long.
                if len(index) == batch_size:
                    yield self.train_pictures[index], self.train_classes[index]


def load_data() -> Digits:
    """Return the digits, split once and for all into pictures to train on and to test.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "the demo's data come with scikit-learn, which is not installed; run: pip install 'cheapgrad[demo]'"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    # Pixels are 0 to 16; their mean is about 5 and their deviation about 6.
    pictures = (torch.from_numpy(pixels).float().view(-1, 8, 8)[order] - 5) / 6
    labels = torch.from_numpy(classes).long()[order]
    return Digits(
        train_pictures=pictures[_TEST_EXAMPLES:],
        train_classes=labels[_TEST_EXAMPLES:],
        test_pictures=pictures[:_TEST_EXAMPLES],
        test_classes=labels[:_TEST_EXAMPLES],
    )
