"""A model in a folder: weights as safetensors, everything else as a JSON card.

`card.json` says how to make the model again (network, SDE, parametrisation, conditioning: names and options),
what its data look like, and what is known about it (training protocol, results). The card carries the
weights' SHA-256: safetensors loads a flipped bit without a word. The card is written last, so a folder with a
card is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import sde_lib
from models import networks
from models.conditioning import CONDITIONINGS
from models.parametrization import PARAMETRIZATIONS
from models.score_model import ScoreModel
from numerics import UserError

FORMAT = 1
WEIGHTS, CARD = "model.safetensors", "card.json"
_RESERVED = (
    "format",
    "network",
    "sde",
    "parametrization",
    "conditioning",
    "data_range",
    "data_std",
    "sha256",
    "learned_without_class",
)
_TYPES = {
    "network": dict,
    "sde": dict,
    "parametrization": dict,
    "conditioning": dict,
    "data_range": list,
    "sha256": str,
}


def save_pretrained(
    model: ScoreModel, folder: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None
) -> None:
    """Write `model` into `folder` (made if absent, its two files replaced).

    `card`: what else to say, in plain types, e.g. `{"training": {…}, "results": {…}}`; by default what the
    model carries.

    Raises:
        UserError: for a network, SDE, parametrisation or conditioning that has no name, or a reserved key in
            `card`.
    """
    from safetensors.torch import save

    extra = dict(model.card if card is None else card)
    if clash := sorted(set(extra) & set(_RESERVED)):
        raise UserError(f"got the key {clash[0]!r} in card; expected other names, since the model itself fills it in")
    weights = save({name: tensor.contiguous() for name, tensor in model.net.state_dict().items()})
    text = json.dumps(
        {
            "format": FORMAT,
            "network": networks.describe(model.net),
            "sde": sde_lib.describe(model.sde),
            "parametrization": PARAMETRIZATIONS.describe(model.parametrization),
            "conditioning": CONDITIONINGS.describe(model.conditioning),
            "data_range": model.data_range,
            "data_std": model.data_std,
            "sha256": hashlib.sha256(weights).hexdigest(),
            **({} if model.learned_without_class is None else {"learned_without_class": model.learned_without_class}),
            **extra,
        },
        indent=2,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, weights)
    _replace(folder / CARD, text.encode())


def from_pretrained(folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> ScoreModel:
    """The model in `folder`, in eval mode, its parameters as saved. `model.card` holds what else the card
    says.

    Raises:
        UserError: where the folder is incomplete, the weights are not the card's, or the card names
            something unknown.
    """
    from safetensors.torch import load

    folder = Path(folder)
    for name in (WEIGHTS, CARD):
        if not (folder / name).is_file():
            raise UserError(
                f"got {folder}, which holds no {name}; expected a folder written by ScoreModel.save_pretrained"
            )
    card = _read_card(folder / CARD)
    data = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise UserError(f"got {folder / WEIGHTS} with another SHA-256; expected the one in {CARD}: copy it again")
    net = networks.create(card["network"]["name"], **card["network"]["options"])
    model = ScoreModel(
        net,
        sde_lib.create(**card["sde"]),
        PARAMETRIZATIONS.make(card["parametrization"]),
        conditioning=CONDITIONINGS.make(card["conditioning"]),
        data_std=card["data_std"],
        data_range=tuple(card["data_range"]),
    )
    state = load(data)
    dtype = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    try:
        net.to(dtype).load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{folder / WEIGHTS} does not fit the network of {CARD}: {' '.join(str(error).split())}"
        ) from error
    model.learned_without_class = card.get("learned_without_class")
    model.card = {key: value for key, value in card.items() if key not in _RESERVED}
    return model.to(device).eval()


def _read_card(path: Path) -> dict[str, Any]:
    """The card, its own entries there and of their types."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or no JSON
        raise UserError(f"got {path}, which is not JSON ({error}); expected a model card") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        got = card.get("format") if isinstance(card, dict) else None
        raise UserError(f"got format {got!r} in {path}; expected {FORMAT}: it was written by another version")
    for key, kind in _TYPES.items():
        if not isinstance(card.get(key), kind):
            raise UserError(f"got {key}={card.get(key)!r} in {path}; expected {kind.__name__}: copy the card again")
    network, limits, std = card["network"], card["data_range"], card.get("data_std", 0)
    if "name" not in card["sde"]:
        raise UserError(f"got sde={card['sde']!r} in {path}; expected its name and its options: copy the card again")
    if not isinstance(network.get("name"), str) or not isinstance(network.get("options"), dict):
        raise UserError(f"got network={network!r} in {path}; expected its name and its options: copy the card again")
    if len(limits) != 2 or not all(isinstance(v, int | float) for v in limits):
        raise UserError(f"got data_range={limits!r} in {path}; expected two numbers: copy the card again")
    if not isinstance(card.get("learned_without_class"), bool | None):
        got = card["learned_without_class"]
        raise UserError(f"got learned_without_class={got!r} in {path}; expected true or false: copy the card again")
    if "data_std" not in card or not isinstance(std, int | float | None):
        raise UserError(f"got data_std={std!r} in {path}; expected a number or null: copy the card again")
    return card


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
