from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge, Learner
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import ROWS_AT_ONCE, Examples, TransferSet, softmax


class PseudoLabels:
    """A semi-supervised student: it also learns from unlabelled pool inputs, whose labels a student before it guessed.

    Paper: MixMatch: A Holistic Approach to Semi-Supervised Learning, Berthelot et al., NeurIPS 2019, sec. 3.2 (the
    guess: the mean over `guesses` weak augmentations, sharpened to p^(1/T)); FixMatch: Simplifying Semi-Supervised
    Learning with Consistency and Confidence, Sohn et al., NeurIPS 2020, sec. 2.2 (only confident guesses count, and a
    strongly augmented copy learns them). Threat model: the attacker's pool holds more inputs than its budget pays
    answers for; nothing of this is a query; knows nothing of the defense, and believes its answers.

    In each round a student learns from the answers, and from what the round before added; it guesses the labels of
    `ratio` times as many unasked rows of the pool as there are answers. Of each row whose mean guess is at least
    `threshold` for one class, one strongly augmented copy is added with the sharpened guess. The answered queries are
    there `ratio` times, once as they are and else weakly augmented, so that both kinds weigh as in FixMatch's loss with
    weight 1. The run's own student learns from the last round's set. Weak augmentation of an image is a shift (and, for
    half of them, mirroring); the strong one also scales contrast and brightness and cuts a square out. Tables and texts
    are taken as they are (Lee, ICML 2013 workshop).

    Departs from the papers, which guess and augment anew at each step: labels are guessed `rounds` times, by students
    trained to the end; a row has one strong copy, whose strength is not that of RandAugment; there is no MixUp. An
    epoch has up to 2 × `ratio` times as many rows, so the same `training.epochs` are more steps: compare it with a
    student that is trained for as many.

    Args:
        rounds: How often labels are guessed.
        ratio: Unasked rows that are looked at, for each answer.
        threshold: The least probability of a confident guess.
        temperature: T of the sharpening.
        guesses: Weak augmentations whose mean is a guess.
        shift: Largest shift of an image, as a share of its height and width.
        mirror: Mirror half of the images, left to right: not for digits.
        cutout: Side of the square that is cut out, as a share of the image's; the image's mean takes its place.

    Raises:
        DistillError: An option is out of its range.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(
        self,
        rounds: int = 2,
        ratio: float = 7.0,
        threshold: float = 0.95,
        temperature: float = 0.5,
        guesses: int = 2,
        shift: float = 0.125,
        mirror: bool = False,
        cutout: float = 0.5,
    ) -> None:
        for name, count in (("rounds", rounds), ("guesses", guesses)):
            if count < 1:
                raise DistillError(f"{name} is at least 1, not {count}")
        for name, value in (("ratio", ratio), ("temperature", temperature)):
            if not (value > 0 and math.isfinite(value)):
                raise DistillError(f"{name} is more than 0, not {value}")
        for name, value in (("threshold", threshold), ("shift", shift), ("cutout", cutout)):
            if not 0 <= value <= 1:
                raise DistillError(f"{name} lies between 0 and 1, not {value}")
        self.rounds, self.ratio, self.threshold, self.temperature = rounds, ratio, threshold, temperature
        self.guesses, self.shift, self.mirror, self.cutout = guesses, shift, mirror, cutout

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """The answers, with `targets` = `posteriors`, copies of them, and the confident rows; logits are dropped."""
        pool, rng = knowledge.pool, generator(knowledge.seed, "pseudo labels")
        answered = replace(transfer_set, targets=transfer_set.posteriors, logits=None, groups=None)
        unasked = rng.permutation(np.setdiff1d(np.arange(len(pool)), transfer_set.rows))
        rows = np.sort(unasked[: round(self.ratio * len(transfer_set))])
        if not len(rows):
            return answered
        answered = self._repeated(answered, pool, rng)
        grown = answered
        for _ in range(self.rounds):
            guessed = self._guess(knowledge.student.fit(grown, pool), pool, rows, rng)
            confident = guessed.max(axis=1) >= self.threshold
            grown = self._grown(answered, pool, rows[confident], self._sharpened(guessed[confident]), rng)
        added = len(grown) - len(answered)
        return replace(grown, note=f"{transfer_set.note}; {added} of {len(rows)} unasked rows have a pseudo-label")

    def _guess(self, student: Learner, pool: Examples, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n, classes): the mean over weak augmentations."""
        parts = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            inputs = pool.inputs[rows[start : start + ROWS_AT_ONCE]]
            if pool.spec.kind != "image":
                parts.append(softmax(student.predict(inputs)))
                continue
            guesses = [softmax(student.predict(self._weak(inputs, rng))) for _ in range(self.guesses)]
            parts.append(np.stack(guesses).mean(axis=0, dtype=np.float64))
        return np.concatenate(parts)

    def _sharpened(self, guessed: np.ndarray) -> np.ndarray:
        """p^(1/T), normalised."""
        return softmax(np.log(np.maximum(guessed.astype(np.float64), 1e-30)) / self.temperature)

    def _repeated(self, answered: TransferSet, pool: Examples, rng: np.random.Generator) -> TransferSet:
        """The answered queries `ratio` times, to the next whole number."""
        again = np.tile(np.arange(len(answered)), max(0, round(self.ratio) - 1))
        if pool.spec.kind != "image":
            return answered.take(np.concatenate([np.arange(len(answered)), again]))
        copies = self._weak(answered.inputs(pool)[again], rng)
        return _with_images(answered, copies, answered.posteriors[again])

    def _grown(
        self, answered: TransferSet, pool: Examples, rows: np.ndarray, targets: np.ndarray, rng: np.random.Generator
    ) -> TransferSet:
        """The answered queries, then these rows of the pool."""
        if pool.spec.kind == "image":
            return _with_images(answered, self._strong(pool.inputs[rows], rng), targets)
        posteriors = np.concatenate([answered.posteriors, targets])
        every = np.concatenate([answered.rows, rows])
        return replace(answered, rows=every, posteriors=posteriors, targets=posteriors, pool=pool.fingerprint)

    def _weak(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shifted, edge pixels filling what becomes free, and mirrored."""
        places = []
        for size in images.shape[1:3]:
            most = round(self.shift * size)
            by = rng.integers(-most, most + 1, len(images))
            places.append(np.clip(np.arange(size) + by[:, None], 0, size - 1))
        down, across = places
        if self.mirror:
            across = np.where(rng.random(len(images))[:, None] < 0.5, across[:, ::-1], across)
        return images[np.arange(len(images))[:, None, None], down[:, :, None], across[:, None, :]]

    def _strong(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shifted, mirrored, of other contrast and brightness, and with a square cut out: inside the pixels' range."""
        top = 255 if images.dtype == np.uint8 else 1
        one = (len(images), 1, 1, 1)
        moved = self._weak(images, rng).astype(np.float32) / top
        mean = moved.mean(axis=(1, 2), keepdims=True)
        contrast, brightness = rng.uniform(0.5, 1.5, one), rng.uniform(-0.2, 0.2, one)
        moved = np.where(self._square(images.shape, rng), mean, mean + contrast * (moved - mean)) + brightness
        pixels = top * np.clip(moved, 0, 1)
        return (np.rint(pixels) if top == 255 else pixels).astype(images.dtype)

    def _square(self, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        """(n, height, width, 1) bool: True inside of a square whose centre lies anywhere in the image."""
        inside = []
        for size in shape[1:3]:
            side = round(self.cutout * size)
            first = rng.integers(0, size, shape[0])[:, None] - side // 2
            inside.append((np.arange(size) >= first) & (np.arange(size) < first + side))
        return inside[0][:, :, None, None] & inside[1][:, None, :, None]


def _with_images(transfer_set: TransferSet, images: np.ndarray, targets: np.ndarray) -> TransferSet:
    """Its queries, then these images with their targets."""
    made = transfer_set.made
    if made is not None:
        if made.dtype != images.dtype:  # an attack makes images in [0, 1]
            made, images = (part / np.float32(255) if part.dtype == np.uint8 else part for part in (made, images))
        images = np.concatenate([made, images])
    posteriors = np.concatenate([transfer_set.posteriors, targets])
    return replace(
        transfer_set,
        rows=np.concatenate([transfer_set.rows, np.full(len(targets), -1)]),
        posteriors=posteriors,
        targets=posteriors,
        made=images if len(images) else None,
    )
