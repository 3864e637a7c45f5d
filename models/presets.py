"""The published networks by name, with their numbers of trainable parameters.

`presets.create("ddpmpp_cifar10")` makes one (under `torch.device("meta")`, without memory). The counts of
Song et al.'s CIFAR-10 networks are those of the authors' code; ADM's and DiT's agree with the papers' tables
(296, 422, 554 and 559 M; 33, 130, 458 and 675 M, the fixed places of the latter counted in there); the others
were counted here, from networks that were compared with the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from models.network import Network
from numerics import UserError
from sde_lib import geometric_sigmas


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published network.

    Args:
        network: name of its class in `models.NETWORKS`.
        options: of that class.
        parameters: how many trainable ones that makes.
        source: where it was published.
    """

    network: str
    options: Mapping[str, Any]
    parameters: int
    source: str

    def create(self, **changes: Any) -> Network:
        """The network, some of its options changed (e.g. `dropout=0.0`)."""

        from models import networks

        return networks.create(self.network, **{**self.options, **changes})


_DDPM = {"residual_block": "ddpm", "blocks": 2, "groups": 32, "skip_rescale": False, "dropout": 0.1}
_DDPM_256 = {**_DDPM, "image_size": 256, "multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0}
_PP = {"dropout": 0.1}
_NCSNPP = {
    **_PP,
    "fir_kernel": (1, 3, 3, 1),
    "progressive_input": "residual",
    "embedding": "fourier",
    "scale_by_sigma": True,
    "centered": False,
}
_SKIP = {**_NCSNPP, "progressive_output": "output_skip", "progressive_input": "input_skip", "dropout": 0.0}
_CELEBA = {**_NCSNPP, "image_size": 64, "embedding": "positional"}
_ADM = {"learned_variance": True, "num_classes": 1000}
_DIT = {"in_channels": 4, "image_size": 32, "patch": 2, "num_classes": 1000, "learned_variance": True}

_SONG = "Song et al. 2021"
_PRESETS = {
    "ddpm_cifar10": Preset(
        network="ncsnpp",
        options=_DDPM,
        parameters=35_218_947,
        source="Ho et al. 2020, as Song et al. 2021 rebuilt it",
    ),
    "ddpm_256": Preset(
        network="ncsnpp",
        options=_DDPM_256,
        parameters=111_569_923,
        source="Ho et al. 2020, as Song et al. 2021 rebuilt it",
    ),
    "ddpmpp_cifar10": Preset(network="ncsnpp", options=_PP, parameters=61_804_419, source=_SONG),
    "ddpmpp_deep_cifar10": Preset(network="ncsnpp", options={**_PP, "blocks": 8}, parameters=106_632_579, source=_SONG),
    "ncsnpp_cifar10": Preset(network="ncsnpp", options=_NCSNPP, parameters=62_758_787, source=_SONG),
    "ncsnpp_deep_cifar10": Preset(
        network="ncsnpp", options={**_NCSNPP, "blocks": 8}, parameters=107_586_947, source=_SONG
    ),
    "ncsnpp_vp_cifar10": Preset(
        network="ncsnpp",
        options={**_NCSNPP, "embedding": "positional", "scale_by_sigma": False, "centered": True},
        parameters=62_693_251,
        source=_SONG,
    ),
    "ncsnpp_celeba64": Preset(
        network="ncsnpp",
        options={**_CELEBA, "sigmas": geometric_sigmas(levels=1000, largest=90.0, smallest=0.01)},
        parameters=62_693_251,
        source=_SONG,
    ),
    "ncsnpp_256": Preset(
        network="ncsnpp",
        options={**_SKIP, "image_size": 256, "multipliers": (1, 1, 2, 2, 2, 2, 2), "blocks": 2},
        parameters=65_574_421,
        source=_SONG,
    ),
    "ncsnpp_1024": Preset(
        network="ncsnpp",
        options={
            **_SKIP,
            "image_size": 1024,
            "channels": 16,
            "multipliers": (1, 2, 4, 8, 16, 32, 32, 32),
            "blocks": 1,
        },
        parameters=105_785_880,
        source=_SONG,
    ),
    "ncsn_cifar10": Preset(network="ncsn", options={}, parameters=30_117_635, source="Song and Ermon 2019"),
    "ncsnv2_cifar10": Preset(network="ncsnv2", options={}, parameters=29_694_083, source="Song and Ermon 2020"),
    "ncsnv2_celeba64": Preset(
        network="ncsnv2",
        options={"sigmas": geometric_sigmas(levels=500, largest=90.0, smallest=0.01)},
        parameters=29_694_083,
        source="Song and Ermon 2020",
    ),
    "ncsnv2_lsun128": Preset(
        network="ncsnv2",
        options={"sigmas": geometric_sigmas(levels=1086, largest=190.0, smallest=0.01), "size": "128"},
        parameters=83_445_379,
        source="Song and Ermon 2020",
    ),
    "ncsnv2_ffhq256": Preset(
        network="ncsnv2",
        options={"sigmas": geometric_sigmas(levels=2311, largest=348.0, smallest=0.01), "size": "256"},
        parameters=94_132_611,
        source="Song and Ermon 2020",
    ),
    "adm_imagenet64": Preset(
        network="adm",
        options={**_ADM, "dropout": 0.1},
        parameters=295_905_222,
        source="Dhariwal and Nichol 2021",
    ),
    "adm_imagenet128": Preset(
        network="adm",
        options={
            **_ADM,
            "image_size": 128,
            "channels": 256,
            "multipliers": (1, 1, 2, 3, 4),
            "blocks": 2,
            "head_channels": None,
        },
        parameters=421_530_630,
        source="Dhariwal and Nichol 2021",
    ),
    "adm_imagenet256": Preset(
        network="adm",
        options={**_ADM, "image_size": 256, "channels": 256, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2},
        parameters=553_839_110,
        source="Dhariwal and Nichol 2021",
    ),
    "adm_imagenet512": Preset(
        network="adm",
        options={
            **_ADM,
            "image_size": 512,
            "channels": 256,
            "multipliers": (0.5, 1, 1, 2, 2, 4, 4),
            "blocks": 2,
        },
        parameters=558_998_662,
        source="Dhariwal and Nichol 2021",
    ),
    **{
        f"dit_{name}_2": Preset(
            network="dit",
            options={**_DIT, "width": width, "depth": depth, "heads": heads},
            parameters=parameters,
            source="Peebles and Xie 2023",
        )
        for name, width, depth, heads, parameters in (
            ("s", 384, 12, 6, 32_865_056),
            ("b", 768, 12, 12, 130_315_808),
            ("l", 1024, 24, 16, 457_840_672),
            ("xl", 1152, 28, 16, 674_834_720),
        )
    },
}
PRESETS: Mapping[str, Preset] = MappingProxyType(_PRESETS)


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(PRESETS)


def create(name: str, **changes: object) -> Network:
    """The published network of that name, some of its options changed.

    Raises:
        UserError: for an unknown name, option or value.
    """
    if name not in PRESETS:
        raise UserError(f"got the preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name].create(**changes)
