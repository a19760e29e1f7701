from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import DistillError
from distill.language import Completions, SyntheticSet


class Filtered:
    """Answers that are degenerate or unlike the others are dropped: what a defense of decoding leaves behind.

    Paper: The Distillation Game: Adaptive Attacks and Efficient Defenses, Allouah et al., arXiv 2605.22737, 2026: the
    two filters of its code, a token that is repeated and letters of other scripts; there antidistillation sampling at
    strengths that work lost 5 to 11 % of its answers to them, the undefended teacher 0.02 %. Repetition of longer parts
    (a text that compresses well: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, ICML 2023)
    and losses that stand out are added here.
    Threat model: answers alone, and nothing is asked for. With `max_deviation` the attacker has labelled examples of
    its own, and trains a student on them.

    Args:
        run: An answer with one token so often in a row is dropped. Where tokens are not told: one word, or one letter.
        max_compression: Bytes of a text over those that zlib makes of it, at most.
        scripts: Letters of these are expected, and of those that the prompt has, as Unicode names them ("latin",
            "greek", "cyrillic", "cjk" …); null for any. What is the same letter in another form counts as that letter.
        max_deviation: An answer is dropped whose loss per token, to a student that knows the own examples alone, is
            further above the median answer's than so many deviations (1.4826 times the median one); null: no look.

    Raises:
        DistillError: A number is out of range.
    """

    def __init__(
        self,
        run: int = 8,
        max_compression: float = 4.0,
        scripts: Sequence[str] | None = ("latin", "greek"),
        max_deviation: float | None = None,
    ) -> None:
        if run < 2:
            raise DistillError(f"must be at least 2, not {run}", "recovery.run")
        if not max_compression > 1:
            raise DistillError(f"must be more than 1, not {max_compression}", "recovery.max_compression")
        if max_deviation is not None and not max_deviation > 0:
            raise DistillError(f"must be more than 0 or null, not {max_deviation}", "recovery.max_deviation")
        self.run, self.max_compression, self.max_deviation = run, max_compression, max_deviation
        self.scripts = None if scripts is None else {script.lower() for script in scripts}
        self.knows = "nothing" if max_deviation is None else "own labelled examples"
        self._repeated = re.compile(rf"\b(\w+)\b(?:\s+\1\b){{{run - 1}}}|(\w)\2{{{run - 1}}}")

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left, with counts of `repeated_token`, `repetitive`, `unexpected_script` and, where it is looked at,
        `outlier`."""
        for name, holds in (
            ("repeated_token", self._repeats),
            ("repetitive", self._compresses),
            ("unexpected_script", self._is_foreign),
        ):
            found = [holds(synthetic, row) for row in range(len(synthetic))]
            synthetic = synthetic.keep(~np.array(found, dtype=bool), name)
        if self.max_deviation is not None:
            synthetic = synthetic.keep(~self._outliers(synthetic, knowledge, self.max_deviation), "outlier")
        return synthetic

    def _repeats(self, synthetic: SyntheticSet, row: int) -> bool:
        if _told(synthetic.completions):
            tokens = synthetic.completions.tokens(row)
            changes = np.flatnonzero(np.diff(tokens))
            return bool(np.diff([-1, *changes, len(tokens) - 1]).max() >= self.run)
        return self._repeated.search(synthetic.completions.column[row]) is not None

    def _compresses(self, synthetic: SyntheticSet, row: int) -> bool:
        text = synthetic.completions.column[row].encode()
        return len(text) > self.max_compression * len(zlib.compress(text))

    def _is_foreign(self, synthetic: SyntheticSet, row: int) -> bool:
        if self.scripts is None:
            return False
        asked = "".join(message["content"] for message in synthetic.prompts.messages(row))
        return not _scripts(synthetic.completions.column[row]) <= self.scripts | _scripts(asked)

    @staticmethod
    def _outliers(synthetic: SyntheticSet, knowledge: Mapping[str, Any], most: float) -> np.ndarray:
        from distill.held_out_gradient import answer_losses
        from distill.packing import encode

        own = knowledge["student"].fit(knowledge["own"])
        encoded = encode(synthetic, own.tokenizer)
        lengths = np.array([max(1, len(answer)) for answer in encoded.answers])
        losses = answer_losses(own.module, encoded) / lengths
        above = losses - np.median(losses)
        return above > most * 1.4826 * np.median(np.abs(above))


def _told(completions: Completions) -> bool:
    ids = completions.token_ids
    return ids is not None and len(ids) > 0 and bool((ids >= 0).all())


def _scripts(text: str) -> set[str]:
    """The scripts that the letters of a text are from, in lower case."""
    letters = {letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()}
    return {unicodedata.name(letter, "unnamed").partition(" ")[0].lower() for letter in letters}
