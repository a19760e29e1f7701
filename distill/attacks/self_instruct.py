from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.attacks.asking import Asking, chats_only, last_message, writing
from distill.attacks.novelty import Novelty
from distill.attacks.prompt_pool import shuffled
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Prompts, SyntheticSet
from distill.randomness import derive, generator
from distill.records import Reveals

log = logging.getLogger(__name__)

NUMBERED = re.compile(r"(?:^|\n)[ \t]*\d+[ \t]*[.):][ \t]*")


class SelfInstruct:
    """The teacher writes new prompts from a few old ones; those that are new enough are asked.

    Paper: Self-Instruct: Aligning Language Models with Self-Generated Instructions, Wang et al., ACL 2023, sec. 2.2.
    Threat model: a few prompts of the pool; works with text alone. Each request shows `shots` prompts, of which
    `own_shots` are the attack's own once there are any; a new one is kept where its ROUGE-L with every earlier one is
    below `novelty`. The seeds are asked first, so a budget no larger than they are is `prompt_pool`'s. Requests for
    prompts are paid for like answers; a last single answer is left.

    Departs from the paper: input and output are one chat (no input-first and output-first templates), there is no
    presence penalty, and the request is worded anew.

    Args:
        seeds: Prompts of the pool to start from.
        shots: How many prompts a request shows.
        own_shots: How many of them are the attack's own.
        prompts_per_request: How many new ones it asks for.
        novelty: The bound on ROUGE-L.
        max_words: Longer prompts are dropped.
        banned: Prompts with one of these words are dropped: a model of text can't do them.
        max_prompts: The attack ends with so many own prompts, whatever is left of the budget.
        max_tokens, temperature, top_p: How new prompts are drawn.
        requests_at_once: Requests for prompts between two looks at what is new.
        patience: So many rounds without a new prompt end the attack.

    Raises:
        DistillError: A number is out of range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        seeds: int = 175,
        shots: int = 8,
        own_shots: int = 2,
        prompts_per_request: int = 8,
        novelty: float = 0.7,
        max_words: int = 150,
        banned: Sequence[str] = ("image", "picture", "graph"),
        max_prompts: int = 52_000,
        max_tokens: int = 1024,
        temperature: float = 0.7,
        top_p: float = 0.5,
        requests_at_once: int = 8,
        patience: int = 20,
    ) -> None:
        if not 0 < novelty <= 1:
            raise DistillError(f"novelty must be above 0 and at most 1, not {novelty}")
        if not 0 <= own_shots < shots:
            raise DistillError(f"own_shots ({own_shots}) must be at least 0 and below shots ({shots})")
        counts = {"seeds": seeds, "prompts_per_request": prompts_per_request, "requests_at_once": requests_at_once}
        for name, count in counts.items():
            if count < 1:
                raise DistillError(f"{name} must be at least 1, not {count}")
        self.seeds, self.shots, self.own_shots = seeds, shots, own_shots
        self.prompts_per_request, self.novelty, self.max_words = prompts_per_request, novelty, max_words
        self.banned, self.max_prompts, self.patience = set(banned), max_prompts, patience
        self.requests_at_once = requests_at_once
        self.sampling = writing(max_tokens, temperature, top_p)

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Raises `DistillError` for a pool of plain text, or without prompts."""
        chats_only(pool, "self_instruct")
        rng = generator(seed, "attack", "shots")
        sampling = replace(self.sampling, seed=derive(seed, "attack", "prompts"))
        seeds = shuffled(pool, self.seeds, seed)
        asking = Asking(oracle, samples)
        asking.answer(seeds)
        shown = [last_message(seeds, row) for row in range(len(seeds))]
        novelty = Novelty(self.novelty)
        for text in shown:
            novelty.admit(text)

        def write(requests: int, own: list[str]) -> list[str]:
            asked = Prompts.of_users([self._request(shown, own, rng) for _ in range(requests)])
            written = asking.write(asked, sampling)
            return [
                prompt
                for answer, finish in zip(written.column, written.finish, strict=True)
                for prompt in numbered(answer, finish == "length")
                if self._fits(prompt)
            ]

        own = asking.invent(
            write,
            novelty,
            at_once=self.requests_at_once,
            cost=1 + self.prompts_per_request * samples,
            most=self.max_prompts,
            patience=self.patience,
        )
        log.info("self_instruct: %d prompts of its own after %d of the pool", len(own), len(seeds))
        return asking.collected(f"SelfInstruct from {len(seeds)} prompts of {pool.name}")

    def _request(self, seeds: list[str], own: list[str], rng: np.random.Generator) -> str:
        """A numbered list of old prompts in random order, and what to do with it."""
        ours = min(self.own_shots, len(own))
        shown = _some(own, ours, rng) + _some(seeds, self.shots - ours, rng)
        lines = [f"{i}. {' '.join(shown[place].split())}" for i, place in enumerate(rng.permutation(len(shown)), 1)]
        return (
            f"Here are {len(lines)} tasks that people gave to a language model:\n\n"
            + "\n".join(lines)
            + f"\n\nThink of {self.prompts_per_request} other tasks that it could be given, as different from these "
            "and from one another as you can. List them in the same way, and nothing else, numbered from "
            f"{len(lines) + 1}."
        )

    def _fits(self, prompt: str) -> bool:
        words = prompt.split()
        return len(words) <= self.max_words and not any(word.strip(".,;:?!").lower() in self.banned for word in words)


def numbered(text: str, cut: bool) -> list[str]:
    """The items of a numbered list, without what stands before and after it; the last of a cut list is not whole."""
    items = [item.strip().partition("\n\n")[0].rstrip() for item in NUMBERED.split(text)[1:]]
    return [item for item in (items[:-1] if cut else items) if item]


def _some(texts: list[str], n: int, rng: np.random.Generator) -> list[str]:
    return [texts[i] for i in rng.permutation(len(texts))[:n]]
