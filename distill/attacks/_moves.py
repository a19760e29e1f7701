"""What the attacks share that move inputs along a student's gradient: the steps, and rounds of asking about them.

Steps, bounds and norms are those of the inputs as they are asked: pixels in [0, 1]. What a network does with them
inside, such as a normalisation, is its own affair. A table's columns are measured in their standard deviations among
the seeds, and stay inside the range that the seeds have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from distill.attacks._options import at_least, one_of, positive
from distill.attacks.rounds import random_rows
from distill.contracts import Apprentice, Learner, Oracle
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import Answers, Examples, InputSpec, Queries, Reveals, TransferSet

ROWS_AT_ONCE = 256  # of one forward and backward pass

# From (m, classes) logits and tensors of m rows to m numbers, each of which is to become small.
Aim = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Box:
    """Where inputs may lie, and how long a step of 1 is: numbers, or (features,) float32.

    Args:
        low: Smallest values.
        high: Largest values.
        unit: Lengths.
    """

    low: np.ndarray
    high: np.ndarray
    unit: np.ndarray

    @classmethod
    def around(cls, spec: InputSpec, seeds: np.ndarray) -> Box:
        """[0, 1] for images; of a table the range and standard deviation of each column in `seeds`."""
        if spec.kind == "image":
            zero, one = np.zeros((), np.float32), np.ones((), np.float32)
            return cls(zero, one, one)
        deviation = seeds.std(axis=0)
        return cls(seeds.min(axis=0), seeds.max(axis=0), np.where(deviation > 0, deviation, np.float32(1)))


def as_floats(inputs: np.ndarray) -> np.ndarray:
    """A float32 copy: bytes of a picture as pixels in [0, 1]."""
    return inputs / np.float32(255) if inputs.dtype == np.uint8 else inputs.astype(np.float32)


def moved(
    learner: Learner,
    starts: np.ndarray,
    aim: Aim,
    about: tuple[np.ndarray, ...],
    box: Box,
    *,
    norm: str,
    radius: float,
    step: float,
    steps: int,
) -> np.ndarray:
    """Projected gradient descent on `aim` from every input at once, with one gradient of each in a step.

    x <- clip(start + P(x - step * d(gradient) - start)), where d is the sign ("linf") or the gradient divided by its
    length ("l2"), and P the projection onto the ball of this norm. `starts` stays as it is.

    Args:
        learner: Whose logits `aim` is about; put in evaluation mode.
        starts: (n, ...) float32 inside the box.
        aim: See `Aim`.
        about: Arrays of n rows, handed to `aim` as tensors besides the logits.
        box: Where the results lie.
        norm: "linf" or "l2".
        radius: How far from its start an input may end, in this norm and in the box's units.
        step: Length of a step, likewise.
        steps: How many.

    Returns:
        (n, ...) float32.
    """
    learner.module.eval()
    low, high, unit = (torch.from_numpy(bound).to(learner.device) for bound in (box.low, box.high, box.unit))
    parts = [np.empty((0, *starts.shape[1:]), np.float32)]
    for first in range(0, len(starts), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        start = torch.from_numpy(starts[rows]).to(learner.device)
        constants = [torch.from_numpy(column[rows]).to(learner.device) for column in about]
        least, most = (low - start) / unit, (high - start) / unit
        by = torch.zeros_like(start)
        for _ in range(steps):
            inputs = (start + by * unit).clamp(low, high).requires_grad_()
            (gradient,) = torch.autograd.grad(aim(learner.logits(inputs), *constants).sum(), inputs)
            by = by - step * _direction(gradient * unit, norm)
            by = torch.clamp(_within(by, norm, radius), least, most)  # both hold 0, so neither undoes the other
        parts.append((start + by * unit).clamp(low, high).cpu().numpy())
    return np.concatenate(parts)


def _direction(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """Of length 1 in its norm; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _lengths(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)


def _within(by: torch.Tensor, norm: str, radius: float) -> torch.Tensor:
    """The nearest point of the ball."""
    if norm == "linf":
        return by.clamp(-radius, radius)
    return by * (radius / _lengths(by).clamp(min=radius))


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each row, to be broadcast against them."""
    return rows.flatten(1).norm(dim=1).reshape(-1, *[1] * (rows.dim() - 1))


def towards(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability of a class. Its gradient's sign is that of minus the probability, but does not vanish
    with it."""
    return functional.cross_entropy(logits, classes, reduction="none")


def away_from(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The log-probability of a class."""
    return -towards(logits, classes)


class Grown:
    """Seeds and what was made of them: all that was asked and answered so far.

    Attributes:
        inputs: (n, ...) float32, what was asked; never written to.
        answers: n answers.
    """

    def __init__(self, oracle: Oracle, pool: Examples, rows: np.ndarray, note: str) -> None:
        """Asks about `rows` of the pool."""
        self._oracle, self._pool, self._rows, self._note = oracle, pool, rows, note
        self.inputs = as_floats(pool.inputs[rows])
        self.answers = oracle.ask(Queries.of_pool(pool, rows))

    def __len__(self) -> int:
        return len(self.inputs)

    def ask(self, made: np.ndarray) -> None:
        """Ask about inputs that the attack made."""
        self.answers = Answers.join([self.answers, self._oracle.ask(Queries.made(made))])
        self.inputs = np.concatenate([self.inputs, made])

    def transfer_set(self) -> TransferSet:
        made = self.inputs[len(self._rows) :]
        return TransferSet(
            rows=np.concatenate([self._rows, np.full(len(made), -1, dtype=np.int64)]),
            posteriors=self.answers.posteriors,
            made=made if len(made) else None,
            logits=self.answers.logits,
            pool=self._pool.fingerprint,
            profile=str(self._oracle.profile),
            note=self._note,
        )


class SeededAttack:
    """Asks about random rows of the pool, the seeds, and then about inputs made from what it has.

    The seeds are the first rows that `KnockoffRandom` asks about with the same seed of the run.

    Args:
        seeds: How many.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image", "table")

    def __init__(self, seeds: int) -> None:
        at_least(1, seeds=seeds)
        self.seeds = seeds

    def grow(
        self, asked: Grown, pool: Examples, student: Apprentice, box: Box, budget: int, rng: np.random.Generator
    ) -> None:
        """Ask until `asked` is as long as the budget."""
        raise NotImplementedError

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. Raises `DistillError` where budget or pool are smaller than the seeds."""
        budget, name = oracle.affordable(), type(self).__name__
        if budget < self.seeds:
            raise DistillError(
                f"pays for {budget} answers, but {name} starts from {self.seeds} (attack.seeds)", "budget"
            )
        if len(pool) < self.seeds:
            raise DistillError(
                f"{pool.name} holds {len(pool)} inputs, but {name} starts from {self.seeds} (attack.seeds)", "pool"
            )
        rng = generator(seed, "attack")
        asked = Grown(oracle, pool, random_rows(pool, self.seeds, rng), f"{name} from {self.seeds} rows of {pool.name}")
        self.grow(asked, pool, student, Box.around(pool.spec, asked.inputs), budget, rng)
        return asked.transfer_set()


class Augmentation(SeededAttack):
    """Rounds that move everything asked so far, with a student trained from fresh weights on it before each.

    The last round moves a random part, so that the budget is spent to the last answer.

    Args:
        seeds: See `SeededAttack`.
        norm: "linf" or "l2".
        reservoir: From round number `reservoir_after` on, at most so many inputs are moved in a round, drawn at random
            from all; None for no bound.
        reservoir_after: See `reservoir`.
    """

    def __init__(self, seeds: int, norm: str, reservoir: int | None, reservoir_after: int) -> None:
        super().__init__(seeds)
        one_of(("linf", "l2"), norm=norm)
        at_least(0, reservoir_after=reservoir_after)
        if reservoir is not None:
            at_least(1, reservoir=reservoir)
        self.norm, self.reservoir, self.reservoir_after = norm, reservoir, reservoir_after

    def points(self, classes: int) -> int:
        """How many inputs are made of one."""
        return 1

    def moves(
        self,
        learner: Learner,
        starts: np.ndarray,
        answers: Answers,
        number: int,
        box: Box,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(n * points, ...) new inputs, those of one start next to each other.

        Args:
            learner: The student of this round.
            starts: (n, ...) float32.
            answers: The oracle's n answers to them.
            number: Of the round, from 0.
            box: Where they may lie.
            rng: For whatever is drawn.
        """
        raise NotImplementedError

    def grow(
        self, asked: Grown, pool: Examples, student: Apprentice, box: Box, budget: int, rng: np.random.Generator
    ) -> None:
        """See `SeededAttack`."""
        points, number = self.points(asked.answers.classes), 0
        while (left := budget - len(asked)) > 0:
            learner = student.fit(asked.transfer_set(), pool)
            most = min(len(asked), math.ceil(left / points))
            if self.reservoir is not None and number >= self.reservoir_after:
                most = min(most, self.reservoir)
            rows = np.sort(rng.permutation(len(asked))[:most])
            made = self.moves(learner, asked.inputs[rows], asked.answers[rows], number, box, rng)
            asked.ask(made[:left])
            number += 1


class TargetedMoves(Augmentation):
    """Several steps towards other classes, each of which is chosen once for each new input.

    Args:
        seeds: See `SeededAttack`.
        k: Inputs made of one, each with a target of its own; fewer where there are fewer other classes.
        epsilon: Radius of the ball.
        step: Length of a step.
        steps: How many.
        norm: See `Augmentation`, as the last two.
        reservoir: See there.
        reservoir_after: See there.
    """

    def __init__(
        self,
        seeds: int,
        k: int,
        epsilon: float,
        step: float,
        steps: int,
        norm: str,
        reservoir: int | None,
        reservoir_after: int,
    ) -> None:
        super().__init__(seeds, norm, reservoir, reservoir_after)
        at_least(1, k=k, steps=steps)
        positive(epsilon=epsilon, step=step)
        self.k, self.epsilon, self.step, self.steps = k, epsilon, step, steps

    def points(self, classes: int) -> int:
        """See `Augmentation`."""
        return min(self.k, classes - 1)

    def preferences(self, learner: Learner, starts: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
        """(n, classes) float: the classes with the largest numbers become the targets, an input's own left out. Random
        ones, unless a subclass knows better."""
        return rng.random((len(starts), classes))

    def moves(
        self,
        learner: Learner,
        starts: np.ndarray,
        answers: Answers,
        number: int,
        box: Box,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """See `Augmentation`."""
        points = self.points(answers.classes)
        liked = self.preferences(learner, starts, answers.classes, rng)
        liked[np.arange(len(starts)), answers.labels] = -np.inf
        targets = np.argsort(-liked, axis=1, kind="stable")[:, :points].reshape(-1)
        return moved(
            learner,
            np.repeat(starts, points, axis=0),
            towards,
            (targets,),
            box,
            norm=self.norm,
            radius=self.epsilon,
            step=self.step,
            steps=self.steps,
        )
