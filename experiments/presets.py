"""Whole settings by name: `--preset=fashion_mnist`. Each changes what it must of the defaults, which are the digits'.

    digits         scikit-learn's digits, minutes on a CPU core
    fashion_mnist  28x28 and 256 grey levels: an hour (VP) and 25 minutes (VE, sub-VP) on a CPU core
    cifar10        the networks and settings of Song et al. 2021 (arXiv:2011.13456, appendix H), for GPUs
    cifar10_deep   the same with twice the blocks a resolution
    image_256      the same at 256x256, for a folder of such pictures (`--config.data.root=...`), for GPUs

With 256 levels the network is asked about finer detail than with 17, so training looks at smaller noise:
log kappa ~ N(-2.5, 2.6^2) covers the grey levels' spacing as N(-1.5, 2.2^2) does for the digits. Sine features at that
spacing, which help there, do not here: 3.427 without, 3.468 bits/dim with (the ELBO of 200 validation images with the same
noise, after 700 steps of VP; its Monte Carlo error is 0.012).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from numerics import UserError

_FASHION_MNIST = {
    "data": {"name": "fashion_mnist"},
    "model": {"multipliers": (1, 1, 2), "fourier_features": ()},
    "training": {
        "batch_size": 32,
        "precision": "bf16",
        "log_normal_mean": -2.5,
        "log_normal_std": 2.6,
        "eval_every": 2000,
        "checkpoint_every": 500,
    },
    "sampling": {"steps": 250, "n": 36},
    "likelihood": {"limit": 200, "steps": 48, "probes": 2, "draws": 2, "batch_size": 50},
    "baselines": False,
}

_SONG = {
    "threads": 0,
    "model": {"parametrization": "noise", "conditioning": "time"},
    "training": {
        "steps": 950_000,
        "batch_size": 128,
        "learning_rate": 2e-4,
        "warmup": 5000,
        "schedule": "constant",
        "ema": (0.9999,),
        "betas": (0.9, 0.999),
        "flip": True,
        "times": "uniform",
        "log_every": 100,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
    },
    "sampling": {"steps": 1000},
    "baselines": False,
}
# sigma_max: about the largest distance between two images; the published networks take data in [0, 1] and map them themselves
_SONG_VE = {
    "data": {"low": 0.0, "high": 1.0},
    "model": {"parametrization": "score", "conditioning": "sigma"},
    "training": {"ema": (0.999,)},
}


def _song(data: str, vp: str, ve: str, sigma_max: float, **options: Any) -> dict[str, Any]:
    """The published settings with the network `vp` for VP and sub-VP, `ve` for VE; `options` of the data."""
    return {
        **_SONG,
        "data": {"name": data, **options},
        "only": {
            "vp": {"model": {"name": vp}},
            "sub_vp": {"model": {"name": vp}},
            "ve": {**_SONG_VE, "model": {**_SONG_VE["model"], "name": ve}, "sde": {"sigma_max": sigma_max}},
        },
    }


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {},
    "fashion_mnist": {
        **_FASHION_MNIST,
        "only": {
            "vp": {"training": {"steps": 9000}},
            # sigma_min well below a grey level, 2/256: at 0.01 the model would be of images blurred by more than one, at the
            # cost of up to 1.7 bits a constant pixel. sigma_max: about the largest distance between two images
            "ve": {"training": {"steps": 4500}, "sde": {"sigma_min": 0.001, "sigma_max": 40.0}},
            "sub_vp": {"training": {"steps": 4500}},
        },
    },
    "cifar10": _song("cifar10", "ddpmpp_cifar10", "ncsnpp_cifar10", 50.0),
    "cifar10_deep": _song("cifar10", "ddpmpp_deep_cifar10", "ncsnpp_deep_cifar10", 50.0),
    "image_256": _song("image_folder", "ddpm_256", "ncsnpp_256", 348.0, size=256),
}


def apply(config: ConfigDict, name: str) -> ConfigDict:
    """`config` of one SDE's script, with the preset's changes for it.

    Raises:
        UserError: for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"got the preset {name!r}; expected one of {', '.join(PRESETS)}")
    changes = dict(PRESETS[name])
    only = changes.pop("only", {}).get(config.sde.name, {})
    for change in (changes, only):
        config.update(ConfigDict(change))
    return config
