"""Captioned glyphs: letters and digits in the typefaces that come with matplotlib, 16x16 pixels, 256 grey levels.

Three families have all four of regular, bold, italic and bold italic: DejaVu Sans ("sans"), DejaVu Serif ("serif") and STIX
General ("stix"). Each picture is one of 36 characters in one of these 12 faces, at a random size, place and rotation, and its
class is the combination; the class's name is its caption, such as "bold italic serif 3" or "sans Q".

Some combinations are held out: their characters and faces are in the training data, but never together. They are the split
"combinations"; the split "test" has new pictures of the combinations that are trained on.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset, Split, check_count
from data.errors import DataError

__all__ = ["CHARACTERS", "FAMILIES", "attributes", "captions", "glyphs"]

FAMILIES = {
    "sans": ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    "stix": ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta"),
}
"""The families, each with its files for regular, italic, bold, bold italic."""
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

_SIDE, _FINER = 16, 4  # pixels; how much finer the glyph is drawn before pixels are averaged
_SHAPE = (len(FAMILIES), 2, 2, len(CHARACTERS))


def captions() -> tuple[str, ...]:
    """The caption of every class, `(432,)`: class ((family * 2 + bold) * 2 + italic) * 36 + character."""
    return tuple(
        f"{'bold ' if bold else ''}{'italic ' if italic else ''}{family} {character}"
        for family in FAMILIES
        for bold in (False, True)
        for italic in (False, True)
        for character in CHARACTERS
    )


def attributes(labels: Tensor) -> dict[str, Tensor]:
    """What classes `(N,)` are made of, each `(N,)` integers: family, bold, italic, character."""
    found, rest = {}, labels
    for name, count in zip(("character", "italic", "bold", "family"), reversed(_SHAPE), strict=True):
        found[name], rest = rest % count, rest // count
    return found


def glyphs(
    *, per_combination: int = 20, tests: int = 2, held_out: int = 43, validation: int = 200, seed: int = 0
) -> Dataset:
    """The glyphs, drawn anew in a few seconds.

    Args:
        per_combination: training pictures of each combination that is trained on.
        tests: test pictures of each of these, and pictures of each held-out combination.
        held_out: combinations, of 432, that are not trained on.
        validation: how many training pictures are set aside for choosing settings.
        seed: of the choice of combinations and of sizes, places and rotations.

    Raises:
        DataError: matplotlib or one of its typefaces is missing; numbers out of their range.
    """
    names = captions()
    check_count("per_combination", per_combination, 1, 10_000)
    check_count("tests", tests, 1, 10_000)
    check_count("held_out", held_out, 1, len(names) // 2)
    random = np.random.default_rng(seed)
    unseen = np.sort(random.permutation(len(names))[:held_out])
    seen = np.setdiff1d(np.arange(len(names)), unseen)
    wanted = {
        "train": np.repeat(seen, per_combination),
        "test": np.repeat(seen, tests),
        "combinations": np.repeat(unseen, tests),
    }
    splits, first = {}, 0
    for name, labels in wanted.items():
        labels = random.permutation(labels)  # whoever takes the first of them takes some of all
        pictures = np.stack([_draw(int(label), random) for label in labels])
        ids = torch.arange(first, first + len(labels))
        splits[name] = Split(torch.from_numpy(pictures).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), ids)
        first += len(labels)
    return Dataset(name="glyphs", splits=splits, levels=256, classes=names, validation=validation, seed=seed)


def _draw(label: int, random: np.random.Generator) -> np.ndarray:
    """One picture `(16, 16)`, uint8, white on black."""
    from PIL import Image, ImageDraw

    part = {name: int(value) for name, value in attributes(torch.tensor([label])).items()}
    face = tuple(FAMILIES.values())[part["family"]][2 * part["bold"] + part["italic"]]
    font = _font(face, int(round(_FINER * random.uniform(11, 14))))
    side = _FINER * _SIDE
    x, y = side / 2 + _FINER * random.uniform(-1.25, 1.25, size=2)
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((x, y), CHARACTERS[part["character"]], fill=255, font=font, anchor="mm")
    turned = picture.rotate(random.uniform(-8, 8), resample=Image.Resampling.BILINEAR)
    return np.asarray(turned.resize((_SIDE, _SIDE), Image.Resampling.BOX))


@lru_cache(maxsize=512)
def _font(face: str, size: int) -> Any:
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError as error:
        raise DataError(
            "the glyphs' typefaces come with matplotlib, which is not installed; pip install matplotlib"
        ) from error
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}; expected a typeface of matplotlib's") from error
