"""From what a user wrote to a whole configuration: a system's defaults, a preset, and changes of single values.

A change is a dotted path and a value. The path of a section stands for its name, so `sampling.sampler=ddim` is
`sampling.sampler.name=ddim`: the section then has that sampler's options. The same function reads config.json of a finished
run, whose values are changes of today's defaults: an option that has come since gets its default, and one that is gone is
named.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import models
from models.pretrained import CARD
from numerics import Catalogue, UserError, argument_help, nearest
from training import TrainingOptions
from workflow.defaults import HELP
from workflow.protocol import Protocol
from workflow.run_folder import CONFIG, read_json
from workflow.sections import is_section, leaves, names_first, set_value
from workflow.system import Config, System

ALIASES = {
    "training.weighting": "training.objective.weighting",
    "training.times": "training.objective.times",
    "training.log_normal_mean": "training.objective.times.mean",
    "training.log_normal_std": "training.objective.times.std",
    "model.mlp_width": "model.width",
    "model.mlp_depth": "model.depth",
    "sampling.steps": "sampling.sampler.steps",
    "sampling.second_steps": "sampling.second.steps",
    "sampling.variance": "sampling.sampler.variance",
    "sampling.step_size": "sampling.sampler.step_size",
    "likelihood.bound_draws": "bound.draws",
}
"""Short or earlier paths, and where the values are."""

MEANT_ELSE = {"model.fourier_features": "model.grey_level_features"}
"""Paths that in a configuration without `system`, as versions before 0.2 wrote it, meant another value."""


_LEAVES_OPEN: Mapping[str, Mapping[str, Any]] = {
    "likelihood.precision": {"likelihood.tolerance": None, "likelihood.steps": None, "likelihood.limit": 0},
    "likelihood.tolerance": {"likelihood.steps": None},
    "likelihood.solver": {"likelihood.tolerance": None, "likelihood.steps": None},
}
"""Values that follow from another where that is told and they are not: those left open. A system's or a preset's own would
hide what was asked for."""


def _leave_open(config: ConfigDict, told: Mapping[str, Any]) -> None:
    """Opens what follows from the values that a user has told, by whole paths."""
    for path, following in _LEAVES_OPEN.items():
        if str(told.get(path)).lower() in ("none", "fast"):  # left open itself, or the solver whose values they are
            continue
        for other, value in following.items():
            if other not in told:
                group, _, key = other.rpartition(".")
                config[group][key] = value


def change(config: ConfigDict, system: System, values: Mapping[str, Any]) -> None:
    """Sets the values at their dotted paths, names of sections first.

    Raises:
        UserError: a path that is not there, with the nearest.
    """
    for path, value in names_first({resolved_path(config, path): value for path, value in values.items()}):
        group, catalogue, rest = _owner(config, system, path)
        try:
            set_value(group, rest, value, catalogue)
        except UserError as error:
            raise UserError(f"config.{path}: {error}") from error
    _condition(config, system, {resolved_path(config, path): value for path, value in values.items()})


def _condition(config: ConfigDict, system: System, chosen: Mapping[str, Any]) -> None:
    """Gives a network that needs one its own conditioning, where the values `chosen` name the network, or what its need follows
    from, and no conditioning."""
    told = {f"model.{name}" for name in ("name", *_NEEDS)} & chosen.keys()
    if not told or "model.conditioning.name" in chosen or not _has(config, "model.conditioning"):
        return
    name, own = config.model.name, system.catalogues["model"].options(config.model.name)
    given = {n: config.model[n] for n in _NEEDS if n in own and config.model.get(n) is not None}
    given |= {n: chosen[f"model.{n}"] for n in _NEEDS if n in own and f"model.{n}" in chosen}
    needed = models.needed_conditioning(name, **given)
    if needed is not None:
        catalogue = system.catalogues["model.conditioning"]
        set_value(
            config.model,
            "conditioning",
            catalogue.describe(needed),
            Catalogue("", {}, parts={"conditioning": catalogue}),
        )


_NEEDS = ("embedding", "sigmas", "scale_by_sigma")
"""The options of a network that say what it has to be told of the time."""


def resolved_path(config: ConfigDict, path: str) -> str:
    """The whole path of a value: aliases replaced, `.name` added to a section's."""
    for short, whole in ALIASES.items():
        if (path == short or path.startswith(f"{short}.")) and not _has(config, path):
            path = whole + path.removeprefix(short)
    found: Any = config
    for key in path.split("."):
        found = found[key] if isinstance(found, ConfigDict) and key in found else None
    return f"{path}.name" if is_section(found) else path


def _has(config: ConfigDict, path: str) -> bool:
    found: Any = config
    for key in path.split("."):
        if not isinstance(found, ConfigDict) or key not in found:
            return False
        found = found[key]
    return True


def _owner(config: ConfigDict, system: System, path: str) -> tuple[ConfigDict, Catalogue[Any] | None, str]:
    """The outermost section that the path leads into, its catalogue, and the rest of the path."""
    best = ""
    for place in system.catalogues:
        if path.startswith(f"{place}.") and len(place) > len(best) and _has(config, place):
            best = place
    if not best:
        return config, None, path
    group: Any = config
    for key in best.split("."):
        group = group[key]
    return group, system.catalogues[best], path.removeprefix(f"{best}.")


def default_config(system: System, preset: str = "digits") -> ConfigDict:
    """A system's configuration under a preset.

    Raises:
        UserError: an unknown preset.
    """
    config = system.get_config()
    known = system.presets
    if preset not in known:
        raise UserError(f"got the preset {preset!r}{nearest(preset, known)}; expected one of {', '.join(known)}")
    change(config, system, known[preset])
    return config


def config_for(name: str, preset: str = "digits", changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the system of that name, under a preset, with some values changed, in plain types.

    Args:
        changes: values by dotted path, as flags would give them: `{"training.steps": 100, "sampling.sampler": "ddim"}`.

    Raises:
        UserError: an unknown system, preset or path.
    """
    from workflow import systems  # which import the stages

    system = systems.create(name)
    config = default_config(system, preset)
    change(config, system, changes or {})
    _leave_open(config, changes or {})
    return plain(config)


def help_texts(system: System, config: ConfigDict) -> dict[str, str]:
    """What the docstrings, and `workflow.defaults` of its own values, say of each, by dotted path."""
    texts = {f"training.{name}": text for name, text in argument_help(TrainingOptions).items()}
    texts |= {f"likelihood.{name}": text for name, text in argument_help(Protocol).items()}
    for path, catalogue in system.catalogues.items():
        if _has(config, path):
            group: Any = config
            for key in path.split("."):
                group = group[key]
            texts.update(_section_texts(group, catalogue, path))
    return {**texts, **HELP, **system.help}


def _section_texts(group: ConfigDict, catalogue: Catalogue[Any], path: str) -> Iterator[tuple[str, str]]:
    yield f"{path}.name", f"the {catalogue.kind}: {', '.join(catalogue.available())}"
    if group.name == "none" and "none" not in catalogue.entries:
        return
    for name, option in catalogue.options(group.name).items():
        yield f"{path}.{name}", option.help
        if option.part is not None and is_section(group.get(name)):
            yield from _section_texts(group[name], option.part, f"{path}.{name}")


FLAG = re.compile(r"--?config\.([\w.]+)(?:=(.*))?$", re.DOTALL)
"""`--config.a.b=value`, its path and its text."""


def of_flags(system: System, preset: str, arguments: list[str]) -> tuple[ConfigDict, list[str]]:
    """A system's configuration with the sections that the arguments choose, so that flags for their options exist; and the
    other arguments, with the whole paths of their values.

    Raises:
        UserError: an unknown preset, name or path.
    """
    config = default_config(system, preset)
    names, rest = {}, []
    for argument in arguments:
        match = FLAG.match(argument)
        whole = "" if match is None else resolved_path(config, match[1])
        if match is not None and whole.endswith(".name") and match[2] is not None:
            names[whole] = match[2]
        else:
            rest.append(argument)
    change(config, system, names)
    values = {**names, **{f"model.{n}": value for n in _NEEDS for value in _given(rest, f"model.{n}")}}
    _condition(config, system, values)
    paths = {path for match in map(FLAG.match, rest) if match is not None for path in [match[1]]}
    _leave_open(config, {path: value for path in paths for value in _given(rest, path)})
    known = dict(leaves(config))
    return config, [_whole(config, known, argument) for argument in rest]


def _given(arguments: list[str], path: str) -> list[Any]:
    """The value that a flag gives to that path, if one does, last one last; a text where it is no Python literal."""
    found: list[Any] = []
    for match in filter(None, map(FLAG.match, arguments)):
        if match[1] == path and match[2] is not None:
            found.append(match[2])
            with contextlib.suppress(ValueError, SyntaxError):
                found[-1] = ast.literal_eval(match[2])
    return found


def _whole(config: ConfigDict, known: Mapping[str, Any], argument: str) -> str:
    """A flag with the whole path of its value, and with None for "none" where that is a value."""
    match = FLAG.match(argument)
    if match is None:
        return argument
    path = resolved_path(config, match[1])
    if path not in known:
        raise UserError(f"got the unknown flag --config.{match[1]}{nearest(match[1], known)} (--help lists all)")
    if match[2] is None:
        return f"--config.{path}"
    *groups, key = path.split(".")
    group: Any = config
    for name in groups:
        group = group[name]
    several = group.get_type(key) is object
    return f"--config.{path}={'None' if match[2].lower() == 'none' and several else match[2]}"


def plain(config: ConfigDict) -> Config:
    """The configuration in plain types."""
    values: Config = config.to_dict()
    return values


def of_run(folder: Path) -> Config:
    """The configuration that a run folder, or a pretrained one, was made with, in today's form.

    Raises:
        UserError: where there is none, or a value of it is no longer known.
    """
    if (folder / CARD).is_file():
        stored = read_json(folder / CARD).get("config")
        if not isinstance(stored, dict):
            raise UserError(
                f"got the pretrained folder {folder}, whose card names no configuration; expected one that "
                "experiments/export.py wrote: use it through ScoreModel.from_pretrained"
            )
        return restored(stored, folder / CARD)
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"got the run folder {folder}, which has no {CONFIG}; expected one that an experiment has written: "
            "run experiments/vp.py --workdir=... first"
        )
    return restored(read_json(file), file)


def restored(stored: Mapping[str, Any], source: Path) -> Config:
    """A stored configuration in today's form, from the file `source`.

    Raises:
        UserError: it is not a run's, or a value of it is no longer known.
    """
    name = stored.get("system", stored.get("name"))
    missing = [
        p for p in ("data", "model", "training", "sampling", "likelihood") if not isinstance(stored.get(p), Mapping)
    ]
    missing += [n for n in ("seed",) if n not in stored] + ([] if isinstance(name, str) else ["system"])
    if missing:
        raise UserError(
            f"got {source}, which is not the configuration of a run: it has no {', '.join(missing)}; expected a file that an "
            "experiment wrote"
        )
    from workflow import systems  # which import the stages

    system = systems.create(str(name))
    config = system.get_config()
    values = {path: _tuples(value) for path, value in leaves(stored) if path not in ("system", "name")}
    if "system" not in stored:
        # continuous data had one mean and one scale then
        values = {"data.scaling": "joint", **{MEANT_ELSE.get(path, path): value for path, value in values.items()}}
    likelihood = stored["likelihood"]
    if "refine" not in likelihood and likelihood.get("solver", "fast") == "fast":
        values.pop("likelihood.tolerance", None)  # of other solvers then; the steps' own now
    try:
        change(config, system, dict(_known(config, system, values)))
    except UserError as error:
        raise UserError(f"got {source}: {error}; remove that value, or use the version that wrote the file") from error
    return plain(config)


def _known(config: ConfigDict, system: System, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values but for empty ones of options that a section does not have: earlier versions wrote those down."""
    trial = system.get_config()
    for path, value in names_first({resolved_path(trial, p): v for p, v in values.items()}):
        if (
            value in (0, "", None, ())
            and not isinstance(value, bool)
            and (not _has(trial, path) or path.endswith(".steps"))
        ):
            continue
        with_name = resolved_path(trial, path)
        if with_name.endswith(".name"):
            change(trial, system, {path: value})
        yield path, value


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
