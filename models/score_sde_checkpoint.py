"""score_sde_pytorch's networks `ncsnpp` and `ddpm`: their configurations, and their tensors by name.

That code keeps a network as one flat list, `all_modules.N`, in the order in which its constructor made them. `_flat_order`
walks our named modules in that order, and `translate_ncsnpp` says what each of them is called inside there; so the whole
translation is a table of `theirs -> ours`. Two layouts differ in more than names: 1×1 convolutions are kept as matrices (in,
out), and queries, keys and values apart. EMA weights are a list without names, in the order of the trainable parameters, which
is the order of the model's own keys without the noise levels and without the random Fourier frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import AttentionBlock
from models.checkpoint_reader import CheckpointError
from models.checkpoint_translation import Config, Entry, Section, both
from models.conditioning import Conditioning, ContinuousTime, DiscreteIndex, Sigma
from models.embeddings import FourierEmbedding
from models.ncsnpp import NCSNpp
from models.parametrization import NOISE, SCORE
from models.resampling import ConvDouble, ConvHalve
from models.residual import ResidualBlock
from models.score_model import ScoreModel
from numerics import UserError, require_choice
from sde_lib import SDE, VESDE, VPSDE, SubVPSDE, TableVPSDE, geometric_sigmas

_SWITCHES = frozenset(
    [
        "name",
        "nf",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "resamp_with_conv",
        "conditional",
        "fir",
        "fir_kernel",
        "skip_rescale",
        "resblock_type",
        "progressive",
        "progressive_input",
        "progressive_combine",
        "embedding_type",
        "fourier_scale",
        "init_scale",
        "scale_by_sigma",
        "dropout",
        "nonlinearity",
        "normalization",
        "attention_type",
        "conv_size",
        "interpolation",
        "ema_rate",
        "num_scales",
        "sigma_min",
        "sigma_max",
        "beta_min",
        "beta_max",
    ]
)


def score_sde_model(config: Config) -> ScoreModel:
    """The untrained model of a score_sde config."""
    model, data = Section("model", config["model"]), Section("data", config["data"])
    training = Section("training", config.get("training", {}))
    model.only(_SWITCHES)
    model.require("normalization", "GroupNorm")
    model.require("nonlinearity", "swish")
    model.require("conditional", "True")  # otherwise that code keeps tensors that it never uses
    name, sde_name = model["name"], str(training["sde"]).lower()
    require_choice(name, "config.model.name", ("ncsnpp", "ddpm"))
    require_choice(sde_name, "config.training.sde", ("vpsde", "subvpsde", "vesde"))
    continuous, levels = bool(training["continuous"]), int(model["num_scales"])
    sde: SDE
    conditioning: Conditioning
    sigmas = None
    if sde_name == "vesde":
        sde = VESDE(sigma_min=float(model["sigma_min"]), sigma_max=float(model["sigma_max"]))
        conditioning = Sigma() if continuous else DiscreteIndex(levels=levels, reverse=True)
        if not continuous:
            sigmas = geometric_sigmas(levels=levels, largest=sde.sigma_max, smallest=sde.sigma_min)
    else:
        beta_min, beta_max = float(model["beta_min"]), float(model["beta_max"])
        conditioning = ContinuousTime(scale=999.0)
        if sde_name == "subvpsde":
            sde = SubVPSDE(beta_min=beta_min, beta_max=beta_max)
        elif continuous:
            sde = VPSDE(beta_min=beta_min, beta_max=beta_max)
        else:
            betas = torch.linspace(beta_min / levels, beta_max / levels, levels, dtype=torch.float64)
            sde, conditioning = TableVPSDE(betas=tuple(betas.tolist())), DiscreteIndex(levels=levels)
    centered = bool(data["centered"])
    common: dict[str, Any] = {
        "in_channels": int(data["num_channels"]),
        "image_size": int(data["image_size"]),
        "channels": int(model["nf"]),
        "multipliers": tuple(model["ch_mult"]),
        "blocks": int(model["num_res_blocks"]),
        "resample_with_conv": bool(model["resamp_with_conv"]),
        "conditional": bool(model["conditional"]),
        "dropout": float(model["dropout"]),
        "scale_by_sigma": bool(model.get("scale_by_sigma", False)),
        "sigmas": sigmas,
        "centered": centered,
    }
    resolutions = [common["image_size"] // 2**i for i in range(len(common["multipliers"]))]
    common["attention_resolutions"] = tuple(r for r in model["attn_resolutions"] if r in resolutions)
    if common["image_size"] % 2 ** (len(resolutions) - 1):
        raise UserError(
            f"got config.data.image_size={common['image_size']}; expected a multiple of {2 ** (len(resolutions) - 1)}, since "
            f"the network that this config describes halves it {len(resolutions) - 1} times"
        )
    if name == "ddpm":
        net = NCSNpp(residual_block="ddpm", groups=32, skip_rescale=False, embedding="positional", **common)
    else:
        net = NCSNpp(
            residual_block=str(model["resblock_type"]).lower(),
            fir_kernel=tuple(model["fir_kernel"]) if model["fir"] else None,
            skip_rescale=bool(model["skip_rescale"]),
            progressive_output=str(model["progressive"]).lower(),
            progressive_input=str(model["progressive_input"]).lower(),
            combine=str(model["progressive_combine"]).lower(),
            embedding=str(model["embedding_type"]).lower(),
            fourier_scale=float(model.get("fourier_scale", 16)),
            init_scale=float(model["init_scale"]),
            **common,
        )
    return ScoreModel(
        net,
        sde,
        SCORE if sde_name == "vesde" else NOISE,
        conditioning=conditioning,
        data_range=(-1.0, 1.0) if centered else (0.0, 1.0),
    )


def score_sde_state(content: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """`all_modules.…` -> tensor, raw or averaged."""
    state = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}
    state.pop("sigmas", None)  # a function of the config
    if weights == "raw":
        return state
    trainable = [name for name in state if name != "all_modules.0.W"]
    shadow = content["ema"]["shadow_params"]
    if len(shadow) != len(trainable):
        raise CheckpointError(
            f"got {len(shadow)} tensors in ema.shadow_params; expected {len(trainable)}, one for each trainable parameter"
        )
    wrong = tuple(
        f"{name}: {tuple(average.shape)} instead of {tuple(state[name].shape)}"
        for name, average in zip(trainable, shadow, strict=True)
        if average.shape != state[name].shape
    )
    if wrong:
        raise CheckpointError(f"got ema.shadow_params of other shapes than the parameters: {wrong[0]}", misshapen=wrong)
    return {**state, **dict(zip(trainable, shadow, strict=True))}


def _flat_order(net: NCSNpp) -> Iterator[tuple[str, nn.Module]]:
    """Our modules, with their names, in the order in which score_sde's constructor makes theirs."""
    if net.embedding is not None:
        if isinstance(net.embedding.features, FourierEmbedding):
            yield "embedding.features", net.embedding.features
        yield "embedding.hidden", net.embedding.hidden
        yield "embedding.output", net.embedding.output
    yield "stem", net.stem
    for i, level in enumerate(net.encoder):
        for j, (block, attention) in enumerate(zip(level.blocks, level.attentions, strict=True)):
            yield f"encoder.{i}.blocks.{j}", block
            if isinstance(attention, AttentionBlock):
                yield f"encoder.{i}.attentions.{j}", attention
        for name in ("down", "input_conv", "input_down"):
            module = getattr(level, name)
            if module is not None and (name != "input_down" or level.input_conv is None):
                yield f"encoder.{i}.{name}", module
    for name in ("block_1", "attention", "block_2"):
        yield f"middle.{name}", getattr(net.middle, name)
    for i, stage in enumerate(net.decoder):
        for j, block in enumerate(stage.blocks):
            yield f"decoder.{i}.blocks.{j}", block
        if isinstance(stage.attention, AttentionBlock):
            yield f"decoder.{i}.attention", stage.attention
        for name in ("output_norm", "output_conv"):
            if getattr(stage, name) is not None:
                yield f"decoder.{i}.{name}", getattr(stage, name)
        if isinstance(stage.output_up, ConvDouble):
            yield f"decoder.{i}.output_up", stage.output_up
        if stage.up is not None:
            yield f"decoder.{i}.up", stage.up
    if net.output_norm is not None and net.output_conv is not None:
        yield "output_norm", net.output_norm
        yield "output_conv", net.output_conv


def _matrices(ours: str, theirs: tuple[str, ...]) -> Iterator[Entry]:
    yield Entry(f"{ours}.weight", tuple(f"{name}.W" for name in theirs), matrix=True)
    yield Entry(f"{ours}.bias", tuple(f"{name}.b" for name in theirs))


def translate_ncsnpp(net: NCSNpp) -> Iterator[Entry]:
    """An entry for each tensor of `net`."""
    combined = {id(level.input_conv) for level in net.encoder if level.input_conv is not None}
    for n, (ours, module) in enumerate(_flat_order(net)):
        theirs = f"all_modules.{n}"
        if isinstance(module, FourierEmbedding):
            yield Entry(f"{ours}.weight", (f"{theirs}.W",))
        elif isinstance(module, ResidualBlock):
            yield from both(f"{ours}.norm_1", f"{theirs}.GroupNorm_0")
            yield from both(f"{ours}.conv_1", f"{theirs}.Conv_0")
            if module.project is not None:
                yield from both(f"{ours}.project", f"{theirs}.Dense_0")
            yield from both(f"{ours}.norm_2", f"{theirs}.GroupNorm_1")
            yield from both(f"{ours}.conv_2", f"{theirs}.Conv_1")
            if isinstance(module.shortcut, nn.Conv2d):
                if net.options["residual_block"] == "biggan":
                    yield from both(f"{ours}.shortcut", f"{theirs}.Conv_2")
                else:
                    yield from _matrices(f"{ours}.shortcut", (f"{theirs}.NIN_0",))
        elif isinstance(module, AttentionBlock):
            yield from both(f"{ours}.norm", f"{theirs}.GroupNorm_0")
            yield from _matrices(f"{ours}.qkv", tuple(f"{theirs}.NIN_{i}" for i in range(3)))
            yield from _matrices(f"{ours}.output", (f"{theirs}.NIN_3",))
        elif isinstance(module, ConvHalve | ConvDouble):
            yield from both(f"{ours}.conv", f"{theirs}.{'Conv_0' if module.fir is None else 'Conv2d_0'}")
        elif id(module) in combined:
            yield from both(ours, f"{theirs}.Conv_0")
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            yield from both(ours, theirs)
