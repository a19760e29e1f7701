"""Pictures as uint8 pixels: decoded when they are asked for, cropped, resized and recoloured with Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import DistillError
from distill.records import InputSpec

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV"})


@dataclass(frozen=True)
class Pictures:
    """A column of pictures in a Hugging Face data set. Rows are decoded when they are asked for, and not kept.

    Args:
        rows: The data set, its `column` cast to ``Image(decode=False)``.
        column: The column of pictures.
        spec: What each row becomes: (height, width, channels) uint8.
        resize: Crop centrally and resize to the spec; else a picture of another size is refused.
        recolour: Make colour pictures grey where the spec is grey; else they are refused.
        key: The config node, for messages.
    """

    rows: datasets.Dataset
    column: str
    spec: InputSpec
    resize: bool
    recolour: bool
    key: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """(n, height, width, channels) uint8. Raises `DistillError` for a picture that can't be read or won't fit."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        pixels = np.empty((len(rows), *self.spec.shape), dtype=np.uint8)
        if len(rows):
            for i, value in enumerate(self.rows[rows.tolist()][self.column]):
                pixels[i] = self._pixels(value, int(rows[i]))
        return pixels

    def _pixels(self, value: Any, row: int) -> np.ndarray:
        image = decode(value, row, self.key)
        height, width, channels = self.spec.shape
        if not self.resize and image.size != (width, height):
            raise DistillError(
                f"picture {row} is {image.height}x{image.width}, others are {height}x{width}; "
                f"set {self.key}.image_size=… to resize all of them",
                f"{self.key}.image_size",
            )
        if not self.recolour and channels == 1 and image.mode not in GREY_MODES:
            raise DistillError(
                f"picture {row} has colours, others are grey; set {self.key}.channels=3 (or 1 to make all grey)",
                f"{self.key}.channels",
            )
        return to_pixels(image, self.spec)


def decode(value: Any, row: int, key: str) -> Image:
    """The picture in an undecoded cell. Raises `DistillError` where there is none."""
    import datasets

    try:
        if value is None:
            raise ValueError("the cell is empty")
        image = datasets.Image().decode_example(value)
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise ValueError(f"pixels of mode {image.mode}, not 8-bit grey or colour")
        return image
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises each of them for damaged files
        raise DistillError(
            f"picture {row} can't be read ({' '.join(str(error).split())}); mend or drop it", key
        ) from error


def to_pixels(image: Image, spec: InputSpec) -> np.ndarray:
    """(height, width, channels) uint8 of the spec: the largest central part of its proportions, resized (bilinear)."""
    from PIL import Image as pil
    from PIL import ImageOps

    height, width, channels = spec.shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), pil.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def fit_pixels(pixels: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Pixels (n, h, w, 1 or 3) uint8 as (n, height, width, channels) of the spec."""
    if pixels.shape[1:] == spec.shape:
        return pixels
    from PIL import Image as pil

    fitted = np.empty((len(pixels), *spec.shape), dtype=np.uint8)
    for i, row in enumerate(pixels):
        fitted[i] = to_pixels(pil.fromarray(row[:, :, 0] if row.shape[2] == 1 else row), spec)
    return fitted
