"""Sections of a configuration: `{name, **options}`, made from the catalogues of the packages.

A section shows every option of the class that it names, with its default, so that each can be set from a command line without
a list kept by hand. Naming another class gives the section that class's options. Options that follow from the data are not
shown (the catalogues' `derived`), and those in `FROM_DATA` are shown as None, which stands for what is measured.

The configuration that users see is an `ml_collections.ConfigDict`. Of options that may have values of several types, such as
`float | None`, it keeps a reference of type `object`, whose text on a command line is read as a Python literal.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from numerics import Catalogue, Option, UserError, nearest

FROM_DATA = ("data_std", "embedding")
"""Options whose None is filled in when the configuration is resolved: the standard deviation of the training data in model
units, and the embedding of the noise level that goes with the network's conditioning."""

_PLAIN = (bool, int, float, str, tuple, type(None))


def section(catalogue: Catalogue[Any], name: str, /, **changes: Any) -> ConfigDict:
    """The section of that name with all its options, some of them changed.

    Raises:
        UserError: for an unknown name, or a change of an option that it does not have.
    """
    shown = ConfigDict({"name": name})
    for option in catalogue.options(name).values():
        if option.name not in catalogue.derived:
            _show(shown, option)
    for key, value in changes.items():
        set_value(shown, key, value, catalogue)
    return shown


def _show(shown: ConfigDict, option: Option) -> None:
    default = None if option.default is Option.REQUIRED or option.name in FROM_DATA else option.default
    if option.part is not None and not isinstance(default, tuple):
        described = {"name": "none"} if default is None else option.part.describe(default)
        inner = {k: v for k, v in described.items() if k not in option.part.derived}
        shown[option.name] = (
            ConfigDict({"name": "none"})
            if described["name"] == "none"
            else section(option.part, inner.pop("name"), **inner)
        )
    elif isinstance(default, _PLAIN) and not (isinstance(default, tuple) and default and option.part is not None):
        shown[option.name] = default if _one_type(option, default) else FieldReference(default, field_type=object)


def _one_type(option: Option, default: Any) -> bool:
    """Whether values of the option are all of the default's type."""
    if default is None:
        return False
    kind = option.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return False
    if typing.get_origin(kind) is typing.Literal:
        return {type(v) for v in typing.get_args(kind)} == {type(default)}
    return True


def is_section(value: Any) -> bool:
    """Whether `value` is a section: a group of values with a name."""
    return isinstance(value, ConfigDict) and "name" in value


def set_value(group: ConfigDict, path: str, value: Any, catalogue: Catalogue[Any] | None) -> None:
    """Sets the value at the dotted `path` of `group`, whose sections are described by `catalogue`; the value of a section is a
    name or a mapping `{name, **options}`.

    Raises:
        UserError: where there is no such value.
    """
    key, _, rest = path.partition(".")
    if key == "name" and catalogue is not None and not rest:
        _rename(group, value, catalogue)
        return
    if key not in group:
        known = [k for k in group if k != "name"]
        whose = f"{catalogue.kind} {group.name!r}" if catalogue is not None else "configuration"
        raise UserError(
            f"got the option {key!r} for the {whose}{nearest(key, known)}; expected some of {', '.join(known)}"
        )
    part = None if catalogue is None else catalogue.parts.get(key)
    if rest:
        if not isinstance(group[key], ConfigDict):
            raise UserError(f"got {path!r}; expected {key!r}, which is one value")
        set_value(group[key], rest, value, part)
    elif is_section(group[key]) and part is not None:
        given = dict(value) if isinstance(value, Mapping) else {"name": "none" if value is None else value}
        _rename(group[key], given.pop("name", group[key].name), part)
        for name, inner in given.items():
            set_value(group[key], name, inner, part)
    else:
        group[key] = value


def _rename(group: ConfigDict, name: Any, catalogue: Catalogue[Any]) -> None:
    """Makes `group` the section of another name. What was chosen stays, where the other has it too: what differed from the old
    name's default, and what is no option of the class."""
    if name == group.name:
        return
    old = ConfigDict({"name": "none"}) if group.name == "none" else section(catalogue, group.name)
    new = (
        ConfigDict({"name": "none"}) if name == "none" and "none" not in catalogue.entries else section(catalogue, name)
    )
    chosen = {}
    for key in list(group):
        if key == "name":
            continue
        if key not in old:
            continue  # no option of the class: stays in its place
        if key in new and not isinstance(group[key], ConfigDict) and group[key] != old[key]:
            chosen[key] = group[key]
        del group[key]
    with group.unlocked():
        group.name = name
        for key in new:
            if key != "name":
                group[key] = new.get_ref(key) if not isinstance(new[key], ConfigDict) else new[key]
        for key, value in chosen.items():
            group[key] = value


def leaves(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values with their dotted paths, in order."""
    for key, value in group.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, (ConfigDict, Mapping)):
            yield from leaves(value, path)
        else:
            yield path, value


def names_first(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The values in an order in which they can be set: names before options, outer sections before inner ones."""
    return sorted(values.items(), key=lambda item: (not item[0].endswith(".name"), item[0].count(".")))


def fields_section(kind: type, /, *, leave: tuple[str, ...] = (), **changes: Any) -> ConfigDict:
    """The fields of a dataclass with their defaults, some of them changed; those in `leave` left out, and required ones
    given by `changes`.

    Raises:
        UserError: for a change of a field that it does not have.
    """
    catalogue = Catalogue(kind.__name__, {kind.__name__: kind}, derived=leave)
    shown = section(catalogue, kind.__name__)
    del shown["name"]
    for key, value in changes.items():
        if key not in shown:
            raise UserError(
                f"got the option {key!r} for {kind.__name__}{nearest(key, shown)}; expected one of its fields"
            )
        shown[key] = value
    return shown
