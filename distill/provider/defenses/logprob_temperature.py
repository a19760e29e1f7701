from __future__ import annotations

import math
from dataclasses import replace

import torch

from distill.decoding import Processor
from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._language import Unchanged


class LogprobTemperature(Unchanged):
    """Flattens (above 1) or sharpens (below 1) the log-probabilities that come with a text, and leaves the text alone.

    Paper: Distilling the Knowledge in a Neural Network (Hinton, Vinyals and Dean, 2015), equation 1, applied by the
    provider.
    Threat model: a black-box attacker who sees the answers; knowing `temperature`, it can undo it where it is told the
    whole vocabulary, and up to a constant for each position otherwise.
    What is told of logits z is exactly ``log_softmax(z / temperature)``, whatever else is told: the logits are divided
    before anything is drawn, and the temperature that is drawn with is divided likewise, so that the text is the same
    up to rounding. A teacher behind an API of its own can't be served so: k log-probabilities don't tell the rest. In
    a chain it stands last: what follows would see its logits and its temperature, and text would change.

    Args:
        temperature: More than 0.

    Raises:
        DistillError: It isn't.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise DistillError(f"must be more than 0, not {temperature}", "defense.temperature")
        self.temperature = temperature

    def sampling(self, asked: Sampling) -> Sampling:
        return replace(asked, temperature=asked.temperature / self.temperature)

    def logits_processor(self, sampling: Sampling) -> Processor:
        return self._divided

    def _divided(self, tokens: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        return logits / self.temperature
