r"""Changes of data by way of their latents.

The flow takes each datum to a latent and back without loss, so a change of the latent is a change of the datum, and what an
empty change leaves of the datum is the round trip's error, which comes with every result:

    z = encode(x),      x_k = decode(change_k(z)),      error = rms(decode(z) - x)

- Along an attribute: z + s d with d the difference of the mean latents of data that have it and that do not (Kingma and
  Dhariwal 2018, arXiv:1807.03039, section 6.3); orthogonal to other attributes' directions, it leaves those alone to first
  order.
- Temperature: tau z.
- Between four data: a grid of great circles (`likelihood.latent.slerp`) of great circles.

    d = attribute_direction(latents, wears_glasses, orthogonal_to=[smiles])
    edit_latents(sde, score, x, [lambda z, s=s: z + s * d for s in (-1, 0, 1)])
    edit_latents(sde, score, x, [lambda z, tau=tau: tau * z for tau in (0.6, 0.8, 1.0)])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from likelihood.latent import Interpolation, decode, round_trip, slerp
from likelihood.method import Method
from numerics import UserError, require_count, take
from sde_lib import SDE, Score


@dataclass(frozen=True, kw_only=True)
class SlerpGrid:
    """What lies between four data.

    Attributes:
        x, latent: `(R, C, *)`; the corners of the first are the four data, up to the round trip's error.
        round_trip_error: `(4,)`, of the corners, root mean square per entry.
        converged: `(R, C)`, with all four corners.
        nfe: forward evaluations in all.
    """

    x: Tensor
    latent: Tensor
    round_trip_error: Tensor
    converged: Tensor
    nfe: int


def attribute_direction(
    latents: Tensor, has: Tensor | Sequence[bool], *, orthogonal_to: Sequence[Tensor] = ()
) -> Tensor:
    """The mean latent of those that have an attribute minus that of those that do not, `(*)`.

    Args:
        latents: `(N, *)`, of data that do and do not.
        has: `(N,)` booleans, a tensor or what torch makes one of.
        orthogonal_to: directions `(*)` of other attributes, whose span is projected out.

    Raises:
        UserError: shapes that do not fit, or an attribute that all or none have.
    """
    expected = f"expected {len(latents)} booleans, one for each latent"
    try:
        has = torch.as_tensor(has, device=latents.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"got has={has!r}; {expected}") from error
    if has.shape != latents.shape[:1] or has.dtype != torch.bool:
        raise UserError(f"got has of shape {tuple(has.shape)} and {has.dtype}; {expected}")
    for tensor in (latents, *orthogonal_to):
        if not bool(tensor.isfinite().all()):
            raise UserError(
                "got latents or directions that are not finite; expected finite ones: leave failed encodings out"
            )
    if bool(has.all()) or not bool(has.any()):
        raise UserError("got an attribute that all data or none have; expected some of each")
    direction = (latents[has].double().mean(dim=0) - latents[~has].double().mean(dim=0)).flatten()
    for other in orthogonal_to:
        if other.shape != latents.shape[1:]:
            raise UserError(
                f"got a direction of shape {tuple(other.shape)} to be orthogonal to; expected {tuple(latents.shape[1:])}"
            )
    if orthogonal_to:
        # of one length, so that a short direction is not taken for rounding
        others = torch.stack([normalize(other.flatten().double(), dim=0, eps=1e-300) for other in orthogonal_to], dim=1)
        left, sizes, _ = torch.linalg.svd(others, full_matrices=False)
        # directions that depend on each other, or are zero, span less than there are of them
        basis = left[:, sizes > len(others) * torch.finfo(sizes.dtype).eps * sizes.max()]
        direction = direction - basis @ (basis.T @ direction)
    return direction.reshape(latents.shape[1:]).to(latents.dtype)


def edit_latents(
    sde: SDE,
    score: Score,
    x: Tensor,
    changes: Sequence[Callable[[Tensor], Tensor]],
    *,
    method: Method | None = None,
) -> Interpolation:
    """The data `x` `(B, *)` after each of K changes of their latents: `(K, B, *)`, with the round trip's error `(B,)`.

    Args:
        changes: functions of latents `(B, *)` that give latents `(B, *)`.
        method: as in `log_likelihood`.

    Raises:
        UserError: no changes, or one that makes something else of the latents than finite latents.
    """
    if not changes:
        raise UserError("got no changes; expected at least one function of latents")
    own = torch.arange(len(x), device=x.device)
    there = round_trip(sde, score, x, method=method)
    latent = torch.stack([_changed(change, there.latent, there.converged) for change in changes])
    found = decode(sde, take(score, own.repeat(len(changes))), torch.nan_to_num(latent.flatten(0, 1)), method=method)
    return Interpolation(
        x=found.x.reshape(latent.shape),
        latent=latent,
        round_trip_error=there.error,
        converged=found.converged.reshape(len(changes), -1).all(dim=0) & there.converged,
        nfe=there.nfe + found.nfe,
    )


def slerp_grid(
    sde: SDE, score: Score, corners: Tensor, rows: int, columns: int, *, method: Method | None = None
) -> SlerpGrid:
    """The data between four corners, `(rows, columns, *)`, along great circles of latents.

    Args:
        score: one for all, without data per sample: what lies between two samples' labels is not known.
        corners: `(4, *)`: top left, top right, bottom left, bottom right.
        rows, columns: at least 2.
        method: as in `log_likelihood`.

    Raises:
        UserError: another number of corners, or sizes that are too small.
    """
    if len(corners) != 4:
        raise UserError(f"got {len(corners)} corners; expected 4: top left, top right, bottom left, bottom right")
    require_count(rows, "rows", 2)
    require_count(columns, "columns", 2)
    ends = round_trip(sde, score, corners, method=method)
    top_left, top_right, bottom_left, bottom_right = (ends.latent[i : i + 1] for i in range(4))
    across = [j / (columns - 1) for j in range(columns)]
    top = torch.cat([slerp(top_left, top_right, w) for w in across])
    bottom = torch.cat([slerp(bottom_left, bottom_right, w) for w in across])
    latent = torch.stack([slerp(top, bottom, i / (rows - 1)) for i in range(rows)])
    found = decode(sde, score, torch.nan_to_num(latent.flatten(0, 1)), method=method)
    return SlerpGrid(
        x=found.x.reshape(latent.shape),
        latent=latent,
        round_trip_error=ends.error,
        converged=found.converged.reshape(rows, columns) & ends.converged.all(),
        nfe=ends.nfe + found.nfe,
    )


def _changed(change: Callable[[Tensor], Tensor], latent: Tensor, converged: Tensor) -> Tensor:
    """The change of a copy, so that one that writes into what it is given changes no other's."""
    changed = change(latent.clone())
    if not isinstance(changed, Tensor) or changed.shape != latent.shape:
        got = f"latents of shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else type(changed).__name__
        raise UserError(f"got {got} from a change; expected {tuple(latent.shape)}")
    if not bool(changed[converged].isfinite().all()):
        raise UserError("got latents that are not finite from a change; expected finite ones")
    return changed.to(latent.dtype)
