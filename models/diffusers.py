"""diffusers' `UNet2DModel` pipelines as `ScoreModel`s. diffusers is optional, and imported only to read a
folder.

The network stays diffusers' own module; what this adds is what its scheduler says about it: the SDE (through
the table of betas, or the range of sigmas), what the output means, and how the time is told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.conditioning import Conditioning, DiscreteIndex, Sigma
from models.parametrization import DATA, NOISE, SCORE, VELOCITY, Parametrization
from models.score_model import ScoreModel
from numerics import UserError, require_choice
from sde_lib import SDE, VESDE, TableVPSDE

_OUTPUTS: dict[str, Parametrization] = {"epsilon": NOISE, "sample": DATA, "v_prediction": VELOCITY}


class DiffusersNetwork(nn.Module):
    """A `UNet2DModel`, called as `net(x, label)`, `net(x, label, class_label)`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.num_classes: int | None = getattr(unet.config, "num_class_embeds", None)

    def forward(self, x: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        return self.unet(x, label, class_labels=class_label, return_dict=False)[0]


def from_diffusers(source: Any, scheduler: Any = None) -> ScoreModel:
    """The model of a pipeline: a folder written by `pipeline.save_pretrained`, a pipeline, or a `UNet2DModel`
    and its scheduler.

    Args:
        source: the folder, the pipeline (an object with `.unet` and `.scheduler`), or the network.
        scheduler: with a bare network: a scheduler object, or its configuration as a mapping with
            `_class_name`.

    Returns:
        A `ScoreModel` in eval mode. DDPM and DDIM schedulers give a `TableVPSDE` through their betas, data in
        [-1, 1]; ScoreSdeVe gives a `VESDE`, data in [0, 1] where the network centres its input itself.

    Raises:
        UserError: for a folder that is none, another kind of scheduler, or a schedule that cannot be read.
        ImportError: for a folder, where diffusers is not installed.
    """
    if isinstance(source, str | os.PathLike):
        unet, config = _read_folder(Path(source))
    else:
        unet = getattr(source, "unet", source)
        scheduler = getattr(source, "scheduler", scheduler)
        if scheduler is None:
            raise UserError("got a network without its scheduler; expected both: from_diffusers(network, scheduler)")
        config = scheduler if isinstance(scheduler, Mapping) else {
            "_class_name": type(scheduler).__name__, **dict(scheduler.config)
        }  # fmt: skip
    name = config.get("_class_name")
    require_choice(name, "scheduler", ("DDPMScheduler", "DDIMScheduler", "ScoreSdeVeScheduler"))
    levels = int(config.get("num_train_timesteps", 1000))
    sde: SDE
    conditioning: Conditioning
    parametrization: Parametrization
    data_range = (-1.0, 1.0)
    if name == "ScoreSdeVeScheduler":
        sde = VESDE(sigma_min=float(config["sigma_min"]), sigma_max=float(config["sigma_max"]))
        conditioning, parametrization = Sigma(), SCORE
        if getattr(unet.config, "center_input_sample", False):
            data_range = (0.0, 1.0)
    else:
        kind = config.get("prediction_type", "epsilon")
        require_choice(kind, "scheduler.prediction_type", tuple(_OUTPUTS))
        sde, conditioning, parametrization = (
            TableVPSDE(betas=_betas(config, levels)),
            DiscreteIndex(levels=levels),
            _OUTPUTS[kind],
        )
    return ScoreModel(
        DiffusersNetwork(unet), sde, parametrization, conditioning=conditioning, data_range=data_range
    ).eval()


def _read_folder(folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    network, scheduler = folder / "unet", folder / "scheduler" / "scheduler_config.json"
    if not network.is_dir() or not scheduler.is_file():
        raise UserError(f"got {folder}; expected a diffusers pipeline, with unet/ and scheduler/scheduler_config.json")
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(f"reading {folder} needs diffusers: pip install diffusers") from error
    config = json.loads(scheduler.read_text())
    return UNet2DModel.from_pretrained(network, local_files_only=True, use_safetensors=True), config


def _betas(config: Mapping[str, Any], levels: int) -> tuple[float, ...]:
    """The scheduler's betas, in float64, from its configuration."""
    import math

    if config.get("trained_betas") is not None:
        return tuple(float(beta) for beta in config["trained_betas"])
    kind = config.get("beta_schedule", "linear")
    require_choice(kind, "scheduler.beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation (17)

        def signal(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        return tuple(min(1 - signal((i + 1) / levels) / signal(i / levels), 0.999) for i in range(levels))
    start, end = float(config["beta_start"]), float(config["beta_end"])
    power = 1 if kind == "linear" else 2
    low, high = start ** (1 / power), end ** (1 / power)
    return tuple((low + (high - low) * i / (levels - 1)) ** power for i in range(levels))
