"""Objects by name: what a command line, a run folder or a saved model calls them.

A program constructs classes. A configuration has sections `{name, **options}`, and a `Catalogue` makes the object of such a
section: it knows the names, the options of each (the fields of a dataclass, or the keyword arguments of a function, so there
is no second list that could drift), and which options are themselves made by name, its *parts*.

    weightings = Catalogue("weighting", {"simple": Simple, "min_snr": MinSNR})
    objectives = Catalogue("objective", {"dsm": DSM}, parts={"weighting": weightings})
    objectives.create("dsm", weighting={"name": "min_snr", "gamma": 3.0})

Each package ends in one explicit dict of names; nothing is registered by being imported.
"""

from __future__ import annotations

import collections.abc
import copy
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Generic, TypeVar

from numerics.checks import nearest
from numerics.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a named thing.

    Attributes:
        name: as a keyword.
        default: its value where it is not given, or `Option.REQUIRED`.
        annotation: its type, as written; a string where it could not be resolved.
        part: the catalogue that makes its value by name, or None for a plain value.
        help: what the docstring says of it, in one line.
    """

    name: str
    default: Any
    annotation: Any
    part: Catalogue[Any] | None = None
    help: str = ""

    REQUIRED: ClassVar[Any] = inspect.Parameter.empty


class Catalogue(Generic[T]):
    """Names, what makes each of them, and their options.

    Args:
        kind: what is made, for messages: "sampler".
        entries: name -> class or function with keyword arguments.
        parts: option name -> the catalogue that makes its value, for every entry with an option of that name. The value may
            then be an object, a name, a mapping `{name, **options}`, a tuple of these, or None or "none" for nothing. A key
            "name.option" is for the entry of that name alone, where None makes the option a plain value.
        needs: name -> the optional package without which it is not `available`.
        derived: options that a command line does not offer, since they follow from something else, such as a network's
            number of input channels. `create` takes them like all others.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, Callable[..., T]],
        *,
        parts: Mapping[str, Catalogue[Any] | None] | None = None,
        needs: Mapping[str, str] | None = None,
        derived: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.entries = kind, dict(entries)
        self.parts, self.needs, self.derived = dict(parts or {}), dict(needs or {}), derived

    def extended(self, entries: Mapping[str, Callable[..., Any]]) -> Catalogue[Any]:
        """The same catalogue with more entries, or others of the same names."""
        more = copy.copy(self)
        more.entries = {**self.entries, **entries}
        return more

    def available(self) -> tuple[str, ...]:
        """The names, but for those whose optional package is missing."""
        return tuple(n for n in self.entries if n not in self.needs or find_spec(self.needs[n]) is not None)

    def options(self, name: str) -> dict[str, Option]:
        """The options of that name, in their order.

        Raises:
            UserError: an unknown name.
        """
        entry = self._entry(name)
        texts = argument_help(entry)
        return {
            n: Option(name=n, default=default, annotation=annotation, part=self._part(name, n), help=texts.get(n, ""))
            for n, (default, annotation) in _keywords(entry).items()
        }

    def create(self, name: str, **given: Any) -> T:
        """The object of that name.

        Raises:
            UserError: an unknown name, an unknown or missing option, a missing package, or a value that is refused.
        """
        entry = self._entry(name)
        known = self.options(name)
        for option in given:
            if option not in known:
                raise UserError(
                    f"got the option {option!r} for the {self.kind} {name!r}{nearest(option, known)}; "
                    f"expected some of {', '.join(known) or 'none'}"
                )
        missing = [n for n, o in known.items() if o.default is Option.REQUIRED and n not in given]
        if missing:
            raise UserError(f"got the {self.kind} {name!r} without {', '.join(missing)}; expected a value for each")
        return entry(**{option: self._value(known[option], value) for option, value in given.items()})

    def _value(self, option: Option, value: Any) -> Any:
        if option.part is not None:
            return option.part.make(value)
        kinds = _plain_types(option.annotation)
        if kinds is None or not isinstance(value, _PLAIN):
            return value
        if isinstance(value, list) and tuple in kinds:
            value = tuple(value)
        if type(value) in kinds or (type(value) is int and float in kinds):
            return value
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"got {option.name}={value!r}; expected a value of type {expected}")

    def make(self, value: Any) -> Any:
        """The object that `value` stands for: itself, or made from a name or a mapping `{name, **options}`.

        Raises:
            UserError: as in `create`.
        """
        if isinstance(value, (tuple, list)):
            return tuple(self.make(v) for v in value)
        if isinstance(value, str):
            return None if value == "none" and "none" not in self.entries else self.create(value)
        if isinstance(value, Mapping):
            given = dict(value)
            if "name" not in given:
                raise UserError(f"got a {self.kind} without a name; expected one of {', '.join(self.available())}")
            name = given.pop("name")
            return None if name == "none" and "none" not in self.entries else self.create(name, **given)
        return value

    def describe(self, value: object) -> dict[str, Any]:
        """`{name, **options}` with which `create` makes `value` again, in plain types, its parts likewise.

        Raises:
            UserError: an object of a class that has no name here.
        """
        for name, entry in self.entries.items():
            if type(value) is entry and is_dataclass(entry):
                options = {f.name: getattr(value, f.name) for f in fields(entry) if f.init}
                return {"name": name, **{n: self._described(name, n, v) for n, v in options.items()}}
        raise UserError(
            f"got a {self.kind} of class {type(value).__name__}, which has no name; expected one of "
            f"{', '.join(self.entries)}: keep the program that makes it instead"
        )

    def _part(self, name: str, option: str) -> Catalogue[Any] | None:
        return self.parts.get(f"{name}.{option}", self.parts.get(option))

    def _described(self, name: str, option: str, value: Any) -> Any:
        part = self._part(name, option)
        if part is None or value is None:
            return value
        return tuple(map(part.describe, value)) if isinstance(value, tuple) else part.describe(value)

    def _entry(self, name: str) -> Callable[..., T]:
        if name in self.entries and name not in self.available():
            raise UserError(f"got the {self.kind} {name!r}, which needs the package {self.needs[name]}: install it")
        if not isinstance(name, str) or name not in self.entries:
            raise UserError(
                f"got the {self.kind} {name!r}{nearest(str(name), self.entries)}; expected one of "
                f"{', '.join(self.available())}"
            )
        return self.entries[name]


def argument_help(entry: Callable[..., Any]) -> dict[str, str]:
    """A line for every argument that a docstring names under "Args:" or "Attributes:"; a class has those of its bases too.

    "as in `Other`" stands for what the docstring of `Other`, a name of the same module, says of that argument.
    """
    target: Any = entry.func if isinstance(entry, functools.partial) else entry
    found: dict[str, str] = {}
    for source in reversed(target.__mro__) if isinstance(target, type) else (target,):
        block = re.split(
            r"^(?:Args|Attributes):\n", inspect.cleandoc(source.__doc__ or ""), maxsplit=1, flags=re.MULTILINE
        )
        for m in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", block[-1].partition("\n\n")[0], re.MULTILINE):
            if len(block) == 2:
                text = " ".join(m[2].split()).removesuffix(".")
                found.update({name: _referred(source, name, text) for name in m[1].split(", ")})
    return found


def _referred(source: Any, name: str, text: str) -> str:
    """The text, with what `Other` says of the argument in place of "as in `Other`"."""
    match = re.match(r"as in (?:every )?`(\w+)`", text)
    other = None if match is None else getattr(sys.modules.get(source.__module__), match[1], None)
    said = None if other is None else argument_help(other).get(name)
    return text if match is None or said is None else said + text[match.end() :]


_PLAIN = (bool, int, float, str, tuple, list, type(None))


def _plain_types(annotation: Any) -> tuple[type, ...] | None:
    """The plain types that an annotation admits; None where it admits anything else, or is not known."""
    if annotation is None:
        return (type(None),)
    if annotation in (bool, int, float, str, tuple, type(None)):
        return (annotation,)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return tuple({type(v) for v in typing.get_args(annotation)})
    if origin in (tuple, collections.abc.Sequence):
        return (tuple,)
    if origin is typing.Union or isinstance(annotation, types.UnionType):
        parts = [_plain_types(a) for a in typing.get_args(annotation)]
        return None if any(p is None for p in parts) else tuple(dict.fromkeys(k for p in parts for k in p or ()))
    return None


def _keywords(entry: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Default and type of every argument that can be given by its name."""
    if isinstance(entry, functools.partial):
        inner = _keywords(entry.func)
        return {n: (entry.keywords.get(n, default), kind) for n, (default, kind) in inner.items()}
    # a dataclass's fields may come from classes of other modules, whose names they use
    target = entry.__init__ if isinstance(entry, type) and not is_dataclass(entry) else entry  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(target)
    except NameError:  # a name that is imported for type checkers alone
        hints = {}
    factories = (
        {f.name: f.default_factory for f in fields(entry) if f.default_factory is not MISSING}
        if is_dataclass(entry)
        else {}
    )
    found = {}
    for p in inspect.signature(entry).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            continue
        default = factories[p.name]() if p.name in factories else p.default
        found[p.name] = (default, hints.get(p.name, p.annotation))
    return found
