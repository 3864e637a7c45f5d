"""The networks of ncsnv2 (`NCSN`, `NCSNv2` and the deeper ones) and of ncsn before it (`CondRefineNetDilated`, which is
ncsnv2's `NCSN` without its switches): their configurations, and their tensors by name.

A checkpoint of ncsnv2 is the list [model, optimizer, epoch, step, ema], without the last where config.model.ema is False; one
of ncsn is [model, optimizer]. A normalisation that knows the noise level keeps an `embed.weight`, which is how a conditional
network is told from NCSNv2: neither code writes down which of them it trained. Names are kept there, so the translation is a
plain table; the three weights of a conditional normalisation are one matrix (levels, 3 C), cut into three here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint_reader import CheckpointError
from models.checkpoint_translation import Config, Entry, Section, both
from models.conditioning import DiscreteIndex
from models.parametrization import SCORE
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.score_model import ScoreModel
from numerics import UserError, require_choice
from sde_lib import SDE, VESDE, TableVESDE, geometric_sigmas

_SWITCHES = frozenset(
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
        "batch_norm",
    ]
)


def ncsnv2_model(config: Config, tensors: Collection[str] = ()) -> ScoreModel:
    """The untrained model of a config of ncsnv2 or ncsn.

    Args:
        config: under that code's names.
        tensors: the names in the checkpoint. A conditional network is one by its tensors, and so is its depth; which NCSNv2
            it is follows from the data set, as in that code.
    """
    model, data = Section("model", config["model"]), Section("data", config["data"])
    model.only(_SWITCHES)
    model.require("normalization", "InstanceNorm++")
    for switch in ("spec_norm", "batch_norm"):
        model.require(switch, "False")
    own = "ncsn" if any(name.endswith(".embed.weight") for name in tensors) else "ncsnv2"
    name = str(model.get("name", own)).lower()
    require_choice(name, "config.model.name", ("ncsn", "ncsnv2"))
    if name == "ncsn" and tensors:
        size = "128" if any(name.startswith("res5.") for name in tensors) else "64"
    else:
        dataset = str(data["dataset"]).upper()
        sizes = {"CIFAR10": "64", "CELEBA": "64", "LSUN": "128", "FFHQ": "256"}
        require_choice(dataset, "config.data.dataset", tuple(sizes))
        size = sizes[dataset]
    largest, smallest, levels = (
        float(model["sigma_begin"]),
        float(model["sigma_end"]),
        int(model["num_classes"]),
    )
    kind = str(model.get("sigma_dist", "geometric"))  # the only one of ncsn
    require_choice(kind, "config.model.sigma_dist", ("geometric", "uniform"))
    sde: SDE
    if kind == "geometric":
        sigmas = geometric_sigmas(levels=levels, largest=largest, smallest=smallest)
        sde = VESDE(sigma_min=smallest, sigma_max=largest)
    else:
        sigmas = tuple(torch.linspace(largest, smallest, levels, dtype=torch.float64).tolist())
        sde = TableVESDE(sigmas=sigmas)
    centered = bool(data.get("rescaled", False))  # ncsn has no such switch
    if data["logit_transform"]:
        raise UserError("got config.data.logit_transform=True; expected False: images in [0, 1] or [-1, 1]")
    make = NCSN if name == "ncsn" else NCSNv2
    net = make(
        sigmas=sigmas,
        in_channels=int(data["channels"]),
        channels=int(model["ngf"]),
        size=size,
        activation=str(model.get("nonlinearity", "elu")).lower(),
        centered=centered,
    )
    return ScoreModel(
        net,
        sde,
        SCORE,
        conditioning=DiscreteIndex(levels=levels, reverse=True),
        data_range=(-1.0, 1.0) if centered else (0.0, 1.0),
    )


def keeps_averages(config: Config, content: list[Any]) -> bool:
    """Whether the run of that config averaged its weights: ncsn never did, ncsnv2 where config.model.ema says so."""
    return len(content) > 2 and bool(config["model"].get("ema", True))


def ncsnv2_state(content: list[Any], weights: str, checkpoint: object, *, averaged: bool = True) -> dict[str, Tensor]:
    """Name -> tensor, raw or averaged; the raw ones from a run that has not `averaged`, whichever are asked for."""
    state = {name.removeprefix("module."): tensor for name, tensor in content[0].items()}
    state.pop("sigmas", None)
    if weights == "raw":
        return state
    if len(content) < 5 and not averaged:  # the only weights that there are
        return state
    if len(content) < 5:
        raise CheckpointError(f"got {checkpoint} without averaged weights; expected some: ask for weights='raw'")
    averages = {name.removeprefix("module."): tensor for name, tensor in content[4].items()}
    if set(averages) != set(state):
        missing, unexpected = (
            tuple(sorted(set(state) - set(averages))),
            tuple(sorted(set(averages) - set(state))),
        )
        raise CheckpointError(
            f"got {checkpoint} with averaged weights that are not the model's; expected the same names: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}",
            missing=missing,
            unexpected=unexpected,
        )
    return averages


def translate_refinenet(net: RefineNet) -> Iterator[Entry]:
    """An entry for each tensor of `net`."""

    def norm(ours: str, theirs: str) -> Iterator[Entry]:
        if net.conditional:
            for i, name in enumerate(("gamma", "alpha", "beta")):
                yield Entry(f"{ours}.{name}", (f"{theirs}.embed.weight",), part=(i, 3))
        else:
            for name in ("alpha", "gamma", "beta"):
                yield Entry(f"{ours}.{name}", (f"{theirs}.{name}",))

    def rcu(ours: str, theirs: str, blocks: int) -> Iterator[Entry]:
        for b in range(blocks):
            for s in range(2):
                if net.conditional:
                    yield from norm(f"{ours}.units.{b}.{s}.norm", f"{theirs}.{b + 1}_{s + 1}_norm")
                yield Entry(f"{ours}.units.{b}.{s}.conv.weight", (f"{theirs}.{b + 1}_{s + 1}_conv.weight",))

    yield from both("stem", "begin_conv")
    yield from norm("output_norm", "normalizer")
    yield from both("output_conv", "end_conv")
    # The deepest network's fourth stage was put between the third and the next, and named 31.
    names = ["1", "2", "3", "31", "4", "5"] if len(net.stages) == 6 else [str(i + 1) for i in range(len(net.stages))]
    refine_names = ["1", "2", "31", "3", "4", "5"] if len(net.stages) == 6 else names
    for i, (stage, name) in enumerate(zip(net.stages, names, strict=True)):
        for j, block in enumerate(stage):
            ours, theirs = f"stages.{i}.{j}", f"res{name}.{j}"
            pooled = ".conv" if isinstance(block.halve, nn.Module) and not isinstance(block.halve, nn.Identity) else ""
            yield from norm(f"{ours}.norm_1", f"{theirs}.normalize1")
            yield from norm(f"{ours}.norm_2", f"{theirs}.normalize2")
            yield from both(f"{ours}.conv_1", f"{theirs}.conv1")
            yield from both(f"{ours}.conv_2", f"{theirs}.conv2{pooled}")
            if isinstance(block.shortcut, nn.Conv2d):
                yield from both(f"{ours}.shortcut", f"{theirs}.shortcut{pooled}")
    for i, (refine, name) in enumerate(zip(net.refine, refine_names, strict=True)):
        ours, theirs = f"refine.{i}", f"refine{name}"
        for j, unit in enumerate(refine.adapt):
            yield from rcu(f"{ours}.adapt.{j}", f"{theirs}.adapt_convs.{j}", len(unit.units))
        yield from rcu(f"{ours}.output", f"{theirs}.output_convs", len(refine.output.units))
        if refine.fuse is not None:
            for j in range(len(refine.fuse.convs)):
                yield from both(f"{ours}.fuse.convs.{j}", f"{theirs}.msf.convs.{j}")
                if net.conditional:
                    yield from norm(f"{ours}.fuse.norms.{j}", f"{theirs}.msf.norms.{j}")
        for j in range(2):
            yield Entry(f"{ours}.pool.convs.{j}.weight", (f"{theirs}.crp.convs.{j}.weight",))
            if net.conditional:
                yield from norm(f"{ours}.pool.norms.{j}", f"{theirs}.crp.norms.{j}")
