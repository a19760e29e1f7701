from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.config import digest
from distill.contracts import Student, Teacher
from distill.errors import DistillError
from distill.kept import Kept, describe, train_once
from distill.provider.defenses._networks import (
    OUTLIER,
    ROWS,
    Joined,
    MemberNetworks,
    Members,
    logits_of,
    true_labels,
)
from distill.randomness import KeyedRandom, generator
from distill.records import Answers, Dataset, Inputs, InputSpec, InterfaceProfile, Reveals, softmax
from distill.training import Recipe, measure


class Misleader:
    """Distils the teacher into an ensemble whose members stay far from an attacker that learns from them meanwhile.

    Paper: MISLEADER: Defending against Model Extraction with Ensembles of Distilled Models (Cheng, Zheng, Zhu and Dong,
    arXiv 2506.02362, 2025). Each defender d minimises ``alpha T² KL(softmax(z / T) || softmax(d / T)) + (1 - alpha)
    CE(d, label)`` on the teacher's data, z the teacher's logits, minus ``separation KL(d(x') || a(x'))`` on variants x'
    of it, while its attacker a, of the same architecture, minimises that divergence. The ensemble answers with the mean
    of the defenders' posteriors. It was chosen beside Nasty Teacher because its loss can be read in the authors' code.
    Threat model: an attacker who learns from whole posteriors, of inputs like the teacher's data too.
    It answers in the teacher's place; (n, classes) posteriors then pass through. Nothing is claimed of label and
    distance, which are measured against the undefended teacher.
    Departs from the authors' code: defender and attacker take their steps at the same time, with one optimiser, and the
    attacker takes one where theirs takes one of the sum of five equal gradients; the variants (a turn by up to 15°, a
    shift by up to a tenth, a zoom between 0.9 and 1.25, brightness and contrast changed by up to 0.4, no mirror and no
    new colours; in a table, normal noise of a tenth of each column's deviation) are made once; gradients are clipped
    only if the recipe says so.
    Its answers are probabilities and are taken as such, where theirs go through a second softmax in the evaluation.

    Args:
        defenders: The architecture of each; theirs are of three kinds.
        recipe: How each is trained.
        separation: Weight of the divergence from the attacker, one for each defender.
        temperature: T of each.
        alpha: Weight of the teacher's posteriors against the labels, of each.

    Raises:
        DistillError: The lists differ in length, the data has no labels or is text, or an architecture can't read it.
    """

    exposes = InterfaceProfile(Reveals.PROBS)
    keeps_argmax = False
    deterministic = True
    l1_budget: float | None = None
    fingerprint = ""  # until `prepare`

    def __init__(
        self,
        defenders: Sequence[Student],
        recipe: Recipe,
        separation: Sequence[float] = (0.001, 0.05, 0.01),
        temperature: Sequence[float] = (6.0, 4.0, 2.0),
        alpha: Sequence[float] = (0.3, 0.9, 0.3),
    ) -> None:
        for option, values in (("separation", separation), ("temperature", temperature), ("alpha", alpha)):
            if len(values) != len(defenders) or not defenders:
                raise DistillError(
                    f"must have one value for each of the {len(defenders)} defenders, not {len(values)}",
                    f"defense.{option}",
                )
        if not all(value >= 0 and math.isfinite(value) for value in separation):
            raise DistillError(f"must be at least 0, not {list(separation)}", "defense.separation")
        if not all(value > 0 and math.isfinite(value) for value in temperature):
            raise DistillError(f"must be more than 0, not {list(temperature)}", "defense.temperature")
        if not all(0 <= value <= 1 for value in alpha):
            raise DistillError(f"must be between 0 and 1, not {list(alpha)}", "defense.alpha")
        for i, architecture in enumerate(defenders):
            describe(architecture, f"defense.defenders.{i}")
        self.defenders, self.recipe = list(defenders), recipe
        self.separation, self.temperature, self.alpha = list(separation), list(temperature), list(alpha)

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """The ensemble, as a teacher."""
        labels = true_labels(data)
        logits = torch.from_numpy(logits_of(teacher, data.train.inputs, cache))
        inputs = Joined(data.train.inputs, variants(data.train.inputs, data.spec, seed))
        targets = {
            "labels": torch.cat([labels, torch.full_like(labels, OUTLIER)]),
            "teacher": torch.cat([logits, torch.zeros_like(logits)]),
        }
        kept = [
            train_once(
                Members(architecture, 2),
                data.spec,
                2 * data.classes,
                inputs,
                targets,
                _Misleading(self.separation[i], self.temperature[i], self.alpha[i]),
                self.recipe,
                trainer=trainer,
                cache=cache,
                seed=seed,
                name=f"defender {i}",
                key=f"defense.defenders.{i}",
            )
            for i, architecture in enumerate(self.defenders)
        ]
        ensemble = _Ensemble(kept)
        self.fingerprint = ensemble.fingerprint
        return ensemble

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return answers

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        """See `distill.contracts.TensorDefense`."""
        return posteriors


class _Misleading:
    """The losses of a defender and of its attacker, whose logits are the two halves of the output."""

    def __init__(self, separation: float, temperature: float, alpha: float) -> None:
        self.separation, self.temperature, self.alpha = separation, temperature, alpha

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        defender, attacker = output.chunk(2, dim=1)
        labels = targets["labels"]
        known = labels != OUTLIER
        taught = _divergence(targets["teacher"][known] / self.temperature, defender[known] / self.temperature)
        right = torch.nn.functional.cross_entropy(defender[known], labels[known], reduction="sum")
        d, a = defender[~known], attacker[~known]
        return 2 * (
            self.alpha * self.temperature**2 * taught
            + (1 - self.alpha) * right
            - self.separation * _divergence(d, a.detach())
            + _divergence(d.detach(), a)
        )

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["labels"])


def _divergence(of: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """KL of softmaxes, summed over rows."""
    log = of.log_softmax(dim=1)
    return (log.exp() * (log - to.log_softmax(dim=1))).sum()


class _Ensemble:
    """The mean posterior of the defenders."""

    output = Reveals.PROBS
    usd_per_query = 0.0
    remote = False
    rows_at_once = ROWS

    def __init__(self, kept: Sequence[Kept]) -> None:
        self._kept = kept
        self.fingerprint = digest([network.fingerprint for network in kept], length=32)
        # Half of each belongs to its attacker, which does not answer.
        self.parameters: int | None = sum(network.record["parameters"] for network in kept) // 2
        self.flops_per_query: float | None = sum(network.record["flops_per_query"] for network in kept) / 2

    def prepare(self, data: Dataset, trainer: Any, cache: Path) -> None:
        """It was trained already."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 posteriors."""
        answers = [softmax(np.split(network.predict(inputs), 2, axis=1)[0]) for network in self._kept]
        return np.stack(answers).mean(axis=0)

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one forward pass of all defenders with one row."""
        seconds = 0.0
        for network in self._kept:
            assert isinstance(network.module, MemberNetworks)
            features = network.architecture.encode(one, network.spec)
            seconds += measure(network.module.networks[0], features)["latency_s"]
        return seconds


def variants(inputs: Inputs, spec: InputSpec, seed: int) -> np.ndarray:
    """A variant of each of n inputs. Raises `DistillError` for texts."""
    if spec.kind == "text":
        raise DistillError("makes variants of pictures and tables, but the victim takes texts", "defense")
    rng, rows = generator(seed, "defense", "variants"), inputs[:]
    if spec.kind == "table":
        return (rows + 0.1 * rows.std(axis=0) * rng.standard_normal(rows.shape)).astype(np.float32)
    made = np.empty_like(rows)
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        made[part] = _moved(rows[part], rng)
    return made


def _moved(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    def drawn(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, len(pictures)).astype(np.float32))

    angle, zoom = drawn(-math.pi / 12, math.pi / 12), drawn(0.9, 1.25)
    right, down = drawn(-0.2, 0.2), drawn(-0.2, 0.2)  # a picture is 2 wide
    across, along = angle.cos() / zoom, angle.sin() / zoom
    affine = torch.stack([across, -along, right, along, across, down], dim=1).view(-1, 2, 3)
    white = 255 if pictures.dtype == np.uint8 else 1
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / white
    grid = torch.nn.functional.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = torch.nn.functional.grid_sample(pixels, grid, align_corners=False)
    pixels = pixels * drawn(0.6, 1.4).view(-1, 1, 1, 1)
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = white * (mean + drawn(0.6, 1.4).view(-1, 1, 1, 1) * (pixels - mean)).clamp(0, 1)
    return (pixels.round() if white == 255 else pixels).permute(0, 2, 3, 1).numpy().astype(pictures.dtype)
