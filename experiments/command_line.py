"""Command lines that answer in one line.

Two kinds: the experiments (`vp.py`, ...) take every value of their configuration as a flag `--config.a.b=...` through
ml_collections; the tools on a finished run (`sample.py`, `nll.py`, ...) take plain options. Both refuse what they do not
know with one line that says what was got, what was expected and what to do, and leave with the exit code that `--help` lists.
A warning is one line, too.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from experiments.presets import PRESETS
from numerics import UserError
from samplers import SamplingError
from training.errors import NON_FINITE, USAGE, TrainingError

EXIT_CODES = (
    "exit codes: 0 done; 2 usage: an option, a value or a run folder that does not fit; 3 data that are missing, damaged or do "
    "not fit; 4 a value that is not finite; 5 the disk, or a checkpoint to go on from that is damaged; 130 stopped by Ctrl-C, "
    "143 by SIGTERM"
)


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Calls `main(arguments)` and leaves with its exit code; an error of the project's becomes one line on stderr."""
    name = sys.argv[0].rsplit("/", 1)[-1]
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # while the scripts were imported; see the package
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *where, **more: _say(f"{name}: warning: {message}")
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
    except TrainingError as error:
        code = _complain(name, error, error.exit_code)
    except SamplingError as error:
        code = _complain(name, error, NON_FINITE)
    except UserError as error:
        code = _complain(name, error, error.exit_code)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        code = _complain(name, error, USAGE)
    except KeyboardInterrupt:
        code = _complain(name, "interrupted", 130)
    sys.exit(code)


def _complain(name: str, error: object, code: int) -> int:
    _say(f"{name}: {error}")
    return code


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def path(text: str) -> Path:
    """A path that was named.

    Raises:
        argparse.ArgumentTypeError: for the empty one, which `Path` takes for the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path; expected a name, or . for the current folder")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, whose help shows every default, and whose paths are not empty."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, epilog=EXIT_CODES, **kwargs
        )
        self.register("type", Path, path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (try --help)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an experiment's command line asks for.

    Attributes:
        config: with its `--config.a.b=...` flags applied.
        workdir: the run folder; given: whether it was named, or is the default.
        resume, allow_change, init_from, dry_run: see `--help`.
    """

    config: ConfigDict
    workdir: Path
    given: bool
    resume: bool
    allow_change: tuple[str, ...]
    init_from: Path | None
    dry_run: bool


def parse_experiment(config: ConfigDict, arguments: list[str], description: str) -> Request:
    """What the flags ask for.

    Raises:
        UserError: for an unknown flag, a value of the wrong type, or a stray argument.
        SystemExit: after `--help`, which lists every value with its default.
    """
    if any(a in ("--help", "-h", "-help", "--helpfull") for a in arguments):
        print(_help(config, description))
        raise SystemExit(0)
    values = flags.FlagValues()
    line = ["experiment", *arguments]
    try:
        # the values' flags are made from the command line as they are defined, so an unknown one fails here
        config_flags.DEFINE_config_dict("config", config, lock_config=True, flag_values=values, sys_argv=line)
        flags.DEFINE_string("workdir", f"runs/{config.name}", "the run folder", flag_values=values)
        flags.DEFINE_boolean("resume", False, "go on from the newest checkpoint", flag_values=values)
        flags.DEFINE_list("allow_change", [], "values that may differ on --resume", flag_values=values)
        flags.DEFINE_string("init_from", None, "weights to begin with", flag_values=values)
        flags.DEFINE_boolean("dry_run", False, "every stage, briefly", flag_values=values)
        rest = values(line)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"got the unknown flag --{error.flagname}; {_near(error.flagname, config)}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_flag_error(error, arguments, config)) from error
    if rest:
        raise UserError(
            f"got the stray argument {rest[0]!r}; expected flags only: write --flag=value with an equals sign "
            "(a boolean takes =True or =False)"
        )
    for flag in ("workdir", "init_from"):
        if values[flag].value is not None and not values[flag].value.strip():
            raise UserError(f"got --{flag} without a value; expected a path, or . for the current folder")
    return Request(
        config=values.config,
        workdir=Path(values.workdir),
        given=bool(values["workdir"].present),
        resume=values.resume,
        allow_change=tuple(values.allow_change),
        init_from=None if values.init_from is None else Path(values.init_from),
        dry_run=values.dry_run,
    )


def preset(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of `--preset`, "digits" where it is not given, and the other arguments."""
    found, rest = "digits", []
    waiting = False
    for argument in arguments:
        if waiting:
            found, waiting = argument, False
        elif argument.startswith("--preset="):
            found = argument.removeprefix("--preset=")
        elif argument == "--preset":
            waiting = True
        else:
            rest.append(argument)
    if waiting:
        raise UserError("got --preset without a value; expected a name, such as --preset=fashion_mnist")
    return found, rest


def _leaves(config: ConfigDict, prefix: str = "config") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def _near(flag: str, config: ConfigDict) -> str:
    import difflib

    known = [
        "workdir",
        "resume",
        "allow_change",
        "preset",
        "init_from",
        "dry_run",
        *(name for name, _ in _leaves(config)),
    ]
    close = difflib.get_close_matches(flag, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"--{c}" for c in close) + "? (--help lists all)"
    return "--help lists all"


def _flag_error(error: Exception, arguments: list[str], config: ConfigDict) -> str:
    """The one line behind an ml_collections or absl error."""
    known = dict(_leaves(config))
    for argument in arguments:
        match = re.match(r"--(config\.[\w.]+)(?:=(.*))?$", argument, re.DOTALL)
        if match and match[1] not in known:
            return f"got the unknown flag --{match[1]}; {_near(match[1], config)}"
    for argument in reversed(arguments):
        match = re.match(r"--(config\.[\w.]+)=(.*)$", argument, re.DOTALL)
        if match and match[1] in str(error):
            wanted = type(known[match[1]]).__name__
            return f"got --{match[1]}={match[2]!r}; expected a value of type {wanted}, such as {known[match[1]]!r}"
    return f"{error} (--help lists all flags)"


def _help(config: ConfigDict, description: str) -> str:
    lines = [
        description.strip(),
        "",
        f"  --workdir={'runs/' + config.name}  the run folder",
        "  --preset=digits  whole settings by name: "
        + ", ".join(PRESETS)
        + " (the defaults below are the chosen one's)",
        "  --resume=False  go on from the run folder's newest checkpoint, or start where there is none",
        "  --allow_change=  names of values, with commas, that may differ from the run folder's on --resume",
        "  --init_from=  begin with the averaged weights of a run folder, a checkpoint's file or a pretrained folder (of",
        "      export.py), on data of the same shape; not looked at where --resume finds a checkpoint",
        "  --dry_run=False  go through every stage in seconds, in a folder that is then removed (in --workdir, where that",
        "      is given), and print what the run would take: memory, disk, time",
        "",
        "values of the configuration, with their defaults (sampling.steps, second_steps: 0 leaves them to the sampler):",
        "",
    ]
    return "\n".join([*lines, *(f"  --{name}={value}" for name, value in _leaves(config)), "", EXIT_CODES])
