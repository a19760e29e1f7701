"""Other views of images, in pixel space: crops, turns and intensities."""

from __future__ import annotations

import torch
from torch.nn import functional


def views(
    pixels: torch.Tensor, rng: torch.Generator, *, crop: float, turn: float, intensity: float, mirror: bool
) -> torch.Tensor:
    """A random view of each of (n, height, width, channels) pixels in [0, 1]: as many, as large, and in [0, 1].

    Args:
        pixels: They are not changed.
        rng: On the CPU.
        crop: The least share of its height and width that a crop keeps; its place is random.
        turn: The largest turn, in degrees, to either side; edge pixels fill what becomes free.
        intensity: Brightness and contrast are multiplied by up to 1 ± this.
        mirror: Mirror half of them, left to right.
    """
    n, height, width, _ = pixels.shape
    side, angle, down, across, bright, contrast, flip = torch.rand((7, n), generator=rng).to(pixels.device)
    side = crop + (1 - crop) * side
    angle = (2 * angle - 1) * torch.pi * turn / 180
    flipped = torch.where(flip < 0.5, -1.0, 1.0) if mirror else torch.ones_like(flip)
    sine, cosine = side * angle.sin(), side * angle.cos()
    moves = torch.stack(
        [
            torch.stack([flipped * cosine, -sine * height / width, (1 - side) * (2 * across - 1)], dim=1),
            torch.stack([flipped * sine * width / height, cosine, (1 - side) * (2 * down - 1)], dim=1),
        ],
        dim=1,
    )
    channels_first = pixels.permute(0, 3, 1, 2)
    grid = functional.affine_grid(moves, list(channels_first.shape), align_corners=False)
    moved = functional.grid_sample(channels_first, grid, padding_mode="border", align_corners=False)
    brightness, gain = (1 + intensity * (2 * draw - 1) for draw in (bright, contrast))
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    lit = ((moved - mean) * gain.view(-1, 1, 1, 1) + mean) * brightness.view(-1, 1, 1, 1)
    return lit.clamp(0, 1).permute(0, 2, 3, 1)
