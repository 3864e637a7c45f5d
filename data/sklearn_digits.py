"""Scikit-learn's handwritten digits: 1,797 images of 8x8 pixels with 17 grey levels, installed with the
library.

Alpaydin and Kaynak 1998, the test part of the UCI "Optical Recognition of Handwritten Digits": 4x4 blocks of
a 32x32 bitmap are counted, so a pixel is one of 0..16.
"""

from __future__ import annotations

import numpy as np
import torch

from data.dataset import Dataset, Split, permutation
from data.errors import DataError

__all__ = ["digits"]

_TRAIN = 1500


def digits(*, validation: int = 200, seed: int = 0) -> Dataset:
    """The digits, 1,500 for training and 297 for testing.

    Args:
        validation: number of the 1,500 training images set aside for choosing settings.
        seed: seed of the splits; only results at the same seed compare.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; pip install scikit-learn"
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(np.ascontiguousarray(bunch.images.astype(np.uint8))).unsqueeze(1)
    everything = Split(images, torch.from_numpy(bunch.target.astype(np.int64)), torch.arange(len(images)))
    order = torch.from_numpy(permutation(len(images), seed))
    return Dataset(
        name="digits",
        levels=17,
        classes=tuple("0123456789"),
        validation=validation,
        seed=seed,
        splits={
            "train": everything.take(order[:_TRAIN].sort().values),
            "test": everything.take(order[_TRAIN:].sort().values),
        },
    )
