"""Released checkpoints of score_sde_pytorch and ncsnv2, as `ScoreModel`s.

score_sde keeps its networks as one flat list, `all_modules.N`, in the order in which its constructor made
them. `_flat_order` walks our named modules in that order, and `_translate_ncsnpp` says what each of them
is called inside there; so the whole translation is a table of `theirs -> ours`. Two layouts differ in more than names:
1×1 convolutions are kept as matrices (in, out), and queries, keys and values apart. EMA weights are a list
without names, in the order of the trainable parameters, which is the order of the model's own keys without
the noise levels and without the random Fourier frequencies.

Everything is checked: a config's switches, the name and shape of every tensor. Nothing in the file is
executed (`models.checkpoint_reader`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import AttentionBlock
from models.checkpoint_reader import CheckpointError, read_checkpoint
from models.conditioning import Conditioning, ContinuousTime, DiscreteIndex, Sigma
from models.embeddings import FourierEmbedding
from models.ncsnpp import NCSNpp
from models.network import check_choice
from models.parametrization import NOISE, SCORE
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.resampling import ConvDouble, ConvHalve
from models.residual import ResidualBlock
from models.score_model import ScoreModel
from numerics import UserError
from sde_lib import SDE, VESDE, VPSDE, SubVPSDE, TableVESDE, TableVPSDE, geometric_sigmas

Config = Mapping[str, Any]


def load_score_sde(
    checkpoint: str | os.PathLike[str], config: Config | str | os.PathLike[str], weights: str = "ema"
) -> ScoreModel:
    """The model in a checkpoint of score_sde_pytorch (networks `ncsnpp`, `ddpm`) or of ncsnv2 (`NCSN`,
    `NCSNv2` and deeper ones).

    Args:
        checkpoint: the `.pth` file.
        config: the values it was trained with, under that code's names (`{"model": {…}, "data": {…},
            "training": {…}}`), or a JSON file that holds them.
        weights: `"ema"`, the averaged weights, or `"raw"`.

    Returns:
        A `ScoreModel` in eval mode, with the SDE, parametrisation, time conditioning and data range of that
        config. Discrete variance-preserving models get the SDE through their own table of betas
        (`TableVPSDE`).

    Raises:
        CheckpointError: a `ValueError`, where the file is unreadable or unsafe, or its tensors do not fit the
            config's network; it lists every missing, unexpected and misshapen tensor.
        UserError: for a config with a missing key, an unknown switch, or an unsupported value.
    """
    check_choice("weights", weights, ("ema", "raw"))
    config = _read_config(config)
    content = read_checkpoint(checkpoint)
    if isinstance(content, dict) and {"model", "ema"} <= set(content):
        model = _score_sde_model(config)
        state = _score_sde_state(content, weights)
        table = list(_translate_ncsnpp(model.net))  # type: ignore[arg-type]
    elif isinstance(content, list) and len(content) >= 4 and isinstance(content[0], dict):
        model = _ncsnv2_model(config)
        state = _ncsnv2_state(content, weights, checkpoint)
        table = list(_translate_refinenet(model.net))  # type: ignore[arg-type]
    else:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{checkpoint}: got {keys}; expected score_sde's {{model, ema, optimizer, step}} or ncsnv2's list "
            f"[model, optimizer, epoch, step, ema]"
        )
    _fill(model.net, state, table, str(checkpoint))
    model.card = {"source": {"weights": weights, "step": _step(content)}}
    return model.eval()


def _step(content: Any) -> int:
    return int(content["step"] if isinstance(content, dict) else content[3])


# -- configurations ------------------------------------------------------------------------------------------


def _read_config(config: Config | str | os.PathLike[str]) -> Config:
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a JSON file with the checkpoint's config")
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error}); expected the checkpoint's config as JSON") from error
    else:
        values = config
    if not isinstance(values, Mapping) or "model" not in values or "data" not in values:
        raise UserError(f"config: got the sections {sorted(values)}, expected at least 'model' and 'data'")
    return values


@dataclass(frozen=True)
class _Section:
    """A section of a config whose every key must be known, and every key asked for present."""

    name: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"config.{self.name} has no {key!r}, which the network is built from; add it")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def only(self, known: frozenset[str]) -> None:
        if unknown := sorted(set(self.values) - known):
            raise UserError(
                f"config.{self.name}.{unknown[0]} is an unknown switch; expected only: {', '.join(sorted(known))}"
            )

    def require(self, key: str, expected: str) -> None:
        got = self.get(key, expected)
        if str(got).lower() != expected.lower():
            raise UserError(f"config.{self.name}.{key}={got!r} is not supported; expected {expected!r}")


_SCORE_SDE_SWITCHES = frozenset(
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
_NCSNV2_SWITCHES = frozenset(
    [
        "sigma_begin",
        "sigma_end",
        "sigma_dist",
        "num_classes",
        "normalization",
        "nonlinearity",
        "ngf",
        "ema",
        "ema_rate",
        "spec_norm",
        "name",
    ]
)


def _score_sde_model(config: Config) -> ScoreModel:
    """The untrained model of a score_sde config."""
    model, data = _Section("model", config["model"]), _Section("data", config["data"])
    training = _Section("training", config.get("training", {}))
    model.only(_SCORE_SDE_SWITCHES)
    model.require("normalization", "GroupNorm")
    model.require("nonlinearity", "swish")
    model.require("conditional", "True")  # otherwise that code keeps tensors that it never uses
    name, sde_name = model["name"], str(training["sde"]).lower()
    check_choice("config.model.name", name, ("ncsnpp", "ddpm"))
    check_choice("config.training.sde", sde_name, ("vpsde", "subvpsde", "vesde"))
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
            f"config.data.image_size={common['image_size']} cannot be halved {len(resolutions) - 1} times, as the "
            f"network that this config describes does; expected a multiple of {2 ** (len(resolutions) - 1)}"
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


def _ncsnv2_model(config: Config) -> ScoreModel:
    """The untrained model of an ncsnv2 config. Which network it is follows from the data set there, as in
    that code.
    """
    model, data = _Section("model", config["model"]), _Section("data", config["data"])
    model.only(_NCSNV2_SWITCHES)
    model.require("normalization", "InstanceNorm++")
    model.require("spec_norm", "False")
    name = str(model.get("name", "ncsnv2")).lower()
    check_choice("config.model.name", name, ("ncsn", "ncsnv2"))
    dataset = str(data["dataset"]).upper()
    sizes = {"CIFAR10": "64", "CELEBA": "64", "LSUN": "128", "FFHQ": "256"}
    check_choice("config.data.dataset", dataset, tuple(sizes))
    largest, smallest, levels = (
        float(model["sigma_begin"]),
        float(model["sigma_end"]),
        int(model["num_classes"]),
    )
    kind = str(model["sigma_dist"])
    check_choice("config.model.sigma_dist", kind, ("geometric", "uniform"))
    sde: SDE
    if kind == "geometric":
        sigmas = geometric_sigmas(levels=levels, largest=largest, smallest=smallest)
        sde = VESDE(sigma_min=smallest, sigma_max=largest)
    else:
        sigmas = tuple(torch.linspace(largest, smallest, levels, dtype=torch.float64).tolist())
        sde = TableVESDE(sigmas=sigmas)
    centered = bool(data["rescaled"])
    if data["logit_transform"]:
        raise UserError("config.data.logit_transform=True is not supported; expected images in [0, 1] or [-1, 1]")
    make = NCSN if name == "ncsn" else NCSNv2
    net = make(
        sigmas=sigmas,
        in_channels=int(data["channels"]),
        channels=int(model["ngf"]),
        size=sizes[dataset],
        activation=str(model["nonlinearity"]).lower(),
        centered=centered,
    )
    return ScoreModel(
        net,
        sde,
        SCORE,
        conditioning=DiscreteIndex(levels=levels, reverse=True),
        data_range=(-1.0, 1.0) if centered else (0.0, 1.0),
    )


# -- weights in the file -------------------------------------------------------------------------------------


def _score_sde_state(content: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """`all_modules.…` -> tensor, raw or averaged."""
    state = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}
    state.pop("sigmas", None)  # a function of the config
    if weights == "raw":
        return state
    trainable = [name for name in state if name != "all_modules.0.W"]
    shadow = content["ema"]["shadow_params"]
    if len(shadow) != len(trainable):
        raise CheckpointError(f"ema.shadow_params has {len(shadow)} tensors for {len(trainable)} trainable parameters")
    wrong = tuple(
        f"{name}: {tuple(average.shape)} instead of {tuple(state[name].shape)}"
        for name, average in zip(trainable, shadow, strict=True)
        if average.shape != state[name].shape
    )
    if wrong:
        raise CheckpointError(f"ema.shadow_params does not follow the parameters: {wrong[0]}", misshapen=wrong)
    return {**state, **dict(zip(trainable, shadow, strict=True))}


def _ncsnv2_state(content: list[Any], weights: str, checkpoint: object) -> dict[str, Tensor]:
    state = {name.removeprefix("module."): tensor for name, tensor in content[0].items()}
    state.pop("sigmas", None)
    if weights == "raw":
        return state
    if len(content) < 5:
        raise CheckpointError(f"{checkpoint} holds no averaged weights; ask for weights='raw'")
    averages = {name.removeprefix("module."): tensor for name, tensor in content[4].items()}
    if set(averages) != set(state):
        missing, unexpected = (
            tuple(sorted(set(state) - set(averages))),
            tuple(sorted(set(averages) - set(state))),
        )
        raise CheckpointError(
            f"{checkpoint}: the averaged weights are not the model's: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}",
            missing=missing,
            unexpected=unexpected,
        )
    return averages


# -- translation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Our tensor `ours`, and theirs that it is made of: one, or several joined along the first axis after
    `transpose`.
    """

    ours: str
    theirs: tuple[str, ...]
    matrix: bool = False  # (in, out), for a 1×1 convolution
    part: tuple[int, int] | None = None  # (i, n): the i-th of n equal parts of the last axis

    def make(self, state: Mapping[str, Tensor]) -> Tensor:
        pieces = [state[name] for name in self.theirs]
        if self.matrix:
            pieces = [piece.t().unflatten(1, (-1, 1, 1)) for piece in pieces]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.part is not None:
            tensor = tensor.chunk(self.part[1], dim=-1)[self.part[0]]
        return tensor


def _fill(net: nn.Module, state: Mapping[str, Tensor], table: list[_Entry], source: str) -> None:
    """Copy `state` into `net` by the table, all of it or nothing."""
    own = net.state_dict()
    wanted = {name for entry in table for name in entry.theirs}
    missing = tuple(sorted(wanted - set(state)))
    unexpected = tuple(sorted(set(state) - wanted))
    misshapen, translated = [], {}
    for entry in table:
        if not set(entry.theirs) <= set(state):
            continue
        ranks = {state[name].ndim for name in entry.theirs}
        if entry.matrix and ranks != {2}:
            misshapen.append(f"{entry.theirs[0]}: {tuple(state[entry.theirs[0]].shape)}, expected a matrix")
            continue
        try:
            tensor = entry.make(state)
        except RuntimeError:
            misshapen.append(f"{entry.theirs}: shapes that cannot be joined")
            continue
        if tensor.shape != own[entry.ours].shape:
            misshapen.append(f"{entry.theirs[0]}: {tuple(tensor.shape)}, expected {tuple(own[entry.ours].shape)}")
        translated[entry.ours] = tensor
    if missing or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("misshapen", tuple(misshapen)),
            )
            if names
        ]
        raise CheckpointError(
            f"{source} does not hold the network that the config describes: {'; '.join(parts)}",
            missing=missing,
            unexpected=unexpected,
            misshapen=tuple(misshapen),
        )
    if forgotten := set(own) - set(translated):
        raise RuntimeError(f"the translation leaves out our own tensors {sorted(forgotten)[:3]}")
    net.load_state_dict(translated, strict=True)


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


def _both(ours: str, theirs: str) -> Iterator[_Entry]:
    yield _Entry(f"{ours}.weight", (f"{theirs}.weight",))
    yield _Entry(f"{ours}.bias", (f"{theirs}.bias",))


def _matrices(ours: str, theirs: tuple[str, ...]) -> Iterator[_Entry]:
    yield _Entry(f"{ours}.weight", tuple(f"{name}.W" for name in theirs), matrix=True)
    yield _Entry(f"{ours}.bias", tuple(f"{name}.b" for name in theirs))


def _translate_ncsnpp(net: NCSNpp) -> Iterator[_Entry]:
    combined = {id(level.input_conv) for level in net.encoder if level.input_conv is not None}
    for n, (ours, module) in enumerate(_flat_order(net)):
        theirs = f"all_modules.{n}"
        if isinstance(module, FourierEmbedding):
            yield _Entry(f"{ours}.weight", (f"{theirs}.W",))
        elif isinstance(module, ResidualBlock):
            yield from _both(f"{ours}.norm_1", f"{theirs}.GroupNorm_0")
            yield from _both(f"{ours}.conv_1", f"{theirs}.Conv_0")
            if module.project is not None:
                yield from _both(f"{ours}.project", f"{theirs}.Dense_0")
            yield from _both(f"{ours}.norm_2", f"{theirs}.GroupNorm_1")
            yield from _both(f"{ours}.conv_2", f"{theirs}.Conv_1")
            if isinstance(module.shortcut, nn.Conv2d):
                if net.options["residual_block"] == "biggan":
                    yield from _both(f"{ours}.shortcut", f"{theirs}.Conv_2")
                else:
                    yield from _matrices(f"{ours}.shortcut", (f"{theirs}.NIN_0",))
        elif isinstance(module, AttentionBlock):
            yield from _both(f"{ours}.norm", f"{theirs}.GroupNorm_0")
            yield from _matrices(f"{ours}.qkv", tuple(f"{theirs}.NIN_{i}" for i in range(3)))
            yield from _matrices(f"{ours}.output", (f"{theirs}.NIN_3",))
        elif isinstance(module, ConvHalve | ConvDouble):
            yield from _both(f"{ours}.conv", f"{theirs}.{'Conv_0' if module.fir is None else 'Conv2d_0'}")
        elif id(module) in combined:
            yield from _both(ours, f"{theirs}.Conv_0")
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            yield from _both(ours, theirs)


def _translate_refinenet(net: RefineNet) -> Iterator[_Entry]:
    def norm(ours: str, theirs: str) -> Iterator[_Entry]:
        if net.conditional:
            for i, name in enumerate(("gamma", "alpha", "beta")):
                yield _Entry(f"{ours}.{name}", (f"{theirs}.embed.weight",), part=(i, 3))
        else:
            for name in ("alpha", "gamma", "beta"):
                yield _Entry(f"{ours}.{name}", (f"{theirs}.{name}",))

    def rcu(ours: str, theirs: str, blocks: int) -> Iterator[_Entry]:
        for b in range(blocks):
            for s in range(2):
                if net.conditional:
                    yield from norm(f"{ours}.units.{b}.{s}.norm", f"{theirs}.{b + 1}_{s + 1}_norm")
                yield _Entry(f"{ours}.units.{b}.{s}.conv.weight", (f"{theirs}.{b + 1}_{s + 1}_conv.weight",))

    yield from _both("stem", "begin_conv")
    yield from norm("output_norm", "normalizer")
    yield from _both("output_conv", "end_conv")
    # The deepest network's fourth stage was put between the third and the next, and named 31.
    names = ["1", "2", "3", "31", "4", "5"] if len(net.stages) == 6 else [str(i + 1) for i in range(len(net.stages))]
    refine_names = ["1", "2", "31", "3", "4", "5"] if len(net.stages) == 6 else names
    for i, (stage, name) in enumerate(zip(net.stages, names, strict=True)):
        for j, block in enumerate(stage):
            ours, theirs = f"stages.{i}.{j}", f"res{name}.{j}"
            pooled = ".conv" if isinstance(block.halve, nn.Module) and not isinstance(block.halve, nn.Identity) else ""
            yield from norm(f"{ours}.norm_1", f"{theirs}.normalize1")
            yield from norm(f"{ours}.norm_2", f"{theirs}.normalize2")
            yield from _both(f"{ours}.conv_1", f"{theirs}.conv1")
            yield from _both(f"{ours}.conv_2", f"{theirs}.conv2{pooled}")
            if isinstance(block.shortcut, nn.Conv2d):
                yield from _both(f"{ours}.shortcut", f"{theirs}.shortcut{pooled}")
    for i, (refine, name) in enumerate(zip(net.refine, refine_names, strict=True)):
        ours, theirs = f"refine.{i}", f"refine{name}"
        for j, unit in enumerate(refine.adapt):
            yield from rcu(f"{ours}.adapt.{j}", f"{theirs}.adapt_convs.{j}", len(unit.units))
        yield from rcu(f"{ours}.output", f"{theirs}.output_convs", len(refine.output.units))
        if refine.fuse is not None:
            for j in range(len(refine.fuse.convs)):
                yield from _both(f"{ours}.fuse.convs.{j}", f"{theirs}.msf.convs.{j}")
                if net.conditional:
                    yield from norm(f"{ours}.fuse.norms.{j}", f"{theirs}.msf.norms.{j}")
        for j in range(2):
            yield _Entry(f"{ours}.pool.convs.{j}.weight", (f"{theirs}.crp.convs.{j}.weight",))
            if net.conditional:
                yield from norm(f"{ours}.pool.norms.{j}", f"{theirs}.crp.norms.{j}")
