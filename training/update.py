"""One update of the weights, without waiting for the device.

An update must not be applied when a loss or a gradient is not finite, but looking at either would make the host wait for
the device at every step. So the decision stays on the device: torch's fused Adam takes a flag tensor `found_inf` and
does nothing where it is 1, and a divisor `grad_scale`, which does the clipping in the same pass over memory. What was wrong
first is remembered in a few numbers that `FiniteGuard.report` fetches when the loop looks at the device anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from numerics import real_dtype
from training.errors import UsageError
from training.sharding import unshard

if TYPE_CHECKING:
    from training.training_options import TrainingOptions


class FiniteGuard:
    """Remembers on the device the first update that was refused, and how many were.

    Args:
        device: of the losses.
        sticky: whether everything after the first refused update is refused too.
    """

    def __init__(self, device: torch.device, *, sticky: bool) -> None:
        self.sticky = sticky
        self.refused = torch.zeros((), device=device)
        self.first = torch.zeros(3, dtype=real_dtype(device), device=device)  # step, t, loss

    @torch.no_grad()
    def check(self, step: int, loss: Tensor, norm: Tensor, t: Tensor, losses: Tensor) -> Tensor:
        """1.0 where the update of `step` must not be applied, else 0.0; `()`.

        Args:
            step: its number, from 1.
            loss, norm: `()`, of the whole batch.
            t, losses: `(B,)`, to name the worst sample.
        """
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        worst = t[torch.nan_to_num(losses, nan=torch.inf).argmax().reshape(1)].reshape(())
        now = torch.stack([torch.full_like(worst, step), worst, loss.to(worst.dtype)])
        self.first = torch.where(bad & (self.refused == 0), now, self.first)
        if self.sticky:
            bad = bad | (self.refused > 0)
        self.refused = self.refused + bad.to(self.refused.dtype)
        return bad.to(torch.float32)

    def report(self) -> tuple[int, int, float, float]:
        """(number refused, step of the first, its worst t, its loss). Waits for the device."""
        step, t, loss = self.first.tolist()
        return int(self.refused), int(step), t, loss


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainingOptions, *, fused: bool
) -> torch.optim.Optimizer:
    """Adam or AdamW as asked, in one fused pass over memory where `fused`.

    Raises:
        UsageError: nothing to train.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise UsageError("got a model without trainable parameters; expected some with requires_grad")
    return kind(
        trained,
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        fused=fused or None,
    )


@torch.no_grad()
def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The 2-norm of all gradients, `()`."""
    norm = torch.nn.utils.get_total_norm(_gradients(optimizer), foreach=True)
    return unshard(norm)


@torch.no_grad()
def apply_update(optimizer: torch.optim.Optimizer, norm: Tensor, refused: Tensor, *, clip: float | None) -> None:
    """Clips the gradients, of 2-norm `norm` `()`, and steps, unless `refused` `()` is 1.

    Where the optimiser is not fused (sharded weights), the flag is looked at, and the host waits.
    """
    # min(1, clip / norm), as the divisor max(1, norm / clip)
    divisor = None if clip is None else (norm / clip).clamp(min=1).to(torch.float32)
    if not optimizer.defaults["fused"]:
        if bool(refused):
            return
        if divisor is not None:
            torch._foreach_div_(_gradients(optimizer), divisor)
        optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = divisor, refused  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
