"""Released checkpoints of score_sde_pytorch, ncsnv2 and ncsn, as `ScoreModel`s.

What a file holds says which of them wrote it; `models.score_sde_checkpoint` and `models.ncsnv2_checkpoint` know their
configurations and names. Everything is checked: a config's switches, the name and shape of every tensor. Nothing in the file is
executed (`models.checkpoint_reader`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoint_reader import CheckpointError, read_checkpoint
from models.checkpoint_translation import Config, fill
from models.ncsnv2_checkpoint import keeps_averages, ncsnv2_model, ncsnv2_state, translate_refinenet
from models.score_model import ScoreModel
from models.score_sde_checkpoint import score_sde_model, score_sde_state, translate_ncsnpp
from numerics import UserError, require_choice


def load_score_sde(
    checkpoint: str | os.PathLike[str], config: Config | str | os.PathLike[str], weights: str = "ema"
) -> ScoreModel:
    """The model in a checkpoint of score_sde_pytorch (networks `ncsnpp`, `ddpm`), of ncsnv2 (`NCSN`,
    `NCSNv2` and deeper ones) or of ncsn (`CondRefineNetDilated`).

    Args:
        checkpoint: the `.pth` file.
        config: the values it was trained with, under that code's names (`{"model": {…}, "data": {…},
            "training": {…}}`), or a JSON file that holds them.
        weights: `"ema"`, the averaged weights, or `"raw"`. Runs that kept no averages (all of ncsn, and of ncsnv2 with
            config.model.ema False) have only raw ones, which then come with either; `model.card` says which came.

    Returns:
        A `ScoreModel` in eval mode, with the SDE, parametrisation, time conditioning and data range of that
        config. Discrete variance-preserving models get the SDE through their own table of betas
        (`TableVPSDE`).

    Raises:
        CheckpointError: a `ValueError`, where the file is unreadable or unsafe, or its tensors do not fit the
            config's network; it lists every missing, unexpected and misshapen tensor.
        UserError: for a config with a missing key, an unknown switch, or an unsupported value.
    """
    require_choice(weights, "weights", ("ema", "raw"))
    config = _read_config(config)
    content = read_checkpoint(checkpoint)
    if isinstance(content, dict) and {"model", "ema"} <= set(content):
        model = score_sde_model(config)
        state = score_sde_state(content, weights)
        table = list(translate_ncsnpp(model.net))  # type: ignore[arg-type]
    elif isinstance(content, list) and len(content) in (2, 4, 5) and isinstance(content[0], dict):
        averaged = keeps_averages(config, content)
        state = ncsnv2_state(content, weights, checkpoint, averaged=averaged)
        weights = weights if averaged else "raw"
        model = ncsnv2_model(config, state)
        table = list(translate_refinenet(model.net))  # type: ignore[arg-type]
    else:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{checkpoint}: got {keys}; expected score_sde's {{model, ema, optimizer, step}}, ncsnv2's list "
            f"[model, optimizer, epoch, step, ema] or ncsn's [model, optimizer]"
        )
    fill(model.net, state, table, str(checkpoint))
    model.card = {"source": {"weights": weights, "step": _step(content)}}
    return model.eval()


def _step(content: Any) -> int | None:
    """Updates done; ncsn does not say."""
    if isinstance(content, dict):
        return int(content["step"])
    return int(content[3]) if len(content) > 3 else None


def _read_config(config: Config | str | os.PathLike[str]) -> Config:
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        if not path.is_file():
            raise UserError(f"got {path}, which does not exist; expected a JSON file with the checkpoint's config")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(
                f"got {path}, which is not JSON ({error}); expected the checkpoint's config as JSON"
            ) from error
    else:
        values = config
    if not isinstance(values, Mapping) or "model" not in values or "data" not in values:
        raise UserError(f"got a config with the sections {sorted(values)}; expected at least 'model' and 'data'")
    return values
