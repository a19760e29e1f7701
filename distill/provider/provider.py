"""The provider: a teacher, a defense, an access policy and a price, behind one method that answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from distill.contracts import Defense, StatefulDefense, Teacher
from distill.errors import BadAnswer, DistillError
from distill.provider.cache import RowCache
from distill.provider.journal import Journal
from distill.provider.keys import RepeatCounter
from distill.provider.ledger import Ledger
from distill.randomness import KeyedRandom, derive
from distill.records import (
    ROWS_AT_ONCE,
    Answers,
    Budget,
    Cost,
    Inputs,
    InputSpec,
    InterfaceProfile,
    Reveals,
    content_keys,
    softmax,
)

CHUNK_BYTES = 64 << 20  # inputs, or answers, held in memory at once
SUM_TOLERANCE = 1e-3  # how far a posterior's sum may be from one before it counts as wrong
SUM_EXACT = 1e-6  # up to here it is rounding and stays as it is


class Provider:
    """Owns everything that the attacker must not reach. Not for several threads at once.

    Args:
        teacher: The one that answers. Prepared, so that its fingerprint is known.
        undefended: The one that the evaluation compares with: the same, unless the defense is one of training.
        defense: What perturbs its answers.
        spec: What one input is.
        classes: Number of classes.
        access: What the API would reveal by itself; `profile` is what is left of it under teacher and defense.
        usd_per_query: What the attacker is billed for an answer.
        budget: What the attacker may spend.
        seed: The run's seed, from which the defense's noise is derived.
        cache: The folder that runs share (`distill.config.cache_dir()`).
        log: The folder of this query stage's `Journal`; made with the first answer.
        defense_id: Digest of the defense's config: query information is cached under it.

    Raises:
        DistillError: The access policy or the defense reveals more entries than there are classes, or the price and
            the budget don't fit.
    """

    def __init__(
        self,
        teacher: Teacher,
        defense: Defense,
        *,
        undefended: Teacher | None = None,
        spec: InputSpec,
        classes: int,
        access: InterfaceProfile,
        usd_per_query: float,
        budget: Budget,
        seed: int,
        cache: Path,
        log: Path,
        defense_id: str,
    ) -> None:
        for profile, key in ((access, "access.top_k"), (defense.exposes, "defense")):
            if profile.top_k is not None and profile.top_k > classes:
                raise DistillError(f"top_k is {profile.top_k}, but there are only {classes} classes", key)
        self.teacher = teacher
        self.defense = defense
        self.spec = spec
        self.classes = classes
        self.profile = access.meet(defense.exposes).meet(InterfaceProfile(teacher.output))
        self.ledger = Ledger(budget, usd_per_query)
        self.rows_at_once = max(1, min(ROWS_AT_ONCE, CHUNK_BYTES // (4 * max(classes, math.prod(spec.shape)))))
        self._forwards_at_once = min(teacher.rows_at_once, self.rows_at_once)
        self._noise_seed = derive(seed, "defense")
        self._cache = cache
        self._clean_answers: dict[str, RowCache] = {}
        self.undefended = undefended or teacher
        self._info_folder = cache / "query_info" / teacher.fingerprint / defense_id
        self._info_cache: RowCache | None = None
        self._takes_info: bool | None = None
        self._repeats = RepeatCounter()
        self._log = log
        self._identity = {
            "teacher": teacher.fingerprint,
            "defense": defense_id,
            "profile": str(self.profile),
            "seed": seed,
            "classes": classes,
        }
        self._journal: Journal | None = None

    # --- what the attacker gets ---------------------------------------------------------------------------------

    def answer(self, inputs: np.ndarray, rows: np.ndarray) -> Answers:
        """Answer, bill and log n queries, of which there are 1 to `rows_at_once`.

        Args:
            inputs: n inputs.
            rows: (n,) int64 rows of the attacker's pool, -1 where the attack made the input. For the log only.

        Raises:
            BudgetExceeded: Not all are affordable; nothing was answered.
            BadAnswer: The teacher or the defense gave no distribution.
        """
        started = time.perf_counter()
        self.ledger.require(len(inputs))
        if self._journal is None:
            self._journal = Journal(self._log, self._identity)
        keys = content_keys(inputs)
        repeats = self._repeats.count(keys)
        parts = []
        done = 0
        while done < len(inputs):
            logged = self._journal.replay(keys[done:])
            if logged is not None and isinstance(self.defense, StatefulDefense):
                part = slice(done, done + len(logged["key"]))  # it remembers what it answered before the interruption
                clean = Answers(logged["clean"])
                self._perturb(clean, inputs[part], keys[part], repeats[part], rows[part])
            if logged is None:
                part = slice(done, min(len(inputs), done + self._journal.gap()))
                clean = self._clean(self.teacher, inputs[part], keys[part], rows[part])
                returned = self._defended(clean, inputs[part], keys[part], repeats[part], rows[part])
                logged = {
                    "key": keys[part],
                    "row": rows[part],
                    "repeat": repeats[part],
                    "clean": clean.posteriors,
                    "posteriors": returned.posteriors,
                }
                if returned.logits is not None:
                    logged["logits"] = returned.logits
                self._journal.append(logged)
            parts.append(Answers(logged["posteriors"], logged.get("logits")))
            done += len(logged["key"])
        self.ledger.bill(len(inputs))
        self.ledger.seconds += time.perf_counter() - started
        return Answers.join(parts)

    def close(self) -> None:
        """Write what is not yet on disk."""
        if self._journal is not None:
            self._journal.flush()

    # --- what the evaluation gets: not billed, not logged, but cached -------------------------------------------

    def clean(self, inputs: Inputs) -> Answers:
        """The undefended teacher's own answers, with its logits where it gives them."""
        return self._each_chunk(inputs, partial(self._clean, self.undefended))

    def returned(self, inputs: Inputs) -> Answers:
        """What an honest user gets who asks each of these once: defended and cut to the profile.

        A defense that remembers is in the state that the attack left, and is left in it.
        """

        def answer(inputs: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Answers:
            clean = self._clean(self.teacher, inputs, keys, rows)
            return self._defended(clean, inputs, keys, np.zeros(len(keys), dtype=np.int64), rows)

        if not isinstance(self.defense, StatefulDefense):
            return self._each_chunk(inputs, answer)
        state = {name: array.copy() for name, array in self.defense.state().items()}
        try:
            return self._each_chunk(inputs, answer)
        finally:
            self.defense.restore(state)

    def defense_latency_s(self, inputs: Inputs, repeats: int = 20) -> float:
        """Median seconds that the defense takes for one answer: its information on the query and the perturbation."""
        one = inputs[:1]
        keys, once = content_keys(one), np.zeros(1, dtype=np.int64)
        clean = self._clean(self.teacher, one, keys, once)
        state = self.defense.state() if isinstance(self.defense, StatefulDefense) else {}
        state = {name: array.copy() for name, array in state.items()}
        seconds = []
        for _ in range(3 + repeats):
            started = time.perf_counter()
            self.defense.perturb(clean, self.defense.query_info(one), KeyedRandom(self._noise_seed, keys, once))
            seconds.append(time.perf_counter() - started)
        if isinstance(self.defense, StatefulDefense):
            self.defense.restore(state)
        return statistics.median(seconds[3:])

    def cost(self) -> Cost:
        """What the attacker was billed, and what the teacher did in this process, evaluation included."""
        return self.ledger.cost()

    def _each_chunk(self, inputs: Inputs, answer: Callable[[np.ndarray, np.ndarray, np.ndarray], Answers]) -> Answers:
        def parts() -> Iterator[Answers]:
            for start in range(0, len(inputs), self.rows_at_once):
                part = inputs[start : start + self.rows_at_once]
                yield answer(part, content_keys(part), np.arange(start, start + len(part)))

        return Answers.join(list(parts())) if len(inputs) else no_answers(self.classes, self.profile)

    # --- from a query to an answer ------------------------------------------------------------------------------

    def _clean(self, teacher: Teacher, inputs: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Answers:
        def compute(missing: np.ndarray) -> np.ndarray:
            values = teacher.predict(inputs[missing])
            self.ledger.teacher_forwards += len(missing)
            if teacher.output is Reveals.LOGITS:
                return finite(values, self.classes, "teacher", rows[missing])
            return distributions(values, self.classes, "teacher", rows[missing])

        if (cache := self._clean_answers.get(teacher.fingerprint)) is None:
            cache = self._clean_answers[teacher.fingerprint] = RowCache(self._cache / "answers" / teacher.fingerprint)
        if teacher.remote or teacher.usd_per_query > 0 or not _made(rows):
            values = cache.get_or_compute(keys, compute, self._forwards_at_once)
        else:
            values = self._each_part(len(keys), compute)
        return Answers(softmax(values), values) if teacher.output is Reveals.LOGITS else Answers(values)

    def _each_part(self, n: int, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What is computed for n rows, and not kept.

        An input that an attack made is asked about by no other run, and data-free attacks make millions. The journal
        keeps what was answered; what nothing was paid for needs no more than that.
        """
        at_once = self._forwards_at_once
        return np.concatenate([compute(np.arange(start, min(n, start + at_once))) for start in range(0, n, at_once)])

    def _perturb(
        self, clean: Answers, inputs: np.ndarray, keys: np.ndarray, repeats: np.ndarray, rows: np.ndarray
    ) -> Answers:
        rng = KeyedRandom(self._noise_seed, keys, repeats)
        return self.defense.perturb(clean, self._query_info(inputs, keys, rows), rng)

    def _defended(
        self, clean: Answers, inputs: np.ndarray, keys: np.ndarray, repeats: np.ndarray, rows: np.ndarray
    ) -> Answers:
        answers = self._perturb(clean, inputs, keys, repeats, rows)
        posteriors = distributions(answers.posteriors, self.classes, "defense", rows)
        logits = answers.logits
        if self.profile.reveals is Reveals.LOGITS:
            # A defense of posteriors gives no logits. Handing on the clean ones would undo it.
            logits = centred_log(posteriors) if logits is None else finite(logits, self.classes, "defense", rows)
            strays = np.abs(softmax(logits) - posteriors) > SUM_TOLERANCE
            _refuse(np.any(strays, axis=1), "defense", rows, "has logits that do not belong to its posterior")
        return self.profile.truncate(Answers(posteriors, logits))

    def _query_info(self, inputs: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        if self._takes_info is None:
            self._takes_info = self.defense.query_info(inputs[:1]) is not None
        if not self._takes_info:
            return None
        if self._info_cache is None:
            self._info_cache = RowCache(self._info_folder)

        def compute(missing: np.ndarray) -> np.ndarray:
            info = self.defense.query_info(inputs[missing])
            if info is None or len(info) != len(missing):
                raise BadAnswer("query_info gave something for some queries and nothing for others", "defense")
            return info

        if _made(rows):
            return self._each_part(len(keys), compute)
        return self._info_cache.get_or_compute(keys, compute, self._forwards_at_once)


def _made(rows: np.ndarray) -> bool:
    """All of these inputs were made by the attack."""
    return bool((rows < 0).all())


def no_answers(classes: int, profile: InterfaceProfile) -> Answers:
    """The answers to no queries."""
    empty = np.empty((0, classes), dtype=np.float32)
    return Answers(empty, empty if profile.reveals is Reveals.LOGITS else None)


def finite(values: np.ndarray, classes: int, who: str, rows: np.ndarray) -> np.ndarray:
    """The values as (n, classes) float32. Raises `BadAnswer` (key `who`) for another shape, NaN or infinity."""
    if values.shape != (len(rows), classes):
        raise BadAnswer(f"gave an array {values.shape} where {(len(rows), classes)} was asked for", who)
    _refuse(~np.isfinite(values).all(axis=1), who, rows, "holds NaN or infinity")
    return np.ascontiguousarray(values, dtype=np.float32)


def distributions(values: np.ndarray, classes: int, who: str, rows: np.ndarray) -> np.ndarray:
    """The values as (n, classes) float32 rows that sum to one. Raises `BadAnswer` (key `who`) where they are none.

    Sums that are off by at most `SUM_TOLERANCE` are mended.
    """
    values = finite(values, classes, who, rows)
    _refuse(np.any(values < 0, axis=1), who, rows, "holds a negative probability")
    sums = values.sum(axis=1, dtype=np.float64)
    _refuse(np.abs(sums - 1) > SUM_TOLERANCE, who, rows, "does not sum to one")
    inexact = np.abs(sums - 1) > SUM_EXACT
    if inexact.any():
        values = values.copy()
        values[inexact] = values[inexact] / sums[inexact, None]
    return values


def centred_log(posteriors: np.ndarray) -> np.ndarray:
    """Logits of posteriors: (n, classes) float32 whose rows have mean 0; zeros count as 1e-12."""
    logits = np.log(np.maximum(posteriors.astype(np.float64), 1e-12))
    return (logits - logits.mean(axis=1, keepdims=True)).astype(np.float32)


def _refuse(wrong: np.ndarray, who: str, rows: np.ndarray, problem: str) -> None:
    if wrong.any():
        row = int(rows[wrong.argmax()])
        where = f"row {row}" if row >= 0 else "an input that the attack made"
        raise BadAnswer(f"its answer to {where} {problem} ({int(wrong.sum())} of {len(rows)} answers do)", who)
