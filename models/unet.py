"""The project's own U-Net: DDPM++'s blocks, lean, and smooth in the noise level.

Against DDPM++ (Song et al. 2021): one block a level instead of four, attention at the lowest resolution only,
the noise level as scale and shift inside blocks, and a smooth embedding of a label of order one (a log-SNR)
instead of sines of `999 t`, so that the probability flow does not ripple in time.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.ncsnpp import NCSNpp, level_resolutions


def UNet(  # noqa: N802 - reads as the network it makes
    *,
    in_channels: int = 1,
    image_size: int = 8,
    channels: int = 32,
    multipliers: Sequence[int] = (1, 1),
    blocks: int = 1,
    attention_resolutions: Sequence[int] | None = None,
    heads: int = 1,
    dropout: float = 0.0,
    embedding: str = "smooth",
    scale_shift: bool = True,
    num_classes: int | None = None,
    learned_variance: bool = False,
    fourier_features: Sequence[float] | None = None,
    checkpoint_activations: bool = False,
) -> NCSNpp:
    """The project's own U-Net: an `NCSNpp` in our own default settings, for images of any size from 8×8 up.

    `x (B, in_channels, H, W)`, `label (B,)` of order one such as `LogSNR()` gives, `class_label (B,)` -> `x`'s shape.

    Args: as in `NCSNpp`, but `attention_resolutions=None` means the lowest resolution only.

    Raises:
        UserError: as `NCSNpp`.
    """
    lowest = level_resolutions(image_size, len(multipliers))[-1]
    return NCSNpp(
        in_channels=in_channels,
        image_size=image_size,
        channels=channels,
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention_resolutions=(lowest,) if attention_resolutions is None else tuple(attention_resolutions),
        embedding=embedding,
        scale_shift=scale_shift,
        heads=heads,
        dropout=dropout,
        num_classes=num_classes,
        learned_variance=learned_variance,
        fourier_features=tuple(fourier_features or ()),
        checkpoint_activations=checkpoint_activations,
    )
