from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from distill.language import Evidence


class Perplexity:
    """How well a model predicts real text that nobody was trained on: perplexity of a token, and bits of a byte.

    Perplexities compare models of one tokenizer; bits of a byte compare any.

    Args:
        window: Tokens that are read at once; the first of each window is given, not predicted.
        max_tokens: So many tokens of the text, the first ones.

    Raises:
        ValueError: A number is too small.
    """

    section: ClassVar[str] = "calibration"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"perplexity": False, "bits_per_byte": False}

    def __init__(self, window: int = 256, max_tokens: int = 20_000) -> None:
        if window < 2 or max_tokens < 2:
            raise ValueError(f"window and max_tokens are at least 2, not {window} and {max_tokens}")
        self.window, self.max_tokens = window, max_tokens

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """Empty without held-out text, and for a model that is not at hand."""
        if evidence.text is None or who not in evidence.speakers:
            return {}
        speaker = evidence.speakers[who]
        tokens = speaker.tokenizer("\n".join(evidence.text), add_special_tokens=False).input_ids[: self.max_tokens]
        windows = [tokens[start : start + self.window] for start in range(0, len(tokens), self.window)]
        windows = [window for window in windows if len(window) > 1]
        nats = 0.0
        for first in range(0, len(windows), 8):
            some = windows[first : first + 8]
            for window, head in zip(some, speaker.heads(some, [1] * len(some)), strict=True):
                logprobs = head.logits().double().log_softmax(dim=1)
                nats -= logprobs.gather(1, torch.tensor(window[1:], device=logprobs.device)[:, None]).sum().item()
        predicted = sum(len(window) - 1 for window in windows)
        size = sum(len(speaker.tokenizer.decode(window[1:]).encode()) for window in windows)
        return {"perplexity": math.exp(nats / predicted), "bits_per_byte": nats / math.log(2) / max(1, size)}
