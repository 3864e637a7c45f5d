"""Samples as other programs want images: one 8-bit file each, and one array of bytes.

Grey values k of 0 to levels - 1 become the bytes round(255 k / (levels - 1)): the data's own for 256 levels. A folder of PNG
files is what pytorch-fid, torch-fidelity and clean-fid read, `arr_0` (N, H, W, C) in an npz what the evaluator of
guided-diffusion reads.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import Dataset
from numerics import UserError
from training import DiskError
from training.checkpoint import write_atomically
from workflow.trained_run import TrainedRun

_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA


def check(dataset: Dataset) -> None:
    """Refuses data that are not pictures.

    Raises:
        UserError: no grey levels, or a shape that no 8-bit picture has.
    """
    shape = dataset.event_shape
    if dataset.levels is None or len(shape) != 3 or shape[0] not in _CHANNELS:
        raise UserError(
            f"got --save png for {dataset.name}, samples of shape {shape}"
            f"{' without grey levels' if dataset.levels is None else ''}; expected images of 1 to 4 channels: the parts' x "
            "holds the values of anything else"
        )


def to_bytes(x: Tensor, run: TrainedRun) -> np.ndarray:
    """Samples `(N, C, H, W)` in model units as bytes `(N, H, W, C)`."""
    levels = run.dataset.levels
    assert levels is not None  # `check` has seen to it
    grey = run.transform.to_data(x).to(torch.float64)
    scaled = (grey * (255 / (levels - 1))).round().to(torch.uint8)
    array: np.ndarray = scaled.permute(0, 2, 3, 1).contiguous().numpy()
    return array


def save(x: Tensor, run: TrainedRun, parts: Path) -> Path:
    """Writes samples `(N, C, H, W)` in model units beside the folder `parts`; returns the folder of the files."""
    pictures = to_bytes(x, run)
    folder = parts.with_name(f"{parts.name}-png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(folder / f"{i:06d}.png")
    except OSError as error:
        raise DiskError(f"{folder}: not written ({error.strerror}); make room or write access") from error
    last = (run.dataset.levels or 0) - 1
    units = f"bytes 0 to 255, (N, H, W, C); grey value k of 0 to {last} is round(255 k / {last})"
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=pictures, units=np.asarray(units))
    write_atomically(folder.with_suffix(".npz"), buffer.getvalue())
    return folder
