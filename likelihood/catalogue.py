"""Trace estimators and dequantisers by name, as command lines and run folders call them."""

from __future__ import annotations

from likelihood.dequantization import Dequantizer, NoDequantization, TruncatedNormal, UniformDequantizer
from likelihood.divergence import Coloured, Divergence, Exact, Hutchinson
from numerics import Catalogue

DIVERGENCES: Catalogue[Divergence] = Catalogue(
    "trace estimator", {"exact": Exact, "hutchinson": Hutchinson, "coloured": Coloured}
)
DEQUANTIZERS: Catalogue[Dequantizer] = Catalogue(
    "dequantiser", {"uniform": UniformDequantizer, "truncated_normal": TruncatedNormal, "none": NoDequantization}
)
_ALL: Catalogue[Divergence | Dequantizer] = Catalogue(
    "trace estimator or dequantiser", {**DIVERGENCES.entries, **DEQUANTIZERS.entries}
)
create, available, options, describe = _ALL.create, _ALL.available, _ALL.options, _ALL.describe
