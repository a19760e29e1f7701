"""The losses of contrastive learning without negatives, and the heads that they are measured behind."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def simsiam(p1: torch.Tensor, z1: torch.Tensor, p2: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Scalar in [-1, 1]: minus the mean cosine of each view's prediction p with the other view's projection z, which
    gets no gradient. All are (n, m); row i is image i (Chen and He, Exploring Simple Siamese Representation Learning,
    CVPR 2021, eq. 2)."""
    first, second = (functional.cosine_similarity(p, z.detach(), dim=1) for p, z in ((p1, z2), (p2, z1)))
    return -(first + second).mean() / 2


def pair_weights(posteriors: torch.Tensor) -> torch.Tensor:
    """(n, n) in [0, 1]: how much images i and j belong together, by their (n, classes) answers.

    ``(1 - H_i / log K)(1 - H_j / log K) cos(y_i, y_j)``, with entropies H of K classes; 0 on the diagonal.
    """
    entropy = torch.special.entr(posteriors).sum(dim=1)
    sure = (1 - entropy / torch.tensor(float(posteriors.shape[1])).log()).clamp(0, 1)
    alike = functional.normalize(posteriors, dim=1)
    return (sure[:, None] * sure * (alike @ alike.T)).fill_diagonal_(0)


def soft_supervised(p: torch.Tensor, z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scalar: minus the mean of weight times cosine of p_i with z_j, which gets no gradient, over the pairs of images
    whose weight is not 0; 0 where there are none. `p`, `z`: (n, m); `weights`: (n, n)."""
    cosines = functional.normalize(p, dim=1) @ functional.normalize(z.detach(), dim=1).T
    return -(weights * cosines).sum() / (weights > 0).sum().clamp_min(1)


class Heads(nn.Module):
    """Projection and prediction of (n, features) representations, as in SimSiam but narrower.

    Args:
        features: Numbers of a representation.
        width: Of the projection; the prediction's hidden layer has a quarter.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            *(nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width, affine=False)),
        )
        hidden = max(1, width // 4)
        self.predict = nn.Sequential(
            *(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))
        )

    def forward(self, representations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, width) predictions and projections. At least two rows while it is trained."""
        z = self.project(representations)
        return self.predict(z), z
