"""Options that several tools share, and options made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import ast
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import samplers
from numerics import UserError, argument_help
from samplers import Sampler
from workflow import progress, tuned
from workflow.command_line import Parser
from workflow.flow_only import fitting
from workflow.trained_run import TrainedRun


def parser(description: str) -> Parser:
    """A parser with the options that every tool on a run has."""
    made = Parser(description=description)
    made.add_argument("--run", required=True, type=Path, help="the run folder, or a folder that export.py wrote")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add_quiet(made)
    return made


def add_quiet(made: Parser) -> None:
    """Adds --quiet."""
    made.add_argument(
        "--quiet",
        action="store_true",
        help="print only results, warnings and errors, without progress bars",
    )


def parsed(made: Parser, arguments: list[str]) -> argparse.Namespace:
    """The options, with bars and words silenced where that is asked for.

    Raises:
        UserError: an option or a value that does not fit.
    """
    args = made.parse_args(arguments)
    progress.silence(args.quiet)
    return args


def add_sampler(made: Parser, default: str = "dpm_solver") -> None:
    """Adds --sampler, --steps and --option."""
    made.add_argument(
        "--sampler",
        default=default,
        help="the sampler: "
        + ", ".join(samplers.available())
        + f"; {tuned.NAME}: what tune.py has left in the run folder; {OWN}: the run's own, also of a system without a score",
    )
    made.add_argument(
        "--steps", default=None, type=whole_or_none, help="number of steps of the sampler; None: its default"
    )
    made.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the sampler, such as corrector=none or grid.rho=3; may be repeated; see samplers.options(NAME)",
    )


OWN = "own"
"""The run's own sampler: the first of a score's configuration, or what a system without a score draws by."""


def sampler_of(args: argparse.Namespace) -> Callable[[TrainedRun], Sampler | None]:
    """The sampler that the options name, for a run: only a tuned one and the run's own depend on it. None for the own way of a
    system without a score.

    Raises:
        UserError: an unknown sampler or option, or one given twice; from what is returned, nothing that was tuned to the run.
    """
    options: dict[str, Any] = {}
    given: list[str] = []
    for text in args.option:
        name, value = option(text)
        if name in given:
            raise UserError(f"got --option {name} twice; expected it once")
        given.append(name)
        put(options, name, value)
    if args.steps is not None and "steps" in options:
        raise UserError(f"got --steps {args.steps} and --option steps={options['steps']}; expected one of them")
    if args.sampler == tuned.NAME:
        if options:
            raise UserError(
                f"got --option {next(iter(options))}=... for --sampler {tuned.NAME}; expected none: its options are fitted"
            )
        steps = args.steps
        return lambda run: fitting(tuned.tuned_sampler(run, steps), run.setup.objective)
    if args.sampler == OWN:
        if options or args.steps is not None:
            raise UserError(
                f"got --steps or --option for --sampler {OWN}; expected none: its options are the run's configuration"
            )
        return lambda run: next(iter(run.setup.samplers.values()), None)
    if args.steps is not None:
        options["steps"] = args.steps
    made = samplers.create(args.sampler, **options)
    return lambda run: fitting(made, run.setup.objective)


def option(text: str) -> tuple[str, Any]:
    """Name and value of an `--option NAME=VALUE`; what is no Python literal is text, and none is None.

    Raises:
        UserError: where there is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"got --option {text!r}; expected NAME=VALUE")
    return name, literal(value)


def literal(text: str) -> Any:
    """A Python literal, or the text itself; `none` in any case is None."""
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def put(options: dict[str, Any], path: str, value: Any) -> None:
    """Sets a dotted option: `grid.rho` of `grid="karras"` gives `grid={"name": "karras", "rho": value}`.

    Raises:
        UserError: an option of a part that was not named before.
    """
    name, dot, rest = path.partition(".")
    if not dot:
        options[name] = value
        return
    part = options.get(name)
    if isinstance(part, str):
        part = options[name] = {"name": part}
    if not isinstance(part, dict):
        raise UserError(f"got the option {path} before {name}; expected {name}=NAME first, then options of it")
    put(part, rest, value)


def add_fields(made: Parser, kind: type, *, leave: tuple[str, ...] = ()) -> None:
    """Adds an option for every field of a dataclass, with its default and its help."""
    texts, hints = argument_help(kind), typing.get_type_hints(kind)
    for p in inspect.signature(kind).parameters.values():
        if p.name not in leave:
            made.add_argument(f"--{p.name}", default=p.default, type=_reader(hints[p.name]), help=texts.get(p.name, ""))


def integer(least: int) -> Callable[[str], int]:
    """What reads an integer of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected an integer >= {least}")
        return value

    return read


def integers(least: int) -> Callable[[str], tuple[int, ...]]:
    """What reads different integers of at least `least`, separated by commas."""
    one = integer(least)

    def read(text: str) -> tuple[int, ...]:
        try:
            values = tuple(map(one, text.split(",")))
        except argparse.ArgumentTypeError:
            values = ()
        if not values or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(
                f"got {text!r}; expected different integers >= {least} separated by commas, such as {least + 3},{least + 8}"
            )
        return values

    return read


def whole_or_none(text: str) -> int | None:
    """Reads an integer, or none in any case."""
    return None if text.lower() == "none" else int(text)


whole_or_none.__name__ = "int"  # what argparse calls it in a complaint


def add_label(made: Parser, help_text: str = "class to draw or score, for a class-conditional run; None: any") -> None:
    """Adds --label."""
    made.add_argument("--label", default=None, type=whole_or_none, help=help_text)


def _reader(hint: Any) -> Callable[[str], Any]:
    """What reads a field's text: its type, or a literal where there are several."""
    if isinstance(hint, types.UnionType):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]

        def read(text: str) -> Any:
            return None if text.lower() == "none" else kinds[0](text)

        read.__name__ = kinds[0].__name__
        return read
    if hint is bool:
        return _flag
    return hint if hint in (int, float, str) else literal


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected True or False")
    return values[text.lower()]
