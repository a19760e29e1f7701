from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.attacks.asking import Asking, chats_only, last_message
from distill.attacks.prompt_pool import shuffled
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Completions, Prompts, SyntheticSet, encode_messages, texts
from distill.records import Reveals

log = logging.getLogger(__name__)


class ReElicited:
    """Where an interface strips the reasoning, the attacker asks for it again, and learns from what it puts together.

    Paper: What Does It Mean to Break a Distillation Defense?, arXiv 2606.25059, 2026 (what a request may ask is an axis
    of the threat model); the sub-questions are those of Least-to-Most Prompting Enables Complex Reasoning in Large
    Language Models, Zhou et al., ICLR 2023, made by a rule here.
    Threat model: a pool of chats, no knowledge of the teacher; works with text alone. Besides each question there are
    further requests, which are paid for like any other:

    - without `piece` one, a second turn that puts `follow_up` behind the question and its answer;
    - with `piece` one for each match in the question: `sub_question`. One that is the question itself is not asked
      twice. For ``a=3;b=a+5;c=b-9;c?`` of straight_line, piece
      ``(?P<begin>a=(?P<first>[0-9]);)?(?P<name>[a-z])=[a-z](?P<rest>[^;]*);``, sub_question ``{before}{name}?``, step
      ``{begin}{name}={first}{previous}{rest}={answer};``, conclusion ``.{answer}`` and result ``[0-9]`` ask
      ``a=3;b=a+5;b?`` too, and put ``a=3;b=3+5=8;c=8-9=9;.9`` together. The teacher must know questions so short.

    A row of the transfer set is a question and the text put together. Its usage and price are what all of its requests
    were billed, so that the sums over rows are what was spent. Where the budget ended before the last of them there is
    the conclusion alone: in at most one row, but with a second turn and a bound on tokens or money in up to
    `questions_at_once`. What answers tell besides text is given up: take signal=text.

    Args:
        follow_up: What the user says in the second turn.
        piece: A regular expression, or null.
        sub_question: The request for a match. Fields: ``before``, the question up to the end of the match, and the
            named groups of `piece`.
        step: What a further answer adds to the text. Fields: ``answer``; with `piece` also ``previous``, the answer to
            the match before ("" for the first), and the named groups.
        conclusion: What ends the text. Field: ``answer``, that to the question.
        result: A regular expression whose last match in an answer is its ``answer`` (not in a second turn, whose steps
            are taken whole); null for all of it, as where nothing matches.
        questions_at_once: So many questions are asked in a round.

    Raises:
        DistillError: A number is out of range, an expression is none, or a template has another field.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        follow_up: str = "Write down every step that leads to this answer, one after the other.",
        piece: str | None = None,
        sub_question: str = "{before}",
        step: str = "{answer}\n",
        conclusion: str = "{answer}",
        result: str | None = None,
        questions_at_once: int = 64,
    ) -> None:
        if not follow_up.strip():
            raise DistillError("must say something", "attack.follow_up")
        if questions_at_once < 1:
            raise DistillError(f"must be at least 1, not {questions_at_once}", "attack.questions_at_once")
        self.piece, self.result = _compiled("piece", piece), _compiled("result", result)
        self.follow_up, self.sub_question, self.step, self.conclusion = follow_up, sub_question, step, conclusion
        self.questions_at_once = questions_at_once
        groups = {} if self.piece is None else dict.fromkeys(self.piece.groupindex, "")
        _filled("sub_question", sub_question, before="", **groups)
        _filled("step", step, answer="", **({} if self.piece is None else {"previous": ""} | groups))
        _filled("conclusion", conclusion, answer="")

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """`samples` rows for each question, until budget or pool end; the last question may get fewer.

        Raises `DistillError` for a pool of plain text, or one whose questions `piece` does not match.
        """
        chats_only(pool, "re_elicited")
        if self.piece and not any(self.piece.search(last_message(pool, row)) for row in range(len(pool))):
            raise DistillError(f"'{self.piece.pattern}' matches no question of {pool.name}", "attack.piece")
        asking = Asking(oracle, samples)
        rest = shuffled(pool, len(pool), seed)
        rest = rest.take(np.repeat(np.arange(len(rest)), samples))
        while len(rest) and not asking.over and (room := oracle.affordable()):
            some = min(len(rest), room, self.questions_at_once)
            needed = np.cumsum([1 + self._further(last_message(rest, row)) for row in range(some)])
            whole = max(1, int((needed <= room).sum()))  # the end of a budget may not pay for all that one needs
            part = self._round(asking, rest.take(slice(0, whole)))
            rest = rest.take(slice(whole, None))
            if len(part):
                asking.parts.append(part)
        if not len(rest) and not asking.over and oracle.affordable():
            log.warning("the attack ended before its budget: the pool has %d prompts", len(pool))
        return asking.collected(f"ReElicited on {pool.name}")

    def _further(self, question: str) -> int:
        """How many requests there are besides the question."""
        return 1 if self.piece is None else sum(request != question for _, request in self._pieces(question))

    def _pieces(self, question: str) -> list[tuple[dict[str, str], str]]:
        """The named groups of each match, and the request for it."""
        assert self.piece is not None
        found = [(match.groupdict(""), question[: match.end()]) for match in self.piece.finditer(question)]
        return [(groups, _filled("sub_question", self.sub_question, before=up, **groups)) for groups, up in found]

    def _round(self, asking: Asking, questions: Prompts) -> SyntheticSet:
        """A row for each question that was answered."""
        asked = [last_message(questions, row) for row in range(len(questions))]
        if self.piece is None:
            first = _ask(asking, questions)
            turns = [
                [{"role": "assistant", "content": answer}, {"role": "user", "content": self.follow_up}]
                for answer in first.completions.column
            ]
            chats = [encode_messages([*questions.messages(row), *turn]) for row, turn in enumerate(turns)]
            parts = [first, _ask(asking, Prompts(texts(chats)))] if chats else [first]
            owner = np.concatenate([np.arange(len(part)) for part in parts])
        else:
            requests = [
                [question, *(request for _, request in self._pieces(question) if request != question)]
                for question in asked
            ]
            chats = [
                encode_messages([*questions.messages(row)[:-1], {"role": "user", "content": request}])
                for row, some in enumerate(requests)
                for request in some
            ]
            parts = [_ask(asking, Prompts(texts(chats)))]
            owner = np.repeat(np.arange(len(questions)), [len(some) for some in requests])[: len(parts[0])]
        given = Completions.join([part.completions.without_tokens() for part in parts])
        answered, firsts = np.unique(owner, return_index=True)

        def total(billed: np.ndarray) -> np.ndarray:
            return np.bincount(owner, billed, minlength=len(answered)).astype(billed.dtype)

        return replace(
            parts[0],
            prompts=questions.take(answered),
            completions=Completions(
                texts([self._written(asked[row], given.column[owner == row].tolist()) for row in answered]),
                texts(["length" if (given.finish[owner == row] == "length").any() else "stop" for row in answered]),
                total(given.prompt_tokens),
                total(given.completion_tokens),
            ),
            repeats=parts[0].repeats[firsts],
            usd=total(np.concatenate([part.usd for part in parts])),
        )

    def _written(self, question: str, answers: list[str]) -> str:
        """The text that is put together from the answers to a question and to what else was asked."""
        end, steps = self._answer(answers[0]), []
        if self.piece is None:
            steps = [{"answer": answer} for answer in answers[1:]]
        elif len(answers) == 1 + self._further(question):
            told, previous = iter(answers[1:]), ""
            for groups, request in self._pieces(question):
                answer = end if request == question else self._answer(next(told))
                steps.append(groups | {"previous": previous, "answer": answer})
                previous = answer
        written = [_filled("step", self.step, **fields) for fields in steps]
        return "".join(written) + _filled("conclusion", self.conclusion, answer=end)

    def _answer(self, text: str) -> str:
        found = [] if self.result is None else [match[0] for match in self.result.finditer(text)]
        return found[-1] if found else text


def _ask(asking: Asking, prompts: Prompts) -> SyntheticSet:
    part = asking.oracle.ask(prompts, partial=True)
    asking.over = len(part) < len(prompts)
    return part


def _compiled(option: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise DistillError(f"is no regular expression ({error}): {pattern}", f"attack.{option}") from None


def _filled(option: str, template: str, **fields: str) -> str:
    try:
        return template.format(**fields)
    except (IndexError, KeyError, ValueError) as error:
        known = ", ".join(f"{{{name}}}" for name in fields)
        raise DistillError(f"has fields other than {known}: {template!r} ({error})", f"attack.{option}") from None
