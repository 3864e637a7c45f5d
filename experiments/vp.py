"""VP, the continuous limit of DDPM (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim.

python experiments/vp.py [--workdir=runs/vp] [--resume] [--preset=fashion_mnist] [--config.training.steps=...] [--help]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from experiments import command_line, experiment
from experiments.defaults import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "vp"
    config.sde = ConfigDict({"name": "vp", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, "t_end": 1e-3})
    return config


def main(arguments: list[str]) -> int:
    return experiment.main(get_config, arguments, __doc__ or "")


if __name__ == "__main__":
    command_line.run(main)
