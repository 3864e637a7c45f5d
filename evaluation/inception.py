"""Inception features from a local file, the only ones whose Fréchet distance is called FID.

The file is the TorchScript export of the original FID network that StyleGAN3's authors publish (`inception-2015-12-05.pt`): it
takes uint8 images (N, 3, H, W), resizes them as the original TensorFlow graph does, and with `return_features=True` gives the
2,048 pooled features; without, the class probabilities. Nothing is downloaded. TorchScript runs in its own interpreter, but it
is a program: use a file you trust; its hash is in the score's name.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import DataError
from data.files import sha256
from evaluation.features import Extracted, Features

__all__ = ["Inception", "load_inception"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inception(Features):
    """Features (N, 2048) of a loaded network; see `load_inception`.

    Args:
        network: the TorchScript module.
        file_hash: SHA-256 of its file.
        levels: grey levels of the images (stretched to 0..255 where there are fewer).
        batch: images at once.
    """

    network: Any = field(repr=False)
    file_hash: str
    levels: int = 256
    batch: int = 64
    inception: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"inception-{self.file_hash[:4]}"

    def extract(self, data: Tensor) -> Extracted:
        if data.dtype != torch.uint8 or data.ndim != 4 or data.shape[1] not in (1, 3):
            raise DataError(
                f"got images of {data.dtype} {tuple(data.shape)}; expected uint8 (N, 3, H, W) or (N, 1, H, W)"
            )
        values, log_probs = [], []
        with torch.no_grad():
            for chunk in data.split(self.batch):
                if self.levels < 256:
                    chunk = (chunk.float() * (255 / (self.levels - 1))).round().to(torch.uint8)
                chunk = chunk.expand(-1, 3, -1, -1)
                features = self.network(chunk, return_features=True)
                if features.shape != (len(chunk), 2048):
                    raise DataError(
                        f"got features of shape {tuple(features.shape)}; expected ({len(chunk)}, 2048): this is not "
                        "the Inception file"
                    )
                values.append(features.double())
                log_probs.append(self.network(chunk).double().clamp(min=1e-30).log())
        stacked = torch.cat(log_probs)
        return Extracted(torch.cat(values), stacked - stacked.logsumexp(dim=1, keepdim=True))


def load_inception(path: str | os.PathLike[str], *, levels: int = 256, batch: int = 64) -> Inception:
    """Read the network's file.

    Args:
        path: the TorchScript file.
        levels, batch: as in `Inception`.

    Raises:
        DataError: no such file, or not TorchScript.
    """
    path = Path(path).expanduser()
    file_hash = sha256(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the published file has no other form
            network = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a TorchScript file ({reason}); expected inception-2015-12-05.pt") from error
    return Inception(network=network.eval(), file_hash=file_hash, levels=levels, batch=batch)
