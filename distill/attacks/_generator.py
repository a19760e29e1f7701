"""Networks that make images of any size from 8×8, and one that tells them from real ones."""

from __future__ import annotations

import torch
from torch import nn


class Generator(nn.Module):
    """Noise to images: a linear layer to a quarter of the size, then twice upsampling and a convolution.

    Paper: Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks, Radford et al.,
    ICLR 2016, in the upsampling form of Data-Free Model Extraction, Truong et al., CVPR 2021: batch normalisation and
    leaky ReLU in between, and a last normalisation without parameters, so that activations keep to where the squashing
    bends.

    Args:
        shape: (height, width, channels) of an image, from 8×8.
        latent: Numbers of noise an image is made of.
        width: Channels before the last convolution; twice as many before that.
    """

    def __init__(self, shape: tuple[int, ...], latent: int, width: int) -> None:
        super().__init__()
        self.height, self.width, channels = shape
        self.latent = latent
        self._coarse = (2 * width, -(-self.height // 4), -(-self.width // 4))
        self.first = nn.Linear(latent, self._coarse[0] * self._coarse[1] * self._coarse[2])
        self.layers = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """(n, height, width, channels) activations before `squash`, of (n, latent) noise."""
        activations = self.layers(self.first(noise).unflatten(1, self._coarse))
        return activations[:, :, : self.height, : self.width].permute(0, 2, 3, 1)


def squash(activations: torch.Tensor) -> torch.Tensor:
    """Activations as pixels in [0, 1]."""
    return (activations.tanh() + 1) / 2


class Discriminator(nn.Module):
    """Images to one number each, large for real ones: two strided convolutions and a linear layer.

    Args:
        shape: (height, width, channels) of an image, from 8×8.
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        height, across, channels = shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (height // 4) * (across // 4), 1),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n,) of (n, height, width, channels) pixels in [0, 1]."""
        return self.layers(pixels.permute(0, 3, 1, 2) * 2 - 1).squeeze(1)
