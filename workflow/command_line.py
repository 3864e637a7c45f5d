"""Command lines that answer in one line.

Two kinds: a system (`score-sde vp …`) takes every value of its configuration as a flag `--config.a.b=…` through
ml_collections; a tool on a finished run (`score-sde sample …`, `score-sde nll …`) takes plain options. Both refuse what does
not fit with one line that says what was got, what was expected and what to do, and leave with the exit code that `--help`
lists. That holds for what a user can get wrong; a bug keeps its traceback, and `--traceback` shows it for the others too.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from numerics import UserError, nearest
from samplers import SamplingError
from training.errors import NON_FINITE, USAGE, TrainingError
from workflow import configuration
from workflow.sections import leaves
from workflow.system import Config, System

EXIT_CODES = (
    "exit codes: 0 done; 2 usage: an option, a value or a run folder that does not fit; 3 data that are missing, damaged or do "
    "not fit; 4 a value that is not finite; 5 the disk, or a checkpoint to go on from that is damaged; 130 stopped by Ctrl-C, "
    "143 by SIGTERM; 1, with a traceback, a bug"
)
_SHARED = {
    "workdir": "the run folder",
    "preset": "whole settings by name: {presets}; the values below are the chosen one's",
    "resume": "go on from the run folder's newest checkpoint, or start where there is none",
    "allow_change": "names of values, with commas, that may differ from the run folder's on --resume",
    "init_from": "begin with the averaged weights of a run folder, a checkpoint's file or a pretrained folder (of export.py), "
    "on data of the same shape; not looked at where --resume finds a checkpoint",
    "dry_run": "go through every stage in seconds, in a folder that is then removed (in --workdir, where that is given), and "
    "print what the run would take: memory, disk, time",
    "quiet": "no progress bars and no words on the way: results, warnings and errors only",
    "traceback": "show where in the program a refused value was found",
}


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Calls `main(arguments)` and leaves with its exit code; a user's mistake becomes one line on stderr."""
    name = Path(sys.argv[0]).name
    arguments = sys.argv[1:] if argv is None else argv
    traced = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # while the program was imported; see `experiments`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *where, **more: _say(f"{name}: warning: {message}")
    try:
        code = main(arguments) or 0
    except (UserError, TrainingError, SamplingError, *_MISSING) as error:
        if traced:
            raise
        _say(f"{name}: {error}")
        code = NON_FINITE if isinstance(error, SamplingError) else getattr(error, "exit_code", USAGE)
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        code = 130
    sys.exit(code)


_MISSING = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What a path that a user has named can run into."""


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def path(text: str) -> Path:
    """A path that was named; `~` is the home folder.

    Raises:
        argparse.ArgumentTypeError: for the empty one, which `Path` takes for the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path; expected a name, or . for the current folder")
    return Path(text).expanduser()


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, whose help shows every default, and whose paths are not empty."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, epilog=EXIT_CODES, **kwargs
        )
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        """Raises it as a user's mistake."""
        raise UserError(f"{message} (try --help)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a system's command line asks for.

    Attributes:
        config: with its `--config.a.b=…` flags applied, in plain types.
        workdir: the run folder; given: whether it was named, or is the default.
        resume, allow_change, init_from, dry_run, quiet: see `--help`.
    """

    config: Config
    workdir: Path
    given: bool
    resume: bool
    allow_change: tuple[str, ...]
    init_from: Path | None
    dry_run: bool
    quiet: bool


def parse_system(system: System, arguments: list[str]) -> Request:
    """What the flags ask for.

    Raises:
        UserError: for an unknown flag, a value of the wrong type, or a stray argument.
        SystemExit: after `--help`, which lists every value with its default.
    """
    asked_for_help = any(a in ("--help", "-h", "-help", "--helpfull") for a in arguments)
    preset, arguments = _preset([a for a in arguments if a not in ("--help", "-h", "-help", "--helpfull")])
    arguments = [_switched(system, a) for a in arguments]
    config, arguments = configuration.of_flags(system, preset, arguments)
    if asked_for_help:
        print(_help(system, config))
        raise SystemExit(0)
    try:
        values, rest = _read_flags(system, config, arguments)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"got the unknown flag --{error.flagname}{nearest(f'--{error.flagname}', (f'--{n}' for n in _SHARED))} "
            "(--help lists all)"
        ) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_wrong_value(error, system, config, arguments)) from error
    if rest:
        raise UserError(
            f"got the stray argument {rest[0]!r}; expected flags only: write --flag=value with an equals sign "
            "(a boolean takes =True or =False)"
        )
    for flag in ("workdir", "init_from"):
        text: Any = values[flag].value
        if text is not None and not text.strip():
            raise UserError(f"got --{flag} without a value; expected a path, or . for the current folder")
    return Request(
        config=configuration.plain(values.config),
        workdir=path(values.workdir),
        given=bool(values["workdir"].present),
        resume=values.resume,
        allow_change=tuple(values.allow_change),
        init_from=None if values.init_from is None else path(values.init_from),
        dry_run=values.dry_run,
        quiet=values.quiet,
    )


def _switched(system: System, argument: str) -> str:
    """A switch of the system's own as the flag of the value that it sets."""
    where = system.switches.get(argument.removeprefix("--")) if argument.startswith("--") else None
    return argument if where is None else f"--config.{where}=True"


def _preset(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of `--preset`, "digits" where it is not given, and the other arguments."""
    chosen, rest = "digits", []
    waiting = False
    for argument in arguments:
        if waiting:
            chosen, waiting = argument, False
        elif argument.startswith("--preset="):
            chosen = argument.removeprefix("--preset=")
        elif argument == "--preset":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise UserError("got --preset without a value; expected a name, such as --preset=fashion_mnist")
    return chosen, rest


def _wrong_value(error: Exception, system: System, config: ConfigDict, arguments: list[str]) -> str:
    """The one line behind a refused value: that of the first flag that is refused alone."""
    known = dict(leaves(config))
    for argument in arguments:
        match = configuration.FLAG.match(argument)
        if match is None or match[2] is None:
            continue
        try:
            _read_flags(system, config, [argument])
        except (flags.Error, ValueError):
            value = known[match[1]]
            return f"got --config.{match[1]}={match[2]!r}; expected a value of type {type(value).__name__}, such as {value!r}"
    return f"{error} (--help lists all flags)"


def _read_flags(system: System, config: ConfigDict, arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags, `config` among them with the values that they give it, and the arguments that are no flags."""
    make: Any = flags.FlagValues  # absl does not type it
    values = make()
    line = ["score-sde", *arguments]
    # the values' flags are made from the command line as they are defined
    changed = copy.deepcopy(config)
    config_flags.DEFINE_config_dict("config", changed, lock_config=True, flag_values=values, sys_argv=line)
    flags.DEFINE_string("workdir", f"runs/{system.name}", "", flag_values=values)
    flags.DEFINE_string("init_from", None, "", flag_values=values)
    flags.DEFINE_list("allow_change", [], "", flag_values=values)
    for name in ("resume", "dry_run", "quiet"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    return values, values(line)[1:]


def _help(system: System, config: ConfigDict) -> str:
    default = {"workdir": f"runs/{system.name}", "preset": "digits", "allow_change": "", "init_from": ""}
    lines = [system.about.strip(), ""]
    shared = {**_SHARED, "preset": _SHARED["preset"].format(presets=", ".join(system.presets))}
    lines += [f"  --{name}={default.get(name, 'False')}  {text}" for name, text in shared.items()]
    lines += [f"  --{name}  short for --config.{where}=True" for name, where in system.switches.items()]
    lines += [
        "",
        "values of the configuration, with their defaults. A section shows the options of the class that its name chooses, and",
        "--config.sampling.sampler=ddim chooses one; with --help, what is chosen is shown. None leaves a value open.",
        "",
    ]
    texts = configuration.help_texts(system, config)
    for name, value in leaves(config):
        lines += [f"  --config.{name}={value}", *([f"      {texts[name]}"] if texts.get(name) else [])]
    return "\n".join([*lines, "", EXIT_CODES])
