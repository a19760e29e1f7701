from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from distill.contracts import Defense, Knowledge, NetworkDefense
from distill.errors import DistillError
from distill.randomness import generator
from distill.records import TransferSet
from distill.recovery._restorer import check, restored, shadow_answers, simulated, trained
from distill.training import Recipe

log = logging.getLogger(__name__)

FLOOR = 1e-7
SHARPEST = 0.4  # temperature
ENOUGH = 20_000  # answers of each candidate, all those of a shadow model or none


class DDAEIdentified:
    """D-DAE against a defense that is not known: which of several candidates it is, is told from the answers first.

    Paper: D-DAE: Defense-Penetrating Model Extraction Attacks, Chen et al., IEEE S&P 2023 (its
    meta-classifier). The answers of shadow models are put through each candidate; a classifier learns to tell from a
    single answer which it went through, and the candidate with the largest log-probability, averaged over all answers
    that were received, is taken for the deployed one. Then as `ddae`. Threat model: the attacker knows the candidates'
    code and options, and not which is deployed; it asks nothing more than what it asked.

    Departs from the paper, whose classifier learns which inputs to ask and trains 2,048 shadow models: this one sees of
    an answer its entries in descending order, the logarithms of these, and how often it was received; the shadow models
    are those of `ddae`, their answers sharpened by random temperatures. Defenses that do nearly the same (weak noise
    and none) may be taken for one another, and where a defense changes most labels, shadow models are poor. A candidate
    with networks of its own is refused, since the attacker would have to train them for each; so is a chain.

    Args:
        candidates: Defenses, at least two.
        shadows, share, epochs: As of `ddae`.

    Raises:
        DistillError: An option is out of range, or a candidate is a chain or has networks.
    """

    knows: ClassVar[str] = "nothing"

    def __init__(self, candidates: Sequence[Defense], shadows: int = 20, share: float = 0.8, epochs: int = 200) -> None:
        check(shadows=shadows, share=share, epochs=epochs)
        if len(candidates) < 2:
            raise DistillError("candidates must be at least two defenses")
        for candidate in candidates:
            if isinstance(candidate, NetworkDefense):
                name = type(candidate).__name__
                raise DistillError(f"candidates can't be chains or defenses with networks, such as {name}")
        self.candidates = list(candidates)
        self.shadows, self.share, self.epochs = shadows, share, epochs

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the restored answers, (n, classes), and a `note` of what was identified; logits are dropped."""
        clean = shadow_answers(transfer_set, knowledge, self.shadows, self.share)
        evidence = self._evidence(clean, transfer_set, knowledge)
        found = int(evidence.argmax())
        name = type(self.candidates[found]).__name__
        log.info("identified %s: %s nats an answer", name, evidence.round(3).tolist())
        returned = simulated(self.candidates[found], clean, transfer_set, knowledge)
        recovered = restored(transfer_set, returned, clean, knowledge, self.epochs)
        told = f"identified {name} (candidate {found}, {evidence[found]:.2f} nats an answer)"
        return replace(recovered, note="; ".join(filter(None, [transfer_set.note, told])))

    def _evidence(self, clean: np.ndarray, transfer_set: TransferSet, knowledge: Knowledge) -> np.ndarray:
        """(candidates,): the mean log-probability that each gives to the answers that were received."""
        rng, n = generator(knowledge.seed, "identifier"), len(transfer_set)
        clean = clean[: max(1, ENOUGH // n) * n]
        # Shadow models know less than the teacher and so are less sure; the classifier must not take that for a sign.
        powers = 1 / rng.uniform(SHARPEST, 1.0, size=(len(clean), 1))
        sharper = (clean / clean.max(axis=1, keepdims=True)) ** powers
        sharper = (sharper / sharper.sum(axis=1, keepdims=True)).astype(np.float32)
        rows = []
        for candidate in self.candidates:
            returned = simulated(candidate, sharper, transfer_set, knowledge, remembers=False)
            rows += [_features(returned[start : start + n]) for start in range(0, len(returned), n)]
        kinds = np.repeat(np.arange(len(self.candidates)), len(clean))
        order = rng.permutation(len(kinds))
        classifier = trained(
            "identifier",
            len(self.candidates),
            np.concatenate(rows)[order],
            {"kind": torch.from_numpy(kinds[order])},
            _CrossEntropy(),
            Recipe(epochs=10, batch_size=256, optimizer="adam", lr=1e-3),
            knowledge,
        )
        logits = classifier.predict(_features(transfer_set.posteriors)).astype(np.float64)
        return torch.from_numpy(logits).log_softmax(dim=1).mean(dim=0).numpy()


def _features(answers: np.ndarray) -> np.ndarray:
    """(n, 2 classes + 1) float32 of the n answers to the queries."""
    ordered = -np.sort(-answers, axis=1)  # which class an entry belongs to says nothing of the defense
    logs = np.log(np.maximum(ordered, FLOOR)) / -np.log(FLOOR)
    _, which, times = np.unique(answers, axis=0, return_inverse=True, return_counts=True)
    repeated = np.log(times[which.reshape(-1)]) / np.log(1 + len(answers))
    return np.concatenate([ordered, logs, repeated[:, None]], axis=1, dtype=np.float32)


class _CrossEntropy:
    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(output, targets["kind"], reduction="sum")

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        return len(targets["kind"])
