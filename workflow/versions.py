"""What computed a number."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy
import torch


def versions() -> dict[str, str]:
    """What computed a number: of Python, torch, numpy and the toolkit."""
    try:
        toolkit = metadata.version("score-sde-toolkit")
    except metadata.PackageNotFoundError:
        toolkit = "not installed"
    return {
        "toolkit": toolkit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
