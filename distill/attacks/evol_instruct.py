from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.attacks.asking import Asking, chats_only, last_message, writing
from distill.attacks.prompt_pool import shuffled
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet, encode_messages
from distill.randomness import derive, generator
from distill.records import Reveals

DEEPER = (
    "Make it harder by one more condition or requirement that the answer has to meet.",
    "If it asks about a matter, make it ask about that matter in more depth and breadth.",
    "Put more specific notions in the place of general ones.",
    "If a few simple thoughts are enough to answer it, change it so that it takes several steps of reasoning.",
    "Make what it is about more intricate: give it data, a table, a formula or a piece of code to work on.",
)
IN_DEPTH = """Rewrite the prompt below so that a language model finds it a little harder to answer well. {how} It must \
stay something that a person can understand and answer. Keep tables and code that it has, and add no more than 10 to \
20 words. Reply with your rewriting alone.

{prompt}"""
IN_BREADTH = """Read the prompt below, then write another one: of the same field but on something rarer, about as long \
and as hard, and such that a person can understand and answer it. Reply with yours alone.

{prompt}"""

# What a failed rewriting says of itself (the paper's fourth rule), in the words of the requests above.
ECHOES = ("the prompt below", "your rewriting", "rewritten prompt", "given prompt", "reply with")
EMPTY_WORDS = frozenset(
    ["a", "an", "and", "as", "at", "for", "i", "in", "is", "it", "of", "on", "or", "so", "the", "this", "to"]
)


class EvolInstruct:
    """The teacher rewrites prompts of the pool into harder and rarer ones, round after round; all of them are asked.

    Paper: WizardLM: Empowering Large Language Models to Follow Complex Instructions, Xu et al., ICLR 2024, sec. 3.
    Threat model: a pool of prompts; works with text alone. Each rewriting is one of five in depth or one in breadth,
    equally likely. One that failed is not asked (it is empty, the same, or speaks of the request) or not rewritten
    further (its answer is a short apology, or nothing but stop words); its prompt is tried again in the next round.
    Requests for prompts are paid for like answers.

    Departs from the paper: whether a rewriting says anything new is judged by its text, not by asking the teacher; the
    requests are worded anew. Of a chat the last message is rewritten.

    Args:
        rounds: How often each prompt is rewritten.
        prompts_at_once: So many prompts of the pool go through their rounds together.
        max_tokens, temperature, top_p: How rewritings are drawn (the paper's: 2,048, 1 and 0.9).

    Raises:
        DistillError: A number is out of range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        rounds: int = 4,
        prompts_at_once: int = 32,
        max_tokens: int = 2048,
        temperature: float = 1.0,
        top_p: float = 0.9,
    ) -> None:
        for name, count in (("rounds", rounds), ("prompts_at_once", prompts_at_once)):
            if count < 1:
                raise DistillError(f"{name} must be at least 1, not {count}")
        self.rounds, self.prompts_at_once = rounds, prompts_at_once
        self.sampling = writing(max_tokens, temperature, top_p)

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Raises `DistillError` for a pool of plain text, or without prompts."""
        chats_only(pool, "evol_instruct")
        rng = generator(seed, "attack", "evolutions")
        sampling = replace(self.sampling, seed=derive(seed, "attack", "prompts"))
        asking = Asking(oracle, samples)
        rest = shuffled(pool, len(pool), seed)
        rest = replace(rest, references=None, entries=None)  # what they would become is not known
        while len(rest):
            # At a budget's end a prompt is asked even where no rewriting of it is affordable.
            at_once = asking.room(self.prompts_at_once, samples + self.rounds * (1 + samples)) or 1
            prompts, rest = rest.take(slice(0, at_once)), rest.take(slice(at_once, None))
            asking.answer(prompts)
            for _ in range(self.rounds):
                room = asking.room(len(prompts), 1 + samples)
                if not room:
                    break
                prompts = self._evolve(prompts, room, asking, sampling, rng)
            if asking.over or oracle.affordable() == 0:
                break
        return asking.collected(f"EvolInstruct of {pool.name}")

    def _evolve(
        self, prompts: Prompts, room: int, asking: Asking, sampling: Sampling, rng: np.random.Generator
    ) -> Prompts:
        """The prompts of the next round: the rewritings that succeeded, in the place of what they were made from."""
        methods = rng.integers(len(DEEPER) + 1, size=len(prompts))[:room]
        requests = [_request(last_message(prompts, row), int(method)) for row, method in enumerate(methods)]
        written = asking.write(Prompts.of_users(requests), sampling)
        column = prompts.column.copy()
        evolved = [
            row
            for row, (text, finish) in enumerate(zip(written.column, written.finish, strict=True))
            if finish == "stop" and _says_something_new(text, last_message(prompts, row))
        ]
        for row in evolved:
            column[row] = _with_last(prompts.messages(row), written.column[row].strip())
        answers = asking.answer(Prompts(column[evolved]))
        failed = [row for i, row in enumerate(evolved) if not _answered(answers, i * asking.samples)]
        column[failed] = prompts.column[failed]
        return Prompts(column)


def _request(prompt: str, method: int) -> str:
    if method == len(DEEPER):
        return IN_BREADTH.format(prompt=prompt)
    return IN_DEPTH.format(how=DEEPER[method], prompt=prompt)


def _says_something_new(text: str, old: str) -> bool:
    plain = " ".join(text.split()).lower()
    return plain not in ("", " ".join(old.split()).lower()) and not any(echo in plain for echo in ECHOES)


def _answered(answers: Completions, first: int) -> bool:
    """Whether the first of a prompt's answers came, and is more than a short apology or stop words."""
    if first >= len(answers):
        return False
    words = [word.strip(string.punctuation) for word in answers.column[first].lower().split()]
    apology = "sorry" in words and len(words) < 80
    return not apology and any(word and word not in EMPTY_WORDS for word in words)


def _with_last(messages: Sequence[dict[str, str]], content: str) -> str:
    return encode_messages([*messages[:-1], {"role": "user", "content": content}])
