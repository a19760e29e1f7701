from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distill.language import Completions, Prompts, Sampling
from distill.randomness import KeyedRandom
from distill.records import Answers, InterfaceProfile, Reveals

if TYPE_CHECKING:
    import torch


class NoDefense:
    """Every answer as the teacher gives it: the undefended arm of a comparison.

    Threat model: none. Posteriors (n, classes) and logits pass through unchanged, and so do texts.
    """

    exposes = InterfaceProfile(Reveals.WEIGHTS, logit_bias=True, prompt_logprobs=True)
    keeps_argmax = True
    deterministic = True
    l1_budget: float | None = 0.0

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        return None

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        return answers

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        return posteriors

    # In the generation domain it is one too.

    @property
    def tokens_read(self) -> int:
        return 0

    def sampling(self, asked: Sampling) -> Sampling:
        return asked

    def logits_processor(self, sampling: Sampling) -> None:
        return None

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        return completions
