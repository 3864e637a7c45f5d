"""Score models: networks, what their outputs mean, and how they are told the time.

net = models.UNet(in_channels=1, image_size=8)                        # or MLP, NCSNpp, ADM, DiT, NCSNv2, presets.create(…)
model = models.ScoreModel(net, VPSDE(), models.Preconditioned(data_std=0.5))
score = model(x, t)                                                   # also .noise, .denoised, .velocity, .output
model.condition(labels); model.under(other_sde)                       # scores, too
model.save_pretrained(folder); models.ScoreModel.from_pretrained(folder)
models.load_score_sde("checkpoint_24.pth", "config.json")             # released checkpoints, safely
"""

from __future__ import annotations

from models import presets
from models.adm import ADM
from models.captioned_unet import CaptionedUNet
from models.captions import CaptionEncoder
from models.checkpoint_reader import CheckpointError
from models.classifier_energy import ClassifierEnergy, energy_of
from models.conditioning import CONDITIONINGS, Conditioning, ContinuousTime, DiscreteIndex, LogSigma, LogSNR, Sigma
from models.ddgm import DDGM
from models.diffusers import from_diffusers
from models.dit import DiT
from models.energy import EnergyModel
from models.learned_forward import LearnedForward, PixelEncoder
from models.mlp import MLP
from models.ncsnpp import NCSNpp
from models.network import Network, parameter_count
from models.networks import NETWORKS, available, create, for_data, needed_conditioning, options
from models.noise_classifier import NoiseClassifier
from models.parametrization import (
    DATA,
    DIFFERENCE,
    NOISE,
    PARAMETRIZATIONS,
    SCORE,
    VELOCITY,
    Data,
    Difference,
    Noise,
    Parametrization,
    Preconditioned,
    ScoreOutput,
    Velocity,
)
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.schedule import FixedSchedule, MonotoneSchedule
from models.score_model import ConditionedScore, ScoreModel
from models.score_sde import load_score_sde
from models.under import UnderAnotherSDE
from models.unet import UNet
from models.unet_1d import UNet1d
from models.vae import VAE, MixturePrior, ScorePrior, StandardPrior
from models.vdm import VDM

__all__ = [
    "CONDITIONINGS",
    "DATA",
    "DIFFERENCE",
    "NETWORKS",
    "PARAMETRIZATIONS",
    "for_data",
    "needed_conditioning",
    "options",
    "MLP",
    "NOISE",
    "SCORE",
    "VELOCITY",
    "CaptionEncoder",
    "CaptionedUNet",
    "ConditionedScore",
    "Conditioning",
    "ContinuousTime",
    "Data",
    "Difference",
    "DiscreteIndex",
    "LogSNR",
    "LogSigma",
    "NCSNpp",
    "Network",
    "Noise",
    "NoiseClassifier",
    "Parametrization",
    "Preconditioned",
    "ScoreModel",
    "ScoreOutput",
    "Sigma",
    "UNet",
    "UNet1d",
    "Velocity",
    "available",
    "create",
    "parameter_count",
    "ADM",
    "CheckpointError",
    "from_diffusers",
    "DiT",
    "ClassifierEnergy",
    "EnergyModel",
    "energy_of",
    "NCSN",
    "NCSNv2",
    "RefineNet",
    "load_score_sde",
    "UnderAnotherSDE",
    "presets",
    "DDGM",
    "LearnedForward",
    "PixelEncoder",
    "FixedSchedule",
    "MonotoneSchedule",
    "VAE",
    "MixturePrior",
    "ScorePrior",
    "StandardPrior",
    "VDM",
]
