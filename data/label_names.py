"""Labels that are names: numbers and classes from them.

Classes are the names of the training data in alphabetical order, so that they do not hang on the order of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import DataError


def are_names(labels: Any) -> bool:
    """Is it an array of strings, or a list that begins with one?"""
    if isinstance(labels, np.ndarray):
        return labels.dtype.kind in "US"
    return isinstance(labels, (list, tuple)) and bool(labels) and isinstance(labels[0], (str, bytes))


def numbered(labels: Mapping[str, Any], classes: Sequence[str], name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Labels by part ("train", "test" ...) with names as their places among the classes, and the classes.

    Labels that are numbers stay as they are.

    Args:
        labels: of each part: numbers or names `(N,)` or `(N, 1)`, or None.
        classes: their names, where they are known.
        name: of the data set, for messages.

    Raises:
        DataError: names in some parts and numbers in others, a name that is none of the classes, or bytes that are no text.
    """
    given = {part: values for part, values in labels.items() if values is not None}
    if not any(are_names(values) for values in given.values()):
        return dict(labels), tuple(classes)
    texts = {}
    for part, values in given.items():
        if not are_names(values):
            raise DataError(
                f"{name}: got labels of {part} that are no names, beside others that are; expected one kind"
            )
        array = np.asarray(values)
        if array.ndim == 0 or array.size != len(array):
            raise DataError(f"{name}: got labels of shape {array.shape}; expected one name a sample")
        try:
            listed = array.reshape(-1).tolist()
        except (ValueError, SystemError) as error:  # a file may hold numbers that are no characters
            raise DataError(f"{name}: got labels of {part} that are no text ({error}); expected names") from error
        texts[part] = [_text(value, name) for value in listed]
    known = tuple(classes) or tuple(sorted(set(texts["train"])))
    place = {text: k for k, text in enumerate(known)}
    found: dict[str, Any] = dict(labels)
    for part, values in texts.items():
        strange = next((text for text in values if text not in place), None)
        if strange is not None:
            some = ", ".join(known[:10]) + (" ..." if len(known) > 10 else "")
            raise DataError(
                f"{name}: got the label {strange!r} in {part}; expected one of the {len(known)} classes {some}"
            )
        found[part] = np.array([place[text] for text in values], dtype=np.int64)
    return found, known


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value, "utf-8")
    except (UnicodeDecodeError, TypeError) as error:
        raise DataError(f"{name}: got the label {value!r}; expected text") from error
