"""The provider of text: a teacher, a defense, an access policy and prices, behind one method that answers."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from distill.contracts import LanguageDefense, LanguageTeacher, LocalLanguageTeacher
from distill.errors import BadAnswer, DistillError
from distill.heads import Head, Sparse
from distill.language import Completions, Prompts, Sampling, SyntheticSet, texts
from distill.provider.defenses.none import NoDefense
from distill.provider.keys import RepeatCounter
from distill.provider.ledger import LanguageLedger, Prices
from distill.provider.requests import RequestCache
from distill.randomness import KeyedRandom, derive
from distill.records import Budget, Cost, InterfaceProfile, Reveals, content_keys
from distill.speaker import CausalLM


class LanguageProvider:
    """Owns everything that the attacker must not reach. Not for several threads at once.

    A request is made once, ever: answers, as they were decoded, come from the request cache, which also is what an
    interrupted attack is played back from. (Those to requests with a bias, of which an attack makes one for each token,
    are not kept where the teacher is free.) `ledger` keeps apart what an attack is billed and what was really spent.

    Args:
        teacher: Undefended and prepared, so that its fingerprint is known.
        access: What the API reveals and lets ask.
        prices: What the attacker is billed.
        budget: What the attacker may spend.
        sampling: How answers are drawn where the attack does not say.
        cache: The folder that runs share (`distill.config.cache_dir()`).
        log: A folder for the log of this query stage: one line for each answer given, under whose `request` the cache
            keeps the decoded one. It is begun anew when an attack is played back. None for no log.
        defense: What is done to answers; prepared.
        serving: The teacher that answers under a defense of training; None for `teacher`.
        defense_id: What tells this defense from any other, its models included: decoded answers are kept under it.
        seed: Of what a defense draws.

    Raises:
        DistillError: The access policy reveals what the teacher can't tell, the defense works in decoding and the
            teacher's weights are elsewhere, or price and budget don't fit.
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
        log: Path | None = None,
        defense: LanguageDefense | None = None,
        serving: LanguageTeacher | None = None,
        defense_id: str = "",
        seed: int = 0,
    ) -> None:
        self.teacher, self.serving = teacher, teacher if serving is None else serving
        self.defense = NoDefense() if defense is None else defense
        self.sampling = sampling
        self.ledger = LanguageLedger(budget, prices)
        self._seed = seed
        told = access.top_k or 0
        if teacher.top_k is not None and told > teacher.top_k:
            raise DistillError(f"the teacher tells at most {teacher.top_k} log-probabilities", "access.top_k")
        if teacher.tokenizer is not None and told > len(teacher.tokenizer):
            raise DistillError(
                f"{told} is more than the {len(teacher.tokenizer)} tokens that there are", "access.top_k"
            )
        if access.reveals >= Reveals.PROBS and teacher.top_k is not None:
            raise DistillError("the teacher does not tell whole distributions; take text or top_k", "access.profile")
        if self.defense.logits_processor(sampling) is not None and not isinstance(self.serving, CausalLM):
            raise DistillError(
                f"{type(self.defense).__name__} works while an answer is decoded, which a teacher elsewhere does by "
                "itself; take a teacher whose weights are here",
                "defense",
            )
        self.profile = access.meet(self.defense.exposes)
        if self.profile.top_k is not None and teacher.tokenizer is not None:
            self.profile = replace(self.profile, top_k=min(self.profile.top_k, len(teacher.tokenizer)))
        self.told = self.profile.top_k or 0
        self._real_prices = Prices(0.0, teacher.usd_per_mtok_in, teacher.usd_per_mtok_out)
        self._requests = RequestCache(cache / "requests" / teacher.fingerprint)
        self._decoded = RequestCache(cache / "requests" / f"{self.serving.fingerprint}-{defense_id}")
        self._repeats = RepeatCounter()
        self._log_folder = log
        self._log: TextIO | None = None
        self._output: Head | None = None  # what scored sequences share

    # --- what the attacker gets ---------------------------------------------------------------------------------

    def answer(self, prompts: Prompts, sampling: Sampling | None, samples: int, partial: bool) -> SyntheticSet:
        """Answer and bill `samples` answers to each of n prompts, one prompt after the other.

        Raises:
            BudgetExceeded: Not all are affordable at their longest, and `partial` is off; nothing was asked.
            BadAnswer: The teacher gave something that is no answer.
        """
        started = time.perf_counter()
        sampling = sampling or self.sampling
        if sampling.logit_bias and not self.profile.logit_bias:
            raise DistillError("this API takes no logit bias (access.logit_bias)", "attack")
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
            answers = self.defended(asked.take(part), sampling, repeats[part])
            usd.append(self.ledger.bill(answers))
            self._write_log(asked.take(part), sampling, repeats[part], answers, usd[-1])
            parts.append(answers)
            done += fits
        self.ledger.seconds += time.perf_counter() - started
        return SyntheticSet(
            prompts=asked.take(slice(0, done)),
            completions=Completions.join(parts) if parts else Completions.none(),
            repeats=repeats[:done],
            sampling=sampling,
            usd=np.concatenate(usd) if usd else np.empty(0),
            teacher=self.serving.fingerprint,
            profile="text" if self.profile.reveals is Reveals.TEXT else str(self.profile),
        )

    def distributions(self, answers: SyntheticSet) -> tuple[Head | Sparse, np.ndarray]:
        """What came with these answers at each of their tokens, one answer after the other, and (n,) their lengths.

        They were billed with the answers.

        Raises:
            DistillError: They are not this teacher's, or came as text alone.
        """
        given = answers.completions
        if given.offsets is None or given.token_ids is None or answers.teacher != self.serving.fingerprint:
            raise DistillError(
                "these answers came without distributions; take signal=text and objective=sequence_kd, or an access "
                "that reveals more",
                "signal",
            )
        if nameless := int((given.token_ids < 0).sum()):
            # Another tokenization of these answers would have other positions.
            raise DistillError(
                f"{nameless} tokens of these answers have no id; tell teacher.tokenizer, or take signal=text", "signal"
            )
        lengths = np.diff(given.offsets)
        if given.top_ids is not None and given.top_logprobs is not None:
            return _sparse(given, slice(None)), lengths
        assert isinstance(self.teacher, LocalLanguageTeacher)  # whole distributions are revealed by no other
        asked = self.teacher.prompt_tokens(answers.prompts, answers.sampling or self.sampling)
        sequences = [before + given.tokens(row).tolist() for row, before in enumerate(asked)]
        heads = self.teacher.heads(sequences, [len(before) for before in asked])
        return replace(heads[0], hidden=torch.cat([head.hidden for head in heads])), lengths

    def score(self, sequences: list[list[int]], starts: list[int]) -> list[Head] | list[Sparse]:
        """The distributions of the tokens of given sequences from `starts` on, whoever wrote them: for students that
        learn on text of their own. Each sequence is billed as a query, and its tokens as those of a prompt. Where the
        profile is poorer than whole distributions, it is the most probable tokens, defended as those of an answer.

        Hidden states and output matrix tell no more than the logits do, but for a linear map (Carlini et al., "Stealing
        Part of a Production Language Model", ICML 2024). Nothing of it is cached.

        Raises:
            BudgetExceeded: Not all are affordable; nothing was scored.
            DistillError: The API reveals less, the teacher's weights are elsewhere, or a sequence can't be scored.
        """
        if not self.profile.scores:
            raise DistillError(
                "on-policy distillation needs the teacher's log-probabilities at tokens that the student wrote, which "
                "this API does not reveal; take access=probs, or top_k with access.prompt_logprobs=true, or "
                "rollout=off_policy",
                "access",
            )
        if not isinstance(self.serving, CausalLM):
            raise DistillError(
                "on-policy distillation needs an API that scores given tokens with (top-k) log-probabilities, which "
                "this one does not offer; take a teacher whose weights are here, or rollout=off_policy",
                "access",
            )
        if not sequences:
            return []
        started = time.perf_counter()
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        tokens, longest = len(self.serving.tokenizer), self.serving.context_tokens
        if len(starts) != len(sequences) or not all(0 < a < n for a, n in zip(starts, lengths.tolist(), strict=True)):
            raise DistillError("each sequence is scored from its second token or a later one on", "rollout")
        if longest is not None and lengths.max() > longest:
            raise DistillError(f"{lengths.max()} tokens are more than the teacher reads ({longest})", "max_length")
        if not all(min(sequence) >= 0 and max(sequence) < tokens for sequence in sequences):
            raise DistillError(f"the teacher has {tokens} tokens, and a sequence names others", "student")
        self.ledger.require(lengths, 0)
        heads = self.serving.heads(sequences, starts) if self.profile.reveals >= Reveals.PROBS else []
        scored = [] if heads else self._scored(self.serving, sequences, starts)
        nothing = texts([""] * len(sequences))
        asked = Completions(nothing, nothing, prompt_tokens=lengths, completion_tokens=np.zeros_like(lengths))
        self.ledger.bill(asked)
        self.ledger.worked(asked, self._real_prices)
        self.ledger.seconds += time.perf_counter() - started
        if scored:
            return scored
        if self._output is None:  # a copy: the teacher's own matrix is not the attacker's to change
            self._output = copy.deepcopy(replace(heads[0], hidden=heads[0].hidden[:0]))
        return [replace(self._output, hidden=head.hidden.clone()) for head in heads]

    def _scored(self, teacher: CausalLM, sequences: list[list[int]], starts: list[int]) -> list[Sparse]:
        """Given tokens, released as an answer to what is before them would be."""
        before = teacher.tokenizer.batch_decode([part[:start] for part, start in zip(sequences, starts, strict=True)])
        prompts, repeats = Prompts(texts(before), chat=False), np.zeros(len(sequences), dtype=np.int64)
        read = self.defense.tokens_read
        asked = replace(self.sampling, logit_bias=())
        drawn = self.defense.sampling(asked)
        processor = self.defense.logits_processor(drawn)
        told = teacher.scored(sequences, starts, drawn, [] if processor is None else [processor], self.told)
        released = self.defense.release(prompts, told, asked, self._rng(prompts, repeats)).with_top(self.told)
        self.ledger.defense_tokens += self.defense.tokens_read - read
        assert released.offsets is not None
        return [_sparse(released, slice(a, b)) for a, b in zip(released.offsets, released.offsets[1:], strict=False)]

    def _rng(self, prompts: Prompts, repeats: np.ndarray) -> KeyedRandom:
        return KeyedRandom(derive(self._seed, "defense"), prompts.keys, repeats)

    def close(self) -> None:
        """End the log. Every answer is in the cache as soon as it is made."""
        if self._log is not None:
            self._log.close()

    def _write_log(
        self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray, answers: Completions, usd: np.ndarray
    ) -> None:
        if self._log_folder is None:
            return
        if self._log is None:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            self._log = (self._log_folder / "answers.jsonl").open("w", encoding="utf-8")
        for row, key in enumerate(sampling.request_keys(prompts, repeats).tolist()):
            line = {
                "request": key.hex(),
                "repeat": int(repeats[row]),
                "tokens_in": int(answers.prompt_tokens[row]),
                "tokens_out": int(answers.completion_tokens[row]),
                "finish": answers.finish[row],
                "usd": float(usd[row]),
            }
            self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    # --- what the evaluation gets: not billed, but cached ---------------------------------------------------------

    def clean(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions:
        """The undefended teacher's own answers, with the log-probabilities that the profile would reveal."""
        return self._asked(self.teacher, None, self._requests, prompts, sampling, repeats)

    def defended(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray) -> Completions:
        """What is given out: decoded and released as the defense says, and cut to the profile."""
        drawn = self.defense.sampling(sampling)
        processor = self.defense.logits_processor(drawn)
        as_teacher = processor is None and self.serving is self.teacher
        cache = self._requests if as_teacher else self._decoded
        decoded = self._asked(self.serving, processor, cache, prompts, drawn, repeats)
        read = self.defense.tokens_read
        released = self.defense.release(prompts, decoded, sampling, self._rng(prompts, repeats))
        self.ledger.defense_tokens += self.defense.tokens_read - read
        if (released.completion_tokens > sampling.max_tokens).any():  # the budget was checked against that
            raise DistillError(f"{type(self.defense).__name__} made an answer longer than it may be", "defense")
        return self.revealed(released)

    def _asked(
        self,
        teacher: LanguageTeacher,
        processor: Any,
        cache: RequestCache,
        prompts: Prompts,
        sampling: Sampling,
        repeats: np.ndarray,
    ) -> Completions:
        """The answers of a teacher under a processor (or None), each made once."""
        top_k = self.told

        def generate(missing: np.ndarray) -> Completions:
            some, read = prompts.take(missing), self.defense.tokens_read
            if processor is None:
                made = teacher.generate(some, sampling, repeats[missing], top_k)
            else:
                assert isinstance(teacher, CausalLM)  # the constructor has seen to it
                made = teacher.generate(some, sampling, repeats[missing], top_k, [processor])
            _check(made, len(missing))
            self.ledger.worked(made, self._real_prices)
            self.ledger.defense_tokens += self.defense.tokens_read - read
            return made

        if sampling.logit_bias and not (teacher.remote or any(vars(self._real_prices).values())):
            return generate(np.arange(len(prompts))).with_top(top_k)
        keys = sampling.request_keys(prompts, repeats)
        return cache.get_or_generate(keys, top_k, generate, teacher.requests_at_once)

    def revealed(self, completions: Completions) -> Completions:
        """The answers with everything removed that the profile does not reveal."""
        if self.profile.reveals is Reveals.TEXT:
            return completions.without_tokens()
        return completions.with_top(self.told) if self.told else completions

    def cost(self) -> Cost:
        """What the attacker was billed, and what the teacher did in this process, evaluation included."""
        return self.ledger.cost()


def _sparse(given: Completions, positions: slice) -> Sparse:
    """What is told at some positions; a token that can't come is not told."""
    assert given.top_ids is not None
    assert given.top_logprobs is not None
    ids, logprobs = given.top_ids[positions], given.top_logprobs[positions]
    told = (ids >= 0) & (logprobs > -np.inf)
    ids, logprobs = np.where(told, ids, -1).astype(np.int64), np.where(told, logprobs, -np.inf).astype(np.float32)
    return Sparse(torch.from_numpy(ids), torch.from_numpy(logprobs))


def _check(made: Completions, wanted: int) -> None:
    """Raises `BadAnswer` where a teacher's answers are not what they say."""
    if len(made) != wanted:
        raise BadAnswer(f"gave {len(made)} answers to {wanted} requests", "teacher")
    for name in ("logprobs", "top_logprobs"):
        values: Any = getattr(made, name)
        if values is not None and (np.isnan(values).any() or (values > 1e-3).any()):
            raise BadAnswer(f"gave {name} that are no log-probabilities (NaN or more than 0)", "teacher")
