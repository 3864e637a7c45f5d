r"""The noise tables of the discrete chains.

    linear betas    from 1e-4 to 0.02 in N = 1000 steps        Ho et al. 2020 (arXiv:2006.11239), section 4
    cosine betas    1 - abar_i / abar_{i-1}, at most 0.999, with
                    abar_i = f(i/N) / f(0), f(u) = cos((u + s) / (1 + s) pi / 2)^2, s = 0.008
                                                               Nichol and Dhariwal 2021 (arXiv:2102.09672), equation (17)
    sigmas          geometric, from the largest down           Song and Ermon 2019 (arXiv:1907.05600), section 4.1

`sde_lib.TableVPSDE(betas=...)` and `sde_lib.TableVESDE(sigmas=...)` turn them into SDEs whose kernels are the chains'.
"""

from __future__ import annotations

import math

from training.errors import UsageError


def linear_betas(steps: int = 1000, first: float | None = None, last: float | None = None) -> tuple[float, ...]:
    """`(N,)`; for another number of steps than 1000 the ends are scaled by 1000 / steps, so that the whole noise stays."""
    _at_least_two(steps)
    first, last = 1e-4 * 1000 / steps if first is None else first, 0.02 * 1000 / steps if last is None else last
    if not 0 < first <= last < 1:
        raise UsageError(f"got betas from {first:g} to {last:g} in {steps} steps; expected 0 < first <= last < 1")
    return tuple(first + (last - first) * i / (steps - 1) for i in range(steps))


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> tuple[float, ...]:
    """`(N,)`, the cosine schedule."""
    _at_least_two(steps)
    f = [math.cos((i / steps + s) / (1 + s) * math.pi / 2) ** 2 for i in range(steps + 1)]
    return tuple(min(1 - b / a, largest) for a, b in zip(f[:-1], f[1:], strict=True))


def geometric_sigmas(levels: int = 10, largest: float = 1.0, smallest: float = 0.01) -> tuple[float, ...]:
    """`(L,)`, falling; the paper's ten from 1 to 0.01."""
    _at_least_two(levels)
    if not 0 < smallest < largest:
        raise UsageError(f"got sigmas from {largest} to {smallest}; expected 0 < smallest < largest")
    return tuple(largest * (smallest / largest) ** (i / (levels - 1)) for i in range(levels))


def _at_least_two(n: int) -> None:
    if n < 2:
        raise UsageError(f"got a table of {n} entries; expected at least 2")
