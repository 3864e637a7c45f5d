"""A residual multilayer perceptron for vectors, or for small tensors of any shape taken as vectors.

    h = W_in x;   h <- h + W_2 silu(W_1 silu(h) + V e)  (depth times);   out = W_out silu(h)

where `e` embeds the noise level and the class. No normalisation: in two dimensions the scale of `h` is
information.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.embeddings import NoiseLevelEmbedding, noise_features
from models.initialization import linear
from models.input_features import FourierFeatures
from models.network import Network, check_fourier, require_label
from numerics import UserError


class MLPBlock(nn.Module):
    """`h (B, width)`, `embedding (B, embedding_width)` -> `h + W_2 silu(W_1 silu(h) + V embedding)`, `(B, width)`."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear_1 = linear(width, width)
        self.project = linear(embedding_width, width)
        self.linear_2 = linear(width, width, scale=0.1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.linear_2(F.silu(self.linear_1(F.silu(h)) + self.project(embedding)))


class MLP(Network):
    """A residual multilayer perceptron: `x (B, *)` with `dim` numbers a sample, `label (B,)`, `class_label (B,)` -> `(B, *)`.

        h = W_in x;   h <- h + W_2 silu(W_1 silu(h) + V e)  (depth times);   out = W_out silu(h)

    Args:
        dim: numbers in one sample: D for `(B, D)`, C L for `(B, C, L)`.
        width: of the hidden layers and of the embedding.
        depth: number of residual blocks.
        embedding: `"smooth"`, `"positional"` or `"fourier"`, see `models.embeddings`.
        fourier_scale: of the Fourier embedding's random frequencies.
        num_classes: of class labels, or None.
        learned_variance: twice the output channels, the second half for variances.
        fourier_features: frequencies of sine features of the input, see `models.input_features`.
        checkpoint_activations: recompute activations in the backward pass.

    Raises:
        UserError: sizes that are too small, or another embedding.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 128,
        depth: int = 4,
        embedding: str = "smooth",
        fourier_scale: float = 16.0,
        num_classes: int | None = None,
        learned_variance: bool = False,
        fourier_features: Sequence[float] | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        if dim < 1 or width < 4 or depth < 1:
            raise UserError(f"got dim={dim}, width={width}, depth={depth}; expected dim, depth >= 1 and width >= 4")
        self.dim, self.num_classes, self.checkpoint_activations = dim, num_classes, checkpoint_activations
        self.learned_variance = learned_variance
        self.embedding = NoiseLevelEmbedding(
            noise_features(embedding, 16, scale=fourier_scale), width, num_classes=num_classes
        )
        self.features = FourierFeatures(fourier_features or ())
        self.fine_input = bool(fourier_features)
        self.input = linear(dim * self.features.multiple, width)
        self.blocks = nn.ModuleList(MLPBlock(width, width) for _ in range(depth))
        self.output = linear(width, dim * (2 if learned_variance else 1), scale=0.0)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that are not positive for the Fourier embedding."""
        check_fourier(self.options["embedding"], labels)

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, *)`, `label (B,)`, `class_label (B,)` -> `(B, *)`."""
        flat = x.flatten(1)
        if flat.shape[1] != self.dim:
            raise UserError(f"got x of shape {tuple(x.shape)}, {flat.shape[1]} numbers a sample; expected {self.dim}")
        embedding = self.embedding(require_label(label), class_label)
        h = self.input(self.features(flat).to(self.input.weight.dtype))
        for block in self.blocks:
            h = self.run(block, h, embedding)
        # the second half of the channels are variances
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        return self.output(F.silu(h)).reshape(x.shape[0], channels, *x.shape[2:])
