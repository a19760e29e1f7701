from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from distill.contracts import Defense, Knowledge, Lesson, Objective
from distill.errors import DistillError, Incompatible
from distill.randomness import generator
from distill.records import Inputs, InputSpec, TransferSet

TURNS = 4  # by 0, 90, 180 and 270 degrees, counterclockwise


class S4L:
    """Self-supervision beside the answers: the student also tells by how much unlabelled images of the pool are turned.

    Paper: S4L: Self-Supervised Semi-Supervised Learning, Zhai, Oliver, Kolesnikov and Beyer, ICCV 2019
    (S4L-Rotation, weight 1); as an attack on defended answers in ModelGuard, Tang et al., USENIX Security 2024. Threat
    model: the attacker's pool holds more images than its budget pays answers for; knows nothing of the defense.

    The student has four outputs more while it is trained. The loss is the objective's mean over the answered queries
    plus `weight` times the mean cross-entropy of the turn over all turned images. Departs from the paper: a batch is
    drawn from answered and turned images together, not half from each, and the turned images get no label loss and no
    other augmentation. An epoch has 4 × `images` rows more, so the same `training.epochs` are more steps:
    compare it with a student that is trained for as many.

    Args:
        weight: Of the turn's cross-entropy, more than 0.
        images: How many images of the pool are turned, each in all four ways; null: as many as there are queries.

    Raises:
        DistillError: An option is out of range or, at the answers, the inputs are not square images.
    """

    knows: ClassVar[str] = "nothing"
    extra_outputs: ClassVar[int] = TURNS

    def __init__(self, weight: float = 1.0, images: int | None = None) -> None:
        if not (weight > 0 and math.isfinite(weight)):
            raise DistillError(f"weight must be more than 0, not {weight}")
        if images is not None and images < 1:
            raise DistillError(f"images must be at least 1 or null, not {images}")
        self.weight, self.images = weight, images

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = `posteriors`, (n, classes)."""
        return replace(transfer_set, targets=transfer_set.posteriors)

    def check(self, spec: InputSpec, defense: Defense) -> None:
        """Raises `Incompatible` for all but square images."""
        if spec.kind != "image" or spec.shape[0] != spec.shape[1]:
            found = f"images of {spec.shape[0]}×{spec.shape[1]}" if spec.kind == "image" else f"{spec.kind}s"
            raise Incompatible(f"s4l turns square images, and these inputs are {found}; choose another", "recovery")

    def lesson(self, transfer_set: TransferSet, objective: Objective, knowledge: Knowledge) -> Lesson:
        """The queries, then the turned images; besides the objective's own (0 for these), a target "s4l_turn"."""
        pool, n = knowledge.pool, len(transfer_set)
        drawn = generator(knowledge.seed, "s4l").permutation(len(pool))[: self.images or n]
        turned = TURNS * len(drawn)
        inputs = _WithTurned(transfer_set.inputs(pool), pool.inputs, np.sort(drawn))
        targets = {
            name: torch.cat([tensor, tensor.new_zeros((turned, *tensor.shape[1:]))])
            for name, tensor in objective.prepare(transfer_set).items()
        }
        targets["s4l_turn"] = torch.cat([torch.full((n,), -1), torch.arange(turned) % TURNS])
        scales = (n + turned) / n, self.weight * (n + turned) / turned
        return Lesson(inputs, targets, WithRotation(objective, transfer_set.classes, *scales))


@dataclass(frozen=True)
class _WithTurned:
    """A column of answered inputs, then of some rows of the pool, each turned in all ways one after the other."""

    answered: Inputs
    pool: Inputs
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.answered) + TURNS * len(self.rows)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        rows, n = np.arange(len(self))[index], len(self.answered)
        answered, places = self.answered[rows[rows < n]], rows[rows >= n] - n
        images = self.pool[self.rows[places // TURNS]]
        if images.dtype != answered.dtype:  # an attack makes images in [0, 1]
            images, answered = _scaled(images), _scaled(answered)
        inputs = np.empty((len(rows), *images.shape[1:]), images.dtype)
        inputs[rows < n] = answered
        for turn in range(TURNS):
            at = places % TURNS == turn
            inputs[np.flatnonzero(rows >= n)[at]] = np.rot90(images[at], turn, axes=(1, 2))
        return inputs


def _scaled(images: np.ndarray) -> np.ndarray:
    return images / np.float32(255) if images.dtype == np.uint8 else images


class WithRotation:
    """An objective on the first `classes` outputs of answered rows, and the turn of the others on the rest (a `Loss`).

    Args:
        objective: The objective that was chosen.
        classes: Number of classes.
        label_scale: Multiplies the objective.
        turn_scale: Multiplies the cross-entropy of the turn.
    """

    def __init__(self, objective: Objective, classes: int, label_scale: float, turn_scale: float) -> None:
        self.objective, self.classes = objective, classes
        self.label_scale, self.turn_scale = label_scale, turn_scale

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Summed over rows. `output`: (n, classes + 4)."""
        turns = targets["s4l_turn"]
        answered = turns < 0
        labels = self.objective.loss(
            output[answered, : self.classes], {name: tensor[answered] for name, tensor in targets.items()}
        )
        turned = F.cross_entropy(output[~answered, self.classes :], turns[~answered], reduction="sum")
        return self.label_scale * labels + self.turn_scale * turned

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["s4l_turn"])
