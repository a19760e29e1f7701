from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import records
from distill.data import assets
from distill.data.pools.fitting import MEMORY_BYTES, check_size, images_only
from distill.errors import MissingAsset
from distill.randomness import generator

if TYPE_CHECKING:
    from PIL.Image import Image

# Those that lie in the wheels themselves; scikit-image would download others.
SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
SKLEARN = ("china.jpg", "flower.jpg")


class Photographs:
    """Random crops of seventeen photographs: natural images without a data set or a network.

    Source: the example photographs inside the packages scikit-image and scikit-learn (cats, a street, gravel, galaxies,
    cells …). A crop has the proportions of the victim's pictures, a log-uniform size between theirs and the whole
    photograph, and any position; it is resized (bilinear) and recoloured. Millions of crops are distinct.

    Args:
        size: Number of crops.
        seed: Which crops.
    """

    def __init__(self, size: int = 10_000, seed: int = 0) -> None:
        self.size, self.seed = check_size(size), seed

    def load(self, data: records.Dataset) -> records.Examples:
        """Raises `MissingAsset` without the packages, `DistillError` when the victim takes no pictures."""
        images_only(data.spec, "photographs")
        height, width, channels = data.spec.shape
        paths = _paths()
        photographs = tuple(_open(path, channels) for path in paths)

        rng = generator(self.seed, "pool", "photographs")
        which = rng.integers(len(photographs), size=self.size)
        sides = np.array([photograph.size for photograph in photographs])[which]  # (width, height) of each row's
        most = (sides / (width, height)).min(axis=1)  # how often the victim's picture fits
        scale = np.exp(rng.uniform(size=self.size) * np.log(np.maximum(most, 1.0))) * np.minimum(most, 1.0)
        crop = np.clip(np.rint(scale[:, None] * (width, height)), 1, sides)
        corner = np.floor(rng.uniform(size=(self.size, 2)) * (sides - crop + 1))
        boxes = np.concatenate([corner, corner + crop], axis=1).astype(np.int64)

        crops = Crops(photographs, which, boxes, data.spec)
        if crops.nbytes <= MEMORY_BYTES:
            return records.Examples(crops[:], data.spec, name="photographs")
        digest = hashlib.blake2b(f"{self.seed} {self.size} {data.spec}".encode(), digest_size=16)
        for path in paths:
            digest.update(path.read_bytes())
        return records.Examples(crops, data.spec, name="photographs", stated_fingerprint=digest.hexdigest())


@dataclass(frozen=True)
class Crops:
    """A column of crops, cut when they are asked for. `boxes` (n, 4) int64: left, upper, right, lower."""

    photographs: tuple[Image, ...]
    which: np.ndarray
    boxes: np.ndarray
    spec: records.InputSpec

    def __len__(self) -> int:
        return len(self.which)

    @property
    def nbytes(self) -> int:
        return int(len(self) * np.prod(self.spec.shape))

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        from PIL import Image as pil

        height, width, _ = self.spec.shape
        which, boxes = self.which[rows], self.boxes[rows]
        pixels = np.empty((len(which), *self.spec.shape), dtype=np.uint8)
        for i, (photograph, box) in enumerate(zip(which.tolist(), boxes.tolist(), strict=True)):
            cut = self.photographs[photograph].resize((width, height), pil.Resampling.BILINEAR, box=box)
            pixels[i] = np.asarray(cut).reshape(self.spec.shape)
        return pixels


def _paths() -> list[Path]:
    found = {f"scikit-image/{name}": assets.package_file("skimage", f"data/{name}") for name in SKIMAGE}
    found |= {f"scikit-learn/{name}": assets.package_file("sklearn", f"datasets/images/{name}") for name in SKLEARN}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise MissingAsset(
            f"the photographs {', '.join(missing[:3])}{' …' if missing[3:] else ''} were not found; "
            "install them: pip install scikit-image scikit-learn",
            "pool",
        )
    return [path for path in found.values() if path is not None]


def _open(path: Path, channels: int) -> Image:
    from PIL import Image as pil

    with pil.open(path) as image:
        return image.convert("L" if channels == 1 else "RGB")
