from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from distill.contracts import LanguageDefense, LanguageTeacher, PreparedLanguageDefense, Watermark
from distill.decoding import Guided, Processor, processed
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, Task
from distill.randomness import KeyedRandom
from distill.records import InterfaceProfile


class LanguageChain:
    """Several defenses of text, one after the other.

    Threat model: that of its members. A request passes through their `sampling` in order, is decoded with the logits
    changed in order, and goes out through their `release` in order: each is handed what the one before it gave out. It
    exposes the poorest of what they expose, and each draws randomness of its own.

    Args:
        members: The defenses, in order.

    Attributes:
        watermark: The first member that is one; None where none is.

    Raises:
        DistillError: There is none, or one defends classifiers.
    """

    watermark: Watermark | None

    def __init__(self, members: Sequence[LanguageDefense]) -> None:
        if not members:
            raise DistillError("needs at least one defense", "defense.members")
        for member in members:
            if not isinstance(member, LanguageDefense):
                raise DistillError(f"{type(member).__name__} defends classifiers, not text", "defense.members")
        self.members = list(members)
        self.exposes = reduce(InterfaceProfile.meet, [member.exposes for member in members])
        self.fingerprint = ""
        marks = [member.watermark if isinstance(member, LanguageChain) else member for member in members]
        self.watermark = next((mark for mark in marks if isinstance(mark, Watermark)), None)

    @property
    def tokens_read(self) -> int:
        return sum(member.tokens_read for member in self.members)

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """Each member gets the teacher that the one before it returned."""
        prepared = [member for member in self.members if isinstance(member, PreparedLanguageDefense)]
        for member in prepared:
            teacher = member.prepare(teacher, task, trainer, cache, seed)
        self.fingerprint = "-".join([member.fingerprint for member in prepared]) or teacher.fingerprint
        return teacher

    def sampling(self, asked: Sampling) -> Sampling:
        return reduce(lambda sampling, member: member.sampling(sampling), self.members, asked)

    def logits_processor(self, sampling: Sampling) -> Processor | Guided | None:
        made = [member.logits_processor(sampling) for member in self.members]
        parts = [part for part in made if part is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        networks = [network for part in parts if isinstance(part, Guided) for network in part.networks]
        unbiased = replace(sampling, logit_bias=())  # it was added before

        def change(tokens: list[list[int]], logits: torch.Tensor, guides: list[torch.Tensor]) -> torch.Tensor:
            return processed(logits, tokens, unbiased, parts, guides)

        return Guided(networks, change) if networks else lambda tokens, logits: change(tokens, logits, [])

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        # A cap of any member holds for what each of them gives out.
        bounded = replace(sampling, max_tokens=self.sampling(sampling).max_tokens)
        for i, member in enumerate(self.members):
            completions = member.release(prompts, completions, bounded, rng.child(str(i)))
        return completions
