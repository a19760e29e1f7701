"""The provider of text: a teacher, an access policy and prices, behind one method that answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from distill.contracts import LanguageTeacher
from distill.errors import BadAnswer, DistillError
from distill.language import Completions, Prompts, Sampling, SyntheticSet
from distill.provider.keys import RepeatCounter
from distill.provider.ledger import LanguageLedger, Prices
from distill.provider.requests import RequestCache
from distill.records import Budget, Cost, InterfaceProfile, Reveals, content_keys


class LanguageProvider:
    """Owns everything that the attacker must not reach. Not for several threads at once.

    A request is made once, ever: answers come from the request cache, which also is what an interrupted attack is
    played back from. `ledger` keeps apart what an attack is billed and what was really spent.

    Args:
        teacher: Prepared, so that its fingerprint is known.
        access: What the API reveals.
        prices: What the attacker is billed.
        budget: What the attacker may spend.
        sampling: How answers are drawn where the attack does not say.
        cache: The folder that runs share (`distill.config.cache_dir()`).

    Raises:
        DistillError: The access policy reveals what the teacher can't tell, or price and budget don't fit.
    """

    def __init__(
        self,
        teacher: LanguageTeacher,
        *,
        access: InterfaceProfile,
        prices: Prices,
        budget: Budget,
        sampling: Sampling,
        cache: Path,
    ) -> None:
        self.teacher = teacher
        self.profile = access
        self.sampling = sampling
        self.ledger = LanguageLedger(budget, prices)
        self.told = access.top_k or 0
        if teacher.top_k is not None and self.told > teacher.top_k:
            raise DistillError(f"the teacher tells at most {teacher.top_k} log-probabilities", "access.top_k")
        if access.reveals >= Reveals.PROBS and teacher.top_k is not None:
            raise DistillError("the teacher does not tell whole distributions; take text or top_k", "access.profile")
        self._real_prices = Prices(0.0, teacher.usd_per_mtok_in, teacher.usd_per_mtok_out)
        self._requests = RequestCache(cache / "requests" / teacher.fingerprint)
        self._repeats = RepeatCounter()

    # --- what the attacker gets ---------------------------------------------------------------------------------

    def answer(self, prompts: Prompts, sampling: Sampling | None, samples: int, partial: bool) -> SyntheticSet:
        """Answer and bill `samples` answers to each of n prompts, one prompt after the other.

        Raises:
            BudgetExceeded: Not all are affordable at their longest, and `partial` is off; nothing was asked.
            BadAnswer: The teacher gave something that is no answer.
        """
        started = time.perf_counter()
        sampling = sampling or self.sampling
        asked = prompts.take(np.repeat(np.arange(len(prompts)), samples))
        tokens_in = np.repeat(self.teacher.count_tokens(prompts, sampling), samples)
        if not partial:
            self.ledger.require(tokens_in, sampling.max_tokens)
        # The seed and the limits of an answer do not make a repeated question another one.
        repeats = self._repeats.count(content_keys(asked.column))
        parts, usd, done = [], [], 0
        while done < len(asked):
            fits = self.ledger.fitting(tokens_in[done:], sampling.max_tokens)
            if fits == 0:
                break
            part = slice(done, done + fits)
            answers = self.revealed(self.clean(asked.take(part), sampling, repeats[part]))
            usd.append(self.ledger.bill(answers))
            parts.append(answers)
            done += fits
        self.ledger.seconds += time.perf_counter() - started
        return SyntheticSet(
            prompts=asked.take(slice(0, done)),
            completions=Completions.join(parts) if parts else Completions.none(),
            repeats=repeats[:done],
            sampling=sampling,
            usd=np.concatenate(usd) if usd else np.empty(0),
            teacher=self.teacher.fingerprint,
            profile="text" if self.profile.reveals is Reveals.LABEL else str(self.profile),
        )

    def close(self) -> None:
        """Every answer is on disk as soon as it is made."""

    # --- what the evaluation gets: not billed, but cached ---------------------------------------------------------

    def clean(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions:
        """The teacher's own answers, with the log-probabilities that the profile would reveal."""
        top_k = self.told

        def generate(missing: np.ndarray) -> Completions:
            made = self.teacher.generate(prompts.take(missing), sampling, repeats[missing], top_k)
            _check(made, len(missing))
            self.ledger.worked(made, self._real_prices)
            return made

        keys = sampling.request_keys(prompts, repeats)
        return self._requests.get_or_generate(keys, top_k, generate, self.teacher.requests_at_once)

    def revealed(self, completions: Completions) -> Completions:
        """The answers with everything removed that the profile does not reveal."""
        if self.profile.reveals is Reveals.LABEL:
            return completions.without_tokens()
        return completions.with_top(self.told) if self.told else completions

    def cost(self) -> Cost:
        """What the attacker was billed, and what the teacher did in this process, evaluation included."""
        return self.ledger.cost()


def _check(made: Completions, wanted: int) -> None:
    """Raises `BadAnswer` where a teacher's answers are not what they say."""
    if len(made) != wanted:
        raise BadAnswer(f"gave {len(made)} answers to {wanted} requests", "teacher")
    for name in ("logprobs", "top_logprobs"):
        values: Any = getattr(made, name)
        if values is not None and (np.isnan(values).any() or (values > 1e-3).any()):
            raise BadAnswer(f"gave {name} that are no log-probabilities (NaN or more than 0)", "teacher")
