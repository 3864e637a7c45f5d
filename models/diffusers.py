"""diffusers' `UNet2DModel` pipelines as `ScoreModel`s. diffusers is optional, and imported only to read a
folder.

The network stays diffusers' own module; what this adds is what its scheduler says about it: the SDE (through
the table of betas, or the range of sigmas), what the output means, and how the time is told. Every field of a
scheduler is known here, or refused by name where it says anything: one that is passed over would change the numbers
without a word. Fields that concern sampling alone are kept: `model.card["sampling"]` has them as options of
`samplers`, `model.card["scheduler"]` as they were.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint_reader import CheckpointError, read_checkpoint
from models.conditioning import DiscreteIndex, Sigma
from models.parametrization import DATA, NOISE, SCORE, VELOCITY, Parametrization
from models.score_model import ScoreModel
from numerics import UserError, require_choice
from sde_lib import VESDE, TableVPSDE, cosine_betas

_OUTPUTS: dict[str, Parametrization] = {"epsilon": NOISE, "sample": DATA, "v_prediction": VELOCITY}
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "ScoreSdeVeScheduler")
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_VARIANCES = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "transition",
    "learned_range": "learned",
}


class DiffusersNetwork(nn.Module):
    """A `UNet2DModel`, called as `net(x, label)`, `net(x, label, class_label)`.

    Args:
        unet: diffusers' network.
        learned_variance: whether the second half of its output channels is a variance's place between its bounds.
    """

    def __init__(self, unet: nn.Module, *, learned_variance: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.num_classes: int | None = getattr(unet.config, "num_class_embeds", None)
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, C, H, W)`.

        Raises:
            UserError: no class for a network that needs one.
        """
        if self.num_classes is not None and class_label is None:
            raise UserError(
                f"got no class for a UNet2DModel of {self.num_classes} classes, which needs one; expected one: "
                "use model.condition(labels)"
            )
        return self.unet(x, label, class_labels=class_label, return_dict=False)[0]


def from_diffusers(source: Any, scheduler: Any = None) -> ScoreModel:
    """The model of a pipeline: a folder written by `pipeline.save_pretrained`, a pipeline, or a `UNet2DModel`
    and its scheduler.

    Args:
        source: the folder, the pipeline (an object with `.unet` and `.scheduler`), or the network. A folder holds `unet/` and
            `scheduler/`, or, as older ones do, their files side by side; weights as safetensors, or as `.bin`, of which
            nothing is executed.
        scheduler: with a bare network: a scheduler object, or its configuration as a mapping with
            `_class_name`.

    Returns:
        A `ScoreModel` in eval mode. DDPM and DDIM schedulers give a `TableVPSDE` through their betas, data in
        [-1, 1]; ScoreSdeVe gives a `VESDE`, data in [0, 1] where the network centres its input itself.
        `card["sampling"]` are options for our samplers. With `rescale_betas_zero_snr` alpha is 0 at the last index; an SDE
        needs alpha > 0, so there it is 1e-4 of that at the index before.

    Raises:
        UserError: for a folder that is none, another kind of scheduler, a schedule that cannot be read, or a field that is not
            known and not None or False.
        CheckpointError: weights that cannot be read.
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
    require_choice(name, "scheduler", _SCHEDULERS)
    fields = _Fields(config)
    made = _variance_exploding(fields, unet) if name == "ScoreSdeVeScheduler" else _variance_preserving(fields, unet)
    fields.refuse_the_rest()
    classes_by = getattr(unet.config, "class_embed_type", None)
    if classes_by is not None:
        raise UserError(
            f"got a network with class_embed_type={classes_by!r}; expected classes by number, num_class_embeds alone"
        )
    made.card["scheduler"] = {
        k: v for k, v in config.items() if isinstance(v, (bool, int, float, str, list, type(None)))
    }
    return made.eval()


class _Fields:
    """A scheduler's fields, each of which has to be asked for by somebody."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.asked: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        self.asked.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"got scheduler.{name}={value!r}; expected a finite number")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"got scheduler.{name}={value!r}; expected True or False")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value: str = self.get(name, default)
        require_choice(value, f"scheduler.{name}", choices)
        return value

    def refuse_the_rest(self) -> None:
        """Refuses a field that nobody has asked for and that says something."""
        self.choice("tensor_format", "pt", ("pt",))  # of early versions
        for name, value in self.config.items():
            if not name.startswith("_") and name not in self.asked and value is not None and value is not False:
                raise UserError(
                    f"got scheduler.{name}={value!r}, which is not understood for {self.config.get('_class_name')}; expected "
                    "None or False: leave it out if it does not change the model"
                )


def _variance_exploding(fields: _Fields, unet: nn.Module) -> ScoreModel:
    """The model of a ScoreSdeVeScheduler (Song et al. 2021): its range of sigmas; the corrector's settings are kept."""
    levels = int(fields.number("num_train_timesteps", 2000))
    sde = VESDE(
        sigma_min=fields.number("sigma_min", 0.01),
        sigma_max=fields.number("sigma_max", 1348.0),
        t_end=fields.number("sampling_eps", 1e-5),
    )
    for betas in ("beta_start", "beta_end", "beta_schedule"):  # of other schedulers; this one has none
        fields.get(betas, None)
    centred = getattr(unet.config, "center_input_sample", False)
    model = ScoreModel(
        DiffusersNetwork(unet), sde, SCORE, conditioning=Sigma(), data_range=(0.0, 1.0) if centred else (-1.0, 1.0)
    )
    corrector = {"name": "langevin", "snr": fields.number("snr", 0.15), "steps": int(fields.number("correct_steps", 1))}
    model.card = {"sampling": {"steps": levels, "corrector": corrector}}
    return model


def _variance_preserving(fields: _Fields, unet: nn.Module) -> ScoreModel:
    """The model of a DDPMScheduler or a DDIMScheduler: its betas, its output; variance and clipping are kept."""
    levels = int(fields.number("num_train_timesteps", 1000))
    older = "epsilon" if fields.switch("predict_epsilon", True) else "sample"  # the field before prediction_type
    kind = fields.choice("prediction_type", older, tuple(_OUTPUTS))
    variance = fields.choice("variance_type", "fixed_small", tuple(_VARIANCES))
    channels, out = (getattr(unet.config, name, None) for name in ("in_channels", "out_channels"))
    learned = variance == "learned_range"
    if channels is not None and out is not None and out != channels * (2 if learned else 1):
        raise UserError(
            f"got scheduler.variance_type={variance!r} and a network from {channels} to {out} channels; expected "
            f"{channels * (2 if learned else 1)} out, {'half of them' if learned else 'none of them'} for variances"
        )
    # where sampling stands between and beyond the betas' own steps; the model is the same
    fields.choice("timestep_spacing", "leading", ("leading", "linspace", "trailing"))
    fields.number("steps_offset", 0)
    fields.switch("set_alpha_to_one", True)
    model = ScoreModel(
        DiffusersNetwork(unet, learned_variance=learned),
        TableVPSDE(betas=_betas(fields, levels)),
        _OUTPUTS[kind],
        conditioning=DiscreteIndex(levels=levels),
    )
    model.card = {"sampling": {"variance": _VARIANCES[variance], "corrections": _corrections(fields)}}
    return model


def _corrections(fields: _Fields) -> list[dict[str, Any]]:
    """What the scheduler does to the denoised mean, as `samplers.corrections` by name.

    Thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3) scales by s, a quantile of |x_0| that is at least 1 and at
    most `sample_max_value`: at its default of 1 that is clipping to [-1, 1].
    """
    clip, limit = fields.switch("clip_sample", True), fields.number("clip_sample_range", 1.0)
    threshold, largest = fields.switch("thresholding", False), fields.number("sample_max_value", 1.0)
    fields.number("dynamic_thresholding_ratio", 0.995)
    if threshold and largest != 1.0:
        raise UserError(
            f"got scheduler.thresholding=True with sample_max_value={largest:g}; expected 1, at which it clips: samplers'"
            " DynamicThreshold has no largest value: set thresholding=False, and give the correction to the sampler"
        )
    if threshold:
        limit = 1.0
    return [{"name": "clip_denoised", "low": -limit, "high": limit}] if clip or threshold else []


def _betas(fields: _Fields, levels: int) -> tuple[float, ...]:
    """The scheduler's betas, in float64."""
    kind = fields.choice("beta_schedule", "linear", ("linear", "scaled_linear", "squaredcos_cap_v2"))
    start, end = fields.number("beta_start", 1e-4), fields.number("beta_end", 0.02)
    trained = fields.get("trained_betas", None)
    if trained is not None:
        betas = tuple(float(beta) for beta in trained)
        if len(betas) != levels:
            raise UserError(
                f"got {len(betas)} scheduler.trained_betas for num_train_timesteps={levels}; expected as many: the network is "
                "told their index"
            )
    elif kind == "squaredcos_cap_v2":
        betas = cosine_betas(steps=levels)
    else:
        power = 1 if kind == "linear" else 2
        low, high = start ** (1 / power), end ** (1 / power)
        betas = tuple((low + (high - low) * i / (levels - 1)) ** power for i in range(levels))
    return _without_signal(betas) if fields.switch("rescale_betas_zero_snr", False) else betas


_LAST = 1e-8
"""alpha^2 at the last index of a schedule without signal there, over that at the index before."""


def _without_signal(betas: tuple[float, ...]) -> tuple[float, ...]:
    """The betas shifted and scaled so that nothing of the data is left at the last index, and the first stays (Lin et al. 2024,
    arXiv:2305.08891, algorithm 1): sqrt(abar) becomes (sqrt(abar) - its last) first / (first - last)."""
    root = (-torch.log1p(-torch.tensor(betas, dtype=torch.float64))).cumsum(0).neg().div(2).exp()
    signal = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    signal[-1] = signal[-2] * _LAST
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    return tuple((1 - signal / before).tolist())


def _read_folder(folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network and the scheduler's configuration, from subfolders or side by side."""
    nested = (folder / "unet", folder / "scheduler" / "scheduler_config.json")
    flat = (folder, folder / "scheduler_config.json")
    network, scheduler = nested if nested[0].is_dir() else flat
    if not (network / "config.json").is_file() or not scheduler.is_file():
        raise UserError(
            f"got {folder}; expected a diffusers pipeline, with unet/config.json and scheduler/scheduler_config.json, or with "
            "config.json and scheduler_config.json"
        )
    weights = next((network / name for name in _WEIGHTS if (network / name).is_file()), None)
    if weights is None:
        raise UserError(f"got {network} without weights; expected {' or '.join(_WEIGHTS)}")
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(f"reading {folder} needs diffusers: pip install diffusers") from error
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    if weights.suffix == ".bin":
        return _from_pickle(UNet2DModel, network, weights), config
    return UNet2DModel.from_pretrained(network, local_files_only=True, use_safetensors=True), config


def _from_pickle(kind: Any, network: Path, weights: Path) -> nn.Module:
    """The network of a `.bin` file: read by our own reader, which executes nothing, and handed on as safetensors."""
    from safetensors.torch import save_file

    state = read_checkpoint(weights)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"got {weights}, which holds more than tensors by name; expected a network's state_dict")
    with tempfile.TemporaryDirectory(prefix="diffusers-") as place:
        save_file({k: v.contiguous().clone() for k, v in state.items()}, Path(place) / _WEIGHTS[0], {"format": "pt"})
        (Path(place) / "config.json").write_bytes((network / "config.json").read_bytes())
        made: nn.Module = kind.from_pretrained(place, local_files_only=True, use_safetensors=True)
    return made
