"""What VP, VE and sub-VP share: a score of one SDE, trained at continuous times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from numerics import Catalogue
from sde_lib import SDE
from workflow import presets
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import System


class ScoreSDE(System):
    """A system that is its SDE; everything else is as `workflow.defaults` has it.

    Attributes:
        kind: the SDE's class.
        changes: options of it whose defaults are others here.
    """

    kind: ClassVar[type[SDE]]
    changes: ClassVar[Mapping[str, Any]] = {}

    def get_config(self) -> ConfigDict:
        """The digits' settings, on this SDE."""
        config = base_config(self.name)
        config.sde = section(self.catalogues["sde"], self.name, **self.changes)
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With this SDE alone."""
        return {**super().catalogues, "sde": Catalogue("SDE", {self.name: self.kind})}
