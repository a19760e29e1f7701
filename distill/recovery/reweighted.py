from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from distill.errors import DistillError
from distill.language import SyntheticSet

log = logging.getLogger(__name__)


class Reweighted:
    """Answers count the more, the more a step on them helps the attacker's student with examples of its own.

    Paper: The Distillation Game: Adaptive Attacks and Efficient Defenses, Allouah et al., arXiv 2605.22737, 2026 (the
    adaptive student). Answer i counts ``w_i ~ exp(beta clip(a_i, -clip, clip))``, of mean 1, where

        ``a_i = [l_i(theta + epsilon g) - l_i(theta - epsilon g)] / (2 epsilon)``,

    l_i the student's loss per token on answer i and g the gradient of its loss per token on the own examples. To first
    order a_i is ``<grad l_i, g>``: what a gradient step on answer i takes off the loss on the own examples, per unit of
    learning rate. It is positive where the step helps.

    Threat model: labelled examples of the attacker's own, which are not among the answers; text alone. Nothing more is
    asked of the provider; it costs one more training, one gradient and two forward passes over the answers.

    Departs from the authors' code: that has the two losses of a_i the other way round, which makes what helps count
    less; its theta is a pretrained model before any training, of which a student from fresh weights knows nothing, so
    here theta has learnt from all answers alike; its loss is a mean over answers of their losses per token, where
    `distill.training` divides the weighted sum over tokens by their number; and the weights that lie within one of
    `levels` equal parts of the range of their logarithm become their mean, since the loss is computed once for each
    weight that occurs.

    Args:
        beta: Strength; 0 leaves all answers alike.
        epsilon: Step along the gradient.
        clip: Largest |a_i| that counts.
        levels: How many weights there are at most.

    Raises:
        DistillError: A number is out of range.
    """

    knows: ClassVar[str] = "own labelled examples"

    def __init__(self, beta: float = 0.5, epsilon: float = 0.01, clip: float = 10.0, levels: int = 16) -> None:
        if not beta >= 0:
            raise DistillError(f"must be at least 0, not {beta}", "recovery.beta")
        for name, value in (("epsilon", epsilon), ("clip", clip)):
            if not value > 0:
                raise DistillError(f"must be more than 0, not {value}", f"recovery.{name}")
        if levels < 1:
            raise DistillError(f"must be at least 1, not {levels}", "recovery.levels")
        self.beta, self.epsilon, self.clip, self.levels = beta, epsilon, clip, levels

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """The same answers with weights. ``knowledge`` has "own" and "student", as of `distill.contracts.Curation`.

        Raises `DistillError` where there are no own examples.
        """
        if not len(knowledge["own"]):
            raise DistillError("reweighted measures on labelled examples of one's own; set how many", "own_examples")
        if not len(synthetic):
            return synthetic
        student = knowledge["student"].fit(synthetic)
        helps = self.advantages(student, synthetic, knowledge["own"])
        exponents = self.beta * helps.clip(-self.clip, self.clip)
        weights = _of_levels(np.exp(exponents - exponents.max()), exponents, self.levels)
        top = np.sort(weights)[::-1][: max(1, len(weights) // 5)]
        log.info(
            "weights from %.3g to %.3g; a fifth of the answers has %.0f %% of them",
            *(weights.min(), weights.max(), 100 * top.sum() / weights.sum()),
        )
        return replace(synthetic, weights=weights.astype(np.float32))

    def advantages(self, student: Any, synthetic: SyntheticSet, own: SyntheticSet) -> np.ndarray:
        """(n,) float64: a_i of each answer, in nats squared per unit of squared weights; 0 for an empty answer.

        Args:
            student: A `distill.contracts.TrainedLanguage`: theta.
            synthetic: n answers.
            own: The examples that g is of.
        """
        from distill.held_out_gradient import answer_losses, gradient, moved
        from distill.packing import encode

        direction = gradient(student.module, encode(own, student.tokenizer))
        answers = encode(synthetic, student.tokenizer)
        lengths = np.array([max(1, len(answer)) for answer in answers.answers])
        ahead, behind = (
            answer_losses(moved(student.module, direction, step), answers) for step in (self.epsilon, -self.epsilon)
        )
        return (ahead - behind) / lengths / (2 * self.epsilon)


def _of_levels(weights: np.ndarray, exponents: np.ndarray, levels: int) -> np.ndarray:
    """Weights of mean 1; those in one of `levels` equal parts of the range of `exponents` become their mean."""
    low, high = exponents.min(), exponents.max()
    part = np.zeros(len(weights), dtype=np.int64)
    if high > low:
        part = np.minimum((levels * (exponents - low) / (high - low)).astype(np.int64), levels - 1)
    means = np.bincount(part, weights) / np.maximum(np.bincount(part), 1)
    return means[part] / weights.mean()
