"""Whole settings of a score of images by name: `--preset=fashion_mnist`. Each changes what it must of the digits' defaults.

    digits         scikit-learn's digits, minutes on a CPU core
    fashion_mnist  28x28 and 256 grey levels: an hour (VP) and 25 minutes (VE, sub-VP, classes) on a CPU core
    cifar10        the networks and settings of Song et al. 2021 (arXiv:2011.13456, appendix H), for GPUs; for DDPM its own
                   network, for EDM and flow matching DDPM++ with what these systems mean by its output
    cifar10_deep   the same with twice the blocks a resolution (VP, VE, sub-VP)
    image_256      the same at 256x256, for a folder of such pictures (`--config.data.root=...`), for GPUs

With 256 levels the network is asked about finer detail than with 17, so training looks at smaller noise:
log kappa ~ N(-2.5, 2.6^2) covers the grey levels' spacing as N(-1.5, 2.2^2) does for the digits. Sine features at that
spacing, which help there, do not here: 3.427 without, 3.468 bits/dim with (the ELBO of 200 validation images with the same
noise, after 700 steps of VP; its Monte Carlo error is 0.012).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Changes = Mapping[str, Any]
"""Values by dotted path, as a command line would give them."""

_FASHION_MNIST: Changes = {
    "data.name": "fashion_mnist",
    "model.multipliers": (1, 1, 2),
    "model.grey_level_features": (),
    "training.batch_size": 32,
    "training.precision": "bf16",
    "training.eval_every": 2000,
    "training.checkpoint_every": 500,
    "sampling.n": 36,
    "likelihood.limit": 200,
    "likelihood.tolerance": 1e-3,
    "baselines": False,
}
_FINER_NOISE: Changes = {"training.objective.times.mean": -2.5, "training.objective.times.std": 2.6}

_SONG: Changes = {
    "threads": 0,
    "training.steps": 950_000,
    "training.batch_size": 128,
    "training.learning_rate": 2e-4,
    "training.warmup": 5000,
    "training.schedule": "constant",
    "training.ema": (0.9999,),
    "training.betas": (0.9, 0.999),
    "training.flip": True,
    "training.log_every": 100,
    "training.eval_every": 10_000,
    "training.checkpoint_every": 10_000,
    "baselines": False,
}
_NOISE: Changes = {"model.parametrization": "noise", "model.conditioning": "continuous_time"}
_CONTINUOUS: Changes = {"training.objective.times": "uniform", "sampling.sampler.steps": 1000}
# sigma_max: about the largest distance between two images; the published networks take data in [0, 1] and map them themselves
_SONG_VE: Changes = {
    **_CONTINUOUS,
    "data.low": 0.0,
    "data.high": 1.0,
    "model.parametrization": "score",
    "model.conditioning": "sigma",
    "training.ema": (0.999,),
}


def _song(data: Changes, vp: str, ve: str, sigma_max: float) -> dict[str, Changes]:
    """The published settings on `data`, with the network `vp` for VP and sub-VP, and `ve` for VE."""
    of_vp = {**_SONG, **data, **_NOISE, **_CONTINUOUS, "model.name": vp}
    return {
        "vp": of_vp,
        "sub_vp": of_vp,
        "ve": {**_SONG, **data, **_SONG_VE, "model.name": ve, "sde.sigma_max": sigma_max},
    }


def _others(data: Changes) -> dict[str, Changes]:
    """Systems beside the three SDEs on `data`, each with what it means by a network's output and its time."""
    ddpm = {**_SONG, **data, **_NOISE, "model.name": "ddpm_cifar10", "training.steps": 800_000}
    return {
        "ddpm": ddpm,
        "ddim": ddpm,
        "edm": {**_SONG, **data, "model.name": "ddpmpp_cifar10"},
        "flow_matching": {**_SONG, **data, "model.name": "ddpmpp_cifar10", "model.conditioning": "continuous_time"},
    }


PRESETS: Mapping[str, Mapping[str, Changes]] = {
    "digits": {},
    "fashion_mnist": {
        "all": _FASHION_MNIST,
        "vp": {**_FINER_NOISE, "training.steps": 9000},
        # sigma_min well below a grey level, 2/256: at 0.01 the model would be of images blurred by more than one, at the
        # cost of up to 1.7 bits a constant pixel. sigma_max: about the largest distance between two images
        "ve": {**_FINER_NOISE, "training.steps": 4500, "sde.sigma_min": 0.001, "sde.sigma_max": 40.0},
        "sub_vp": {**_FINER_NOISE, "training.steps": 4500},
        # some 25 minutes of processor time in all on a core without bf16, where autocast would take 2.6 times as long.
        # A class is decided at log-SNR -7 to -3, where the plain loss is a hundredth of what it is elsewhere: so
        # weighted, and drawn as often
        "classes": {
            "training.objective.times.mean": 0.0,
            "training.objective.times.std": 2.5,
            "training.objective.weighting": "edm",
            "training.steps": 1500,
            "training.precision": "fp32",
            "sampling.sampler.steps": 20,
            "likelihood.steps": 48,
            "likelihood.draws": 1,
            "likelihood.probes": 1,
            "classes.samples": 200,
            "classes.images": 150,
            "classes.flow_steps": 16,
        },
    },
    "cifar10": {
        **_song({"data.name": "cifar10"}, "ddpmpp_cifar10", "ncsnpp_cifar10", 50.0),
        **_others({"data.name": "cifar10"}),
    },
    "cifar10_deep": _song({"data.name": "cifar10"}, "ddpmpp_deep_cifar10", "ncsnpp_deep_cifar10", 50.0),
    "image_256": _song({"data.name": "image_folder", "data.size": 256}, "ddpm_256", "ncsnpp_256", 348.0),
}


def of(system: str) -> dict[str, Changes]:
    """What each of them changes for the system of that name, by dotted path. One that says nothing of all systems is offered to
    those that it names: what a published network is told and says is no other system's."""
    offered = {name: chosen for name, chosen in PRESETS.items() if not chosen or "all" in chosen or system in chosen}
    return {name: {**chosen.get("all", {}), **chosen.get(system, {})} for name, chosen in offered.items()}
