"""What the defenses of the generation domain start from."""

from __future__ import annotations

from distill.decoding import Guided, Processor
from distill.language import Completions, Prompts, Sampling
from distill.randomness import KeyedRandom
from distill.records import EVERY_LOGPROB, InterfaceProfile


class Unchanged:
    """A defense that does nothing yet (`distill.contracts.LanguageDefense`): a subclass overrides what it changes."""

    exposes: InterfaceProfile = EVERY_LOGPROB

    @property
    def tokens_read(self) -> int:
        return 0

    def sampling(self, asked: Sampling) -> Sampling:
        return asked

    def logits_processor(self, sampling: Sampling) -> Processor | Guided | None:
        return None

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        return completions
