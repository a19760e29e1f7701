from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from distill.attacks._own import numbers
from distill.attacks._views import views
from distill.attacks.copycat import Copycat
from distill.contracts import Apprentice, Oracle
from distill.errors import DistillError
from distill.randomness import derive
from distill.records import Examples, TransferSet

CPU = torch.device("cpu")
ROWS_AT_ONCE = 1024


class CopycatAugmented(Copycat):
    """As `Copycat`, and its own student is trained on altered copies of the answered images too.

    Paper: Copycat CNN: Stealing Knowledge by Persuading Confession with Random Non-Labeled Data, Correia-Silva et al.,
    IJCNN 2018 (the transfer set is augmented before training). Threat model: label-only access, a pool of unlabelled
    images.

    A copy takes the label that was answered to its image and is never asked about, so it costs no query and is no part
    of the transfer set: track A is that of `Copycat`. The attack's own student (track B) is trained as track A is, with
    the run's recipe and objective and no recovery, on images and copies together; an epoch has ``copies + 1`` times as
    many steps. It is shown once, at the end.

    Departs from the paper, whose list of some twenty alterations is not known to us in detail: a copy is cropped,
    turned and lit at random. It asks the same whatever its student is, but says that it adapts, because what its own
    student learnt is kept beside the answers.

    Args:
        copies: Altered copies of each image.
        crop: The least share of its height and width that a copy shows.
        turn: Largest turn to either side, in degrees.
        intensity: Brightness and contrast change by up to this share.
        mirror: Mirror half of the copies, left to right: not for digits.

    Raises:
        DistillError: An option is out of its range.
    """

    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        copies: int = 4,
        crop: float = 0.8,
        turn: float = 10.0,
        intensity: float = 0.2,
        mirror: bool = False,
    ) -> None:
        super().__init__()
        if copies < 1:
            raise DistillError(f"copies is at least 1, not {copies}")
        if not 0 < crop <= 1:
            raise DistillError(f"crop is more than 0 and at most 1, not {crop}")
        if not 0 <= turn <= 180:
            raise DistillError(f"turn lies between 0 and 180 degrees, not {turn}")
        if not 0 <= intensity < 1:
            raise DistillError(f"intensity is at least 0 and below 1, not {intensity}")
        self.copies, self.crop, self.turn, self.intensity, self.mirror = copies, crop, turn, intensity, mirror

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """As `Copycat`; the copies are made, learnt from and forgotten."""
        asked = super().extract(oracle, pool, student, seed)
        student.show(student.fit(self.augmented(asked, pool, seed), pool), len(asked))
        return asked

    def augmented(self, asked: TransferSet, pool: Examples, seed: int) -> TransferSet:
        """The answered images, then `copies` altered copies of all of them; its `targets` are the labels."""
        rng = torch.Generator().manual_seed(derive(seed, "attack", "copies"))
        made = []
        for _ in range(self.copies):
            for start in range(0, len(asked), ROWS_AT_ONCE):
                images = numbers(pool.inputs[asked.rows[start : start + ROWS_AT_ONCE]], CPU)
                altered = views(
                    *(images, rng), crop=self.crop, turn=self.turn, intensity=self.intensity, mirror=self.mirror
                )
                made.append((255 * altered).round().to(torch.uint8).numpy())
        posteriors = np.tile(asked.posteriors, (1 + self.copies, 1))
        return replace(
            asked,
            rows=np.concatenate([asked.rows, np.full(self.copies * len(asked), -1, dtype=np.int64)]),
            posteriors=posteriors,
            targets=posteriors,
            made=np.concatenate(made),
        )
