from __future__ import annotations

from dataclasses import replace

from distill.errors import DistillError
from distill.language import Sampling
from distill.provider.defenses._language import Unchanged


class LengthCap(Unchanged):
    """Answers end after so many tokens, whatever was asked for.

    Paper: none; information throttling in the words of DistillGuard (arXiv 2603.07835, 2026).
    Threat model: the attacker wants long reasoning. A cut answer says so (`finish` is "length") and is the beginning of
    the uncapped one, token for token, with its log-probabilities. Honest users lose the ends of long answers. Behind a
    defense that hides the reasoning, reasoning and answer together are capped.

    Args:
        max_tokens: Longest answer.

    Raises:
        DistillError: There is no room for a token.
    """

    def __init__(self, max_tokens: int = 256) -> None:
        if max_tokens < 1:
            raise DistillError(f"max_tokens must be at least 1, not {max_tokens}")
        self.max_tokens = max_tokens

    def sampling(self, asked: Sampling) -> Sampling:
        return replace(asked, max_tokens=min(asked.max_tokens, self.max_tokens))
