"""The systems, each in one file: its configuration and its object."""

from __future__ import annotations

from numerics import Catalogue
from workflow.system import System
from workflow.systems.classes import Classes
from workflow.systems.cnf import CNF
from workflow.systems.ddgm import DiffusionDGM
from workflow.systems.ddim import DDIMSystem
from workflow.systems.ddpm import DDPM
from workflow.systems.edm import EDM
from workflow.systems.energy import Energy
from workflow.systems.flow_matching import FlowMatching
from workflow.systems.iddpm import IDDPM
from workflow.systems.inverse import Inverse
from workflow.systems.jem import JEM
from workflow.systems.latent import Latent
from workflow.systems.ncsn import NCSN
from workflow.systems.ncsnv2 import NCSNv2
from workflow.systems.score_matching import ScoreMatching
from workflow.systems.sub_vp import SubVP
from workflow.systems.text import Text
from workflow.systems.vdm import VariationalDiffusion
from workflow.systems.ve import VE
from workflow.systems.vp import VP

SYSTEMS: Catalogue[System] = Catalogue(
    "system",
    {
        kind.name: kind
        for kind in (
            VP,
            VE,
            SubVP,
            DDPM,
            NCSN,
            IDDPM,
            DDIMSystem,
            EDM,
            FlowMatching,
            DiffusionDGM,
            VariationalDiffusion,
            Latent,
            Classes,
            Inverse,
            Text,
            NCSNv2,
            ScoreMatching,
            Energy,
            CNF,
            JEM,
        )
    },
)


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return SYSTEMS.available()


def create(name: str) -> System:
    """The system of that name.

    Raises:
        UserError: an unknown name.
    """
    return SYSTEMS.create(name)
