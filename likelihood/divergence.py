r"""The trace of a network's Jacobian, together with its value, from one forward pass.

`Exact` computes it, `Hutchinson` and `Coloured` estimate it by random vectors. Products are vector-Jacobian ones (reverse
mode): a Jacobian-vector product was measured at twice the time, and fused attention has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import Generator, UserError, normal, rademacher, require_choice, require_count
from sde_lib import check_score

Function = Callable[[Tensor], Tensor]


class Divergence(ABC):
    """How to get tr(d f / d x) of a network f: `draw` makes the random vectors of an evaluation, `trace` uses them.

    (For the probability flow of score models: Song et al. 2021, arXiv:2011.13456, appendix D.2.)
    """

    @staticmethod
    def of(divergence: Divergence | None) -> Divergence:
        """`divergence`, or one probe of random signs for None.

        Raises:
            UserError: for anything else, such as a number of probes.
        """
        if divergence is None:
            return Hutchinson()
        if not isinstance(divergence, Divergence):
            raise UserError(
                f"got divergence={divergence!r}; expected a way to get the trace, such as Hutchinson(probes=2) or Exact()"
            )
        return divergence

    @property
    def exact(self) -> bool:
        """Is the estimate the trace itself, so that nothing is random?"""
        return False

    @property
    @abstractmethod
    def redraw(self) -> bool | None:
        """New vectors at every evaluation? None: wherever the solver's grid is fixed."""

    @property
    @abstractmethod
    def estimates(self) -> int:
        """K, the number of independent estimates of the trace that come out."""

    @abstractmethod
    def products(self, x: Tensor) -> int:
        """Vector-Jacobian products an evaluation, for an `x` `(B, *)`."""

    @abstractmethod
    def draw(self, x: Tensor, generator: Generator) -> Tensor | None:
        """The random vectors for a batch like `x` `(B, *)`: `(B, n, *)`, or None where nothing is random."""

    @abstractmethod
    def trace(
        self, function: Function, x: Tensor, probes: Tensor | None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The value `function(x)` `(B, *)` and the estimates of the trace of its Jacobian `(B, K)`.

        The rows of the Jacobian of a batch are taken to be independent: sample i of the value depends on sample i of
        `x` alone. `create_graph` keeps both differentiable.
        """


def _forward(function: Function, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """`x` as the variable to differentiate by, and the function's value there."""
    if not (create_graph and x.requires_grad):
        x = x.detach().requires_grad_()
    with torch.enable_grad():
        value = function(x)
    check_score(value, x)
    if not value.requires_grad:
        raise UserError(
            "got a score that autograd cannot follow, so it has no trace; expected one that depends on x by "
            "differentiable operations: remove detach() and no_grad() from it"
        )
    return x, value


def _products(value: Tensor, x: Tensor, vectors: Tensor, create_graph: bool, last: bool) -> Tensor:
    """v^T J for each of the vectors `(n, B, *)`: `(n, B, *)`. `last` frees the graph."""
    keep = create_graph or not last
    if len(vectors) == 1:
        (product,) = torch.autograd.grad(
            value, x, vectors[0], create_graph=create_graph, retain_graph=keep, materialize_grads=True
        )
        return product.unsqueeze(0)
    (product,) = torch.autograd.grad(
        value,
        x,
        vectors,
        create_graph=create_graph,
        retain_graph=keep,
        is_grads_batched=True,
        materialize_grads=True,
    )
    return product


def _at_once(rows: int | None, x: Tensor) -> int:
    """How many products to take at once for the batch `x`: as many as fill `rows` rows.

    128 rows were measured to be best on a CPU (8 images: 16 products at once are 3 times faster than one by one; 64 images:
    one by one is 3 times faster than 64 at once). On a device that runs many in parallel the default is 4096, not measured.
    """
    return max(1, (rows or (128 if x.device.type == "cpu" else 4096)) // max(1, x.shape[0]))


def _quadratic_forms(
    function: Function, x: Tensor, probes: Tensor, rows: int | None, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """The value, and v^T J v for every probe `(B, n, *)`: `(B, n)`."""
    x, value = _forward(function, x, create_graph)
    vectors = probes.transpose(0, 1)
    chunk = _at_once(rows, x)
    forms = []
    for start in range(0, len(vectors), chunk):
        part = vectors[start : start + chunk]
        product = _products(value, x, part, create_graph, last=start + chunk >= len(vectors))
        forms.append((product * part).flatten(2).sum(dim=2))
    return (value if create_graph else value.detach()), torch.cat(forms).T


def _check_rows(rows: int | None) -> None:
    if rows is not None:
        require_count(rows, "rows")


@dataclass(frozen=True, kw_only=True)
class Exact(Divergence):
    """The trace itself, tr J = sum_i e_i^T J e_i, from D vector-Jacobian products that share one forward pass.

    In a few dimensions it costs no more than an estimate.

    Args:
        rows: products times batch taken at once, which bounds the memory; None for a default of the device.
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        _check_rows(self.rows)

    @property
    def estimates(self) -> int:
        return 1

    @property
    def exact(self) -> bool:
        return True

    @property
    def redraw(self) -> bool:
        return False

    def products(self, x: Tensor) -> int:
        return x[0].numel()

    def draw(self, x: Tensor, generator: Generator) -> None:
        return None

    def trace(
        self, function: Function, x: Tensor, probes: Tensor | None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        x, value = _forward(function, x, create_graph)
        D = x[0].numel()
        chunk = min(D, _at_once(self.rows, x))
        total = x.new_zeros(x.shape[0])
        for start in range(0, D, chunk):
            index = torch.arange(start, min(start + chunk, D), device=x.device)
            # one-hot rows, the same for every sample
            basis = torch.zeros(len(index), D, dtype=value.dtype, device=x.device)
            basis[torch.arange(len(index), device=x.device), index] = 1
            vectors = basis.reshape(len(index), 1, *x.shape[1:]).expand(-1, *x.shape)
            product = _products(value, x, vectors, create_graph, last=start + chunk >= D)
            total = total + (product * vectors).flatten(2).sum(dim=(0, 2))
        return (value if create_graph else value.detach()), total.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Hutchinson(Divergence):
    """`probes` independent estimates v^T J v of tr J = E[v^T J v], E[v v^T] = I, at one vector-Jacobian product each.

    (Hutchinson 1990; for flows Grathwohl et al. 2019, arXiv:1810.01367.) With S the symmetric part of J, the variance of one
    probe of random signs is 2 sum_{i != j} S_ij^2, and that of a Gaussian probe is 2 sum_{ij} S_ij^2, the diagonal included.
    The diagonal is most of it: on a trained 28x28 network a Gaussian probe was measured to have ten times the standard
    deviation (0.62 against 0.059 bits/dim). So signs are the default.

    Args:
        probes: number of probes; with two or more a standard error comes with the result.
        noise: "rademacher" (random signs) or "gaussian", which is much worse.
        fresh: draw new probes at every evaluation (fixed grids only: the sum along the path is still unbiased, and its
            error much smaller), or keep one set along the path. None: fresh wherever the solver's grid is fixed.
        rows: products times batch taken at once; None for a default of the device.
    """

    probes: int = 1
    noise: str = "rademacher"
    fresh: bool | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        _check_rows(self.rows)
        require_count(self.probes, "probes")
        require_choice(self.noise, "noise", ("rademacher", "gaussian"))

    @property
    def estimates(self) -> int:
        return self.probes

    @property
    def redraw(self) -> bool | None:
        return self.fresh

    def products(self, x: Tensor) -> int:
        return self.probes

    def draw(self, x: Tensor, generator: Generator) -> Tensor:
        draw = rademacher if self.noise == "rademacher" else normal
        return draw((x.shape[0], self.probes, *x.shape[1:]), generator, device=x.device, dtype=x.dtype)

    def trace(
        self, function: Function, x: Tensor, probes: Tensor | None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        if probes is None:
            raise UserError("got no probes; expected those of draw(x, generator)")
        return _quadratic_forms(function, x, probes, self.rows, create_graph)


@dataclass(frozen=True, kw_only=True)
class Coloured(Divergence):
    """`sets` independent sets of probes of random signs on the k^2 pixel lattices of spacing k, for `(B, C, H, W)`.

        tr J = E[sum over the lattices c of v_c^T J v_c],     v_c random signs on lattice c and 0 elsewhere

    The cross terms that are left are those between pixels at least k apart, where the Jacobian of an image network is small
    (probing: Bekas, Kokiopoulou and Saad 2007; Tang and Saad 2012). A set is *one* estimate and costs k^2 products. All
    channels of a lattice's pixels are in one probe.

    Args:
        spacing: spacing k of the lattices; 2 to 4 pay on images.
        sets: number of sets; with two or more a standard error comes with the result.
        fresh, rows: as in `Hutchinson`.
    """

    spacing: int = 2
    sets: int = 1
    fresh: bool | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        _check_rows(self.rows)
        require_count(self.spacing, "spacing")
        require_count(self.sets, "sets")

    @property
    def estimates(self) -> int:
        return self.sets

    @property
    def redraw(self) -> bool | None:
        return self.fresh

    def products(self, x: Tensor) -> int:
        return self.sets * self.spacing**2

    def draw(self, x: Tensor, generator: Generator) -> Tensor:
        if x.ndim != 4:
            raise UserError(
                f"got a state of shape {tuple(x.shape)} for Coloured probes; "
                "expected images (B, C, H, W): use Hutchinson"
            )
        k = self.spacing
        signs = rademacher((x.shape[0], self.sets, *x.shape[1:]), generator, device=x.device, dtype=x.dtype)
        rows = torch.arange(x.shape[2], device=x.device) % k
        columns = torch.arange(x.shape[3], device=x.device) % k
        colour = rows.unsqueeze(1) * k + columns  # (H, W)
        masks = (colour == torch.arange(k * k, device=x.device).reshape(-1, 1, 1)).to(x.dtype).unsqueeze(1)
        # (B, sets, 1, C, H, W) * (k^2, 1, H, W): one image of signs serves all its lattices, which do not overlap
        return (signs.unsqueeze(2) * masks).flatten(1, 2)

    def trace(
        self, function: Function, x: Tensor, probes: Tensor | None, *, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        if probes is None:
            raise UserError("got no probes; expected those of draw(x, generator)")
        value, forms = _quadratic_forms(function, x, probes, self.rows, create_graph)
        return value, forms.reshape(x.shape[0], self.sets, -1).sum(dim=2)
