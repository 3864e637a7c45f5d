r"""One stated error of several parts, each known from few values.

A variance that is known from k independent differences is a chi-square of k degrees of freedom, and an error divided by its
root a Student's t ("Student" 1908, Biometrika 6): of two repetitions twice the plain error covers 82 %, and of eight 92 %. A
sum of such variances v_i has about

    nu = (sum of v_i)^2 / sum of v_i^2 / k_i

of them (Satterthwaite 1946, Biometrics Bulletin 2; Welch 1947, Biometrika 34). The error that is stated is

    t / 2 sqrt(sum of v_i),     P(|T_nu| <= t) = P(|N(0, 1)| <= 2) = 95.45 %

so that two of it cover what two errors are taken to. One covers more than 68.3 %: 85 % at nu = 2, 73 % at 8, 69 % at 60. No one
number does both, and an error that is too large misleads less than one that is too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_TWO = math.erf(math.sqrt(2.0))  # what two standard errors cover


def stated_error(parts: Iterable[tuple[float, float]]) -> float:
    """The error of which two cover 95.45 %, from `(variance, degrees of freedom)` of its parts; NaN where one is unknown.

    A variance of 0, such as that of values without noise, is known and needs no degrees.
    """
    known = [(variance, degrees) for variance, degrees in parts if variance != 0]
    total = math.fsum(variance for variance, _ in known)
    if not known or total != total:
        return total
    return widening(degrees_of(known)) * math.sqrt(total)


def degrees_of(parts: Iterable[tuple[float, float]]) -> float:
    """nu of a sum of variances, from `(variance, degrees of freedom)` of each; 1 where all are 0."""
    known = [(variance, degrees) for variance, degrees in parts if variance != 0]
    total = math.fsum(variance for variance, _ in known)
    return total**2 / math.fsum(variance**2 / degrees for variance, degrees in known) if known else 1.0


def at_least(deviation: float, degrees: float) -> float:
    """What a standard deviation is above with 95 %, which is known from so many degrees of freedom: 0.51 of it of 1, 0.72 of 8,
    0.81 of 24, by chi-square."""
    from scipy.special import chdtri

    return (
        deviation if deviation == 0 or degrees <= 0 else deviation * math.sqrt(degrees / float(chdtri(degrees, 0.05)))
    )


def widening(nu: float) -> float:
    """t / 2 of `nu >= 1` degrees of freedom: 6.98 of 1, 2.26 of 2, 1.18 of 8, 1.02 of 60, 1.0001 of 10,000."""
    from scipy.special import stdtrit

    return float(stdtrit(nu, (1 + _TWO) / 2)) / 2
