from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from distill.errors import DistillError
from distill.provider.defenses._tensors import straight_through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

ROWS = 1024  # rows, and codewords, that are compared at once
FIRST = 32  # codewords that each row is compared with at first; every further step takes twice as many


class ModelGuardS:
    """Ordered incremental vector quantisation: every answer is an earlier clean one of the same label and nearby.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks (Tang et al., USENIX Security
    2024), section 3.5 (ModelGuard-S). Each label has an ordered codebook. A posterior is answered with the first
    codeword within `l1_budget` of it; where there is none, it is returned as it is and becomes the last codeword.
    Threat model: a black-box attacker who sees the answers; training on the top-1 label is a way around it. One who
    knows the code and asked every question so far can rebuild the codebook: the distinct answers, in the order in
    which they first came, are what `restore` takes as "codewords".
    (n, classes) posteriors in and out. It remembers: an answer depends on the rows before it, one by one, whatever the
    batches. `transform` quantises with the codebook as it is and adds nothing to it: rows that find no codeword stay.
    Departs from the code in that no data set fills the codebook beforehand. Rows go through it without a loop over
    them: only those that become codewords are handled one by one.

    Args:
        l1_budget: The paper's ε: more than 0, at most 2.
        nearest: Answer with the nearest codeword within the budget, not the first. A repeated query may then get
            another answer later.
    """

    exposes = InterfaceProfile(Reveals.LOGITS)
    keeps_argmax = True
    l1_budget: float | None = 1.0

    def __init__(self, l1_budget: float = 1.0, nearest: bool = False) -> None:
        if not 0 < l1_budget <= 2:
            raise DistillError(f"must be more than 0 and at most 2, not {l1_budget}", "defense.l1_budget")
        self.l1_budget = self._budget = l1_budget
        self.nearest = nearest
        self.deterministic = not nearest
        self._codewords = np.zeros((0, 0), np.float32)  # of all labels, in order

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        returned = [self._answer(answers.posteriors[row : row + ROWS]) for row in range(0, len(answers), ROWS)]
        return Answers(np.concatenate([answers.posteriors[:0], *returned]))

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            codewords = torch.from_numpy(self._codewords).to(posteriors)
            quantised = torch.cat([self._quantised(part, codewords)[0] for part in posteriors.split(ROWS)])
        return straight_through(quantised, posteriors)

    def state(self) -> dict[str, np.ndarray]:
        """ "codewords": (m, classes) float32, those of all labels in the order in which they came."""
        return {"codewords": self._codewords.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._codewords = np.array(state["codewords"], np.float32)

    def _answer(self, clean: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(clean.astype(np.float64))
        quantised, reached = self._quantised(rows, torch.from_numpy(self._codewords.astype(np.float64)))
        returned, reach, labels = quantised.numpy().astype(np.float32), reached.numpy(), clean.argmax(axis=1)
        added: list[int] = []
        for label in np.unique(labels[np.isinf(reach)]):  # the first that found nothing is a codeword for those behind
            same = np.flatnonzero(labels == label)
            waiting = same[np.isinf(reach[same])]
            same = same if self.nearest else waiting
            away = torch.cdist(rows[waiting], rows[same], p=1).numpy()
            rank = np.where((away <= self._budget) & (same > waiting[:, None]), away if self.nearest else 0.0, np.inf)
            for new, ranks in zip(waiting, rank, strict=True):
                if np.isinf(reach[new]):
                    added.append(new)
                    better = ranks < reach[same]
                    returned[same[better]], reach[same[better]] = clean[new], ranks[better]
        if added:
            self._codewords = np.concatenate([self._codewords.reshape(-1, clean.shape[1]), clean[np.sort(added)]])
        return returned

    def _quantised(self, rows: torch.Tensor, codewords: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's codeword, or the row itself; and (n,) how far that is (of the first codeword: its place), infinite
        where there is none."""
        quantised, reach = rows.clone(), torch.full_like(rows[:, 0], torch.inf)
        if not len(codewords):
            return quantised, reach
        labels, of_label = rows.argmax(dim=1), codewords.argmax(dim=1)
        for label in labels.unique():
            left = (labels == label).nonzero()[:, 0]
            book = codewords[of_label == label]
            start, size = 0, FIRST
            while start < len(book) and len(left):
                part = book[start : start + size]
                away = torch.cdist(rows[left], part, p=1)
                rank = away if self.nearest else torch.arange(start, start + len(part)).to(away).expand_as(away)
                best, place = torch.where(away <= self._budget, rank, torch.inf).min(dim=1)
                found = best < reach[left]
                reach[left[found]], quantised[left[found]] = best[found], part[place[found]]
                left = left if self.nearest else left[~found]
                start, size = start + size, min(2 * size, ROWS)
        return quantised, reach
