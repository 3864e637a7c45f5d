"""DDPM as it was (Ho et al. 2020, arXiv:2006.11239), and the same network as a VP score.

python experiments/ddpm.py [--workdir=runs/ddpm] [--resume] [--config.training.steps=...] [--help]

Trains L_simple on a chain of 1,000 betas; samples by the chain's own ancestral steps, and in 20 steps of an ODE solver through
the SDE view; scores by the chain's variational bound, and by the exact likelihood of the SDE's flow. In results.json the flow's
number is `bits_per_dim`, the bound's are `vlb`: see experiments/chain_bound.py for its two readings.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from experiments import chain_bound, command_line, experiment
from experiments.defaults import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.name = "ddpm"
    config.sde = ConfigDict({"name": "ddpm", "steps": 1000, "beta_first": 1e-4, "beta_last": 0.02})
    # the network predicts the noise from x itself. Its label stays the log-SNR, not the index: the flow asks between rows
    config.model.parametrization = "noise"
    # The learning rate and the EMA stay those of a run of minutes: the paper's 2e-4 and 0.9999 are for 800,000 steps.
    # dequantize: the paper trained on grey values as they are. With 17 levels, 12 sigma_1 apart, a network that has done so
    # knows nothing between them, where the flow's likelihood asks. False trains as in the paper, for the bound alone
    config.training.dequantize = True
    for name in ("weighting", "times", "log_normal_mean", "log_normal_std"):
        del config.training[name]  # L_simple has none of them
    # all transitions of the chain; variance: "posterior" (beta~) or "transition" (beta), section 3.2
    config.sampling.update({"sampler": "ancestral", "steps": 999, "variance": "posterior"})
    config.likelihood.bound_draws = 64  # of step and noise, an image
    return config


def main(arguments: list[str]) -> int:
    return experiment.main(get_config, arguments, __doc__ or "", then=chain_bound.plan)


if __name__ == "__main__":
    command_line.run(main)
