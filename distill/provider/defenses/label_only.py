from __future__ import annotations

import numpy as np
import torch

from distill.provider.defenses._tensors import straight_through
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals, one_hot


class LabelOnly:
    """Reveals the label alone, as a one-hot posterior.

    Paper: Stealing Machine Learning Models via Prediction APIs (Tramèr et al., USENIX Security 2016).
    Threat model: a black-box attacker who sees the answers; the label itself stays true, so copycat attacks still work.
    (n, classes) posteriors in and out; the first of equal entries is the label. An answer moves by
    ``2 (1 - max posterior)`` in L1, which has no bound below 2.
    """

    exposes = InterfaceProfile(Reveals.LABEL)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = None

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return Answers(one_hot(answers.labels, answers.classes))

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        label = torch.nn.functional.one_hot(posteriors.argmax(dim=1), posteriors.shape[1])
        return straight_through(label, posteriors)
