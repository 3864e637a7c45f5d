r"""The noise tables of the discrete chains.

    linear betas    beta_i from 1e-4 to 0.02 in N = 1000 steps       Ho et al. 2020 (arXiv:2006.11239), section 4
    cosine betas    beta_i = min(1 - abar_i / abar_{i-1}, 0.999),
                    abar_i = f(i/N) / f(0), f(u) = cos((u + s) / (1 + s) pi / 2)^2, s = 0.008
                                                                     Nichol and Dhariwal 2021 (arXiv:2102.09672), equation (17)
    sigmas          sigma_i = largest (smallest / largest)^(i / (L - 1))    Song and Ermon 2019 (arXiv:1907.05600), section 4.1

`TableVPSDE(betas=...)` and `TableVESDE(sigmas=...)` turn them into SDEs whose kernels are the chains'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from numerics import UserError, require_count, require_positive


def linear_betas(*, steps: int = 1000, first: float | None = None, last: float | None = None) -> tuple[float, ...]:
    """DDPM's betas, rising linearly.

    Args:
        steps: N, at least 2.
        first: beta_1; 1e-4 * 1000 / N unless given, so that the whole noise is the same for every N.
        last: beta_N; 0.02 * 1000 / N unless given.

    Raises:
        UserError: fewer than two steps, or betas that do not rise within (0, 1).
    """
    require_count(steps, "steps", 2)
    first, last = 1e-4 * 1000 / steps if first is None else first, 0.02 * 1000 / steps if last is None else last
    if not 0 < first <= last < 1:
        raise UserError(
            f"got betas from first={first:g} to last={last:g} in steps={steps}; expected 0 < first <= last < 1"
        )
    return tuple(first + (last - first) * i / (steps - 1) for i in range(steps))


def cosine_betas(*, steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> tuple[float, ...]:
    """The betas of the cosine schedule.

    Args:
        steps: N, at least 2.
        s: keeps the first betas from being too small.
        largest: no beta is larger.

    Raises:
        UserError: fewer than two steps, or an s or a largest beta out of range.
    """
    require_count(steps, "steps", 2)
    if not 0 <= s < 1 or not 0 < largest < 1:
        raise UserError(f"got s={s}, largest={largest}; expected s in [0, 1) and largest in (0, 1)")
    f = [math.cos((i / steps + s) / (1 + s) * math.pi / 2) ** 2 for i in range(steps + 1)]
    return tuple(min(1 - b / a, largest) for a, b in zip(f[:-1], f[1:], strict=True))


def with_terminal_snr(betas: Sequence[float], snr: float) -> tuple[float, ...]:
    """The betas of a chain whose alpha is shifted and scaled so that its last (alpha / sigma)^2 is `snr` and its first row
    stays.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1, where `snr` is 0.

    Args:
        betas: all in (0, 1), two or more.
        snr: > 0, and less than the chain's own first.

    Raises:
        UserError: another snr.
    """
    require_positive(snr, "snr")
    alphas, square = [], 1.0
    for beta in betas:
        square *= 1 - beta
        alphas.append(math.sqrt(square))
    first, last, end = alphas[0], alphas[-1], math.sqrt(snr / (1 + snr))
    if not end < first:
        raise UserError(
            f"got snr={snr} at the end of a chain whose first alpha is {first:.6g}; expected one far below 1"
        )
    scaled = [end + (alpha - last) * (first - end) / (first - last) for alpha in alphas]
    return tuple(1 - (b / a) ** 2 for a, b in zip((1.0, *scaled[:-1]), scaled, strict=True))


def geometric_sigmas(*, largest: float = 1.0, smallest: float = 0.01, levels: int = 10) -> tuple[float, ...]:
    """NCSN's sigmas, falling geometrically; by default the paper's ten from 1 to 0.01.

    Args:
        largest: the first sigma.
        smallest: the last sigma.
        levels: L, at least 2.

    Raises:
        UserError: fewer than two levels, or ends that are not 0 < smallest < largest.

    >>> [round(sigma, 3) for sigma in geometric_sigmas(largest=1.0, smallest=0.01, levels=3)]
    [1.0, 0.1, 0.01]
    """
    require_count(levels, "levels", 2)
    if not 0 < smallest < largest:
        raise UserError(f"got sigmas from largest={largest} to smallest={smallest}; expected 0 < smallest < largest")
    return tuple(largest * (smallest / largest) ** (i / (levels - 1)) for i in range(levels))
