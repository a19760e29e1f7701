from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from distill.language import Evidence, Prompts, Sampling
from distill.randomness import derive
from distill.watermarking import first_of, seeds, windows

ROWS = 256  # positions whose whole distributions are held at once
SEQUENCES = 64  # texts that are read at once
NUMBERS = ("log10_p", "evidence", "tokens", "wrong_key_median_log10_p", "wrong_key_min_log10_p")


class Radioactivity:
    """Does a model speak as if it had learnt from text with the provider's mark? Exact p-values, each token once.

    Paper: Watermarking Makes Language Models Radioactive, Sander, Fernandez, Durmus, Douze and Furon, NeurIPS 2024,
    section 4. Threat model: the provider holds the key and what it answered to its customer (the paper's supervised
    setting). Of a *closed* model it sees answers to prompts of its choice, of an *open* one the weights.

    - ``closed_…``: the model draws answers to the test prompts (where it is not at hand, as they were given), which are
      read with the teacher's tokenizer. Left out is a token whose window occurs in its own prompt, and one whose window
      occurs fewer than `min_count` times in the answers that the customer was given.
    - ``open_…``, of models at hand: it reads those answers, and what it finds most probable at each place is scored.
      Left out is a place whose window occurred before in the same text, which the model may simply repeat.

    All texts are pooled, and tokens that the scheme cannot tell apart count once: whoever does not know the key is then
    accused no more often than the p-value says. ``log10_p`` is that of the pooled tokens, ``tokens`` how many counted
    and ``evidence`` their mean mark (of a green list the share that is green). The wrong keys are a control: the same
    test of the same tokens with keys that nobody used, the median and the smallest of as many p-values.

    The open test reads weights: what a student does to its logits while it answers is not seen there.

    Args:
        samples: Answers to each test prompt.
        temperature, top_p: How they are drawn; the authors' code's.
        min_count: 0 for every window (the unsupervised setting).
        max_read: So many of the customer's answers are read by an open model, the first ones.
        wrong_keys: How many.
        seed: Of the wrong keys.

    Raises:
        ValueError: A number is too small.
    """

    section: ClassVar[str] = "ownership"
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        f"{mode}_{name}": name in ("evidence", "tokens") for mode in ("closed", "open") for name in NUMBERS
    }

    def __init__(
        self,
        samples: int = 1,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_count: int = 1,
        max_read: int = 10_000,
        wrong_keys: int = 20,
        seed: int = 0,
    ) -> None:
        for name, number in {"samples": samples, "max_read": max_read, "wrong_keys": wrong_keys}.items():
            if number < 1:
                raise ValueError(f"{name} is at least 1, not {number}")
        if min_count < 0:
            raise ValueError(f"min_count is at least 0, not {min_count}")
        self.samples, self.temperature, self.top_p = samples, temperature, top_p
        self.min_count, self.max_read, self.wrong_keys, self.seed = min_count, max_read, wrong_keys, seed

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """Empty where text is not marked, or the teacher's tokens are not known."""
        if evidence.watermark is None or "teacher" not in evidence.speakers:
            return {}
        numbers = self._test("closed", evidence.watermark, *self._answered(evidence, who))
        if evidence.learnt is not None and who in evidence.speakers:
            numbers |= self._test("open", evidence.watermark, *self._read(evidence, who))
        return numbers

    def _test(self, mode: str, mark: Any, before: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        def tried(key: int | None = None) -> tuple[float, float, float]:
            once = mark.countable(before, tokens, key)
            marked = mark.evidence(before[once], tokens[once], key)
            return mark.log10_p_value(marked), float(marked.sum()) / max(1, len(marked)), float(len(marked))

        keys = [derive(self.seed, "wrong key", i) % 2**31 for i in range(self.wrong_keys)]
        wrong = [tried(key)[0] for key in keys]
        found = (*tried(), float(np.median(wrong)), min(wrong))
        return {f"{mode}_{name}": number for name, number in zip(NUMBERS, found, strict=True)}

    def _answered(self, evidence: Evidence, who: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, width) windows and (n,) tokens of its own answers that may be scored."""
        mark, prompts, answers = evidence.watermark, evidence.prompts, evidence.answers[who].column
        if who in evidence.speakers:
            drawn = replace(evidence.sampling, temperature=self.temperature, top_p=self.top_p)
            repeats = np.tile(np.arange(self.samples), len(prompts))
            prompts = prompts.take(np.repeat(np.arange(len(prompts)), self.samples))
            answers = evidence.speakers[who].generate(prompts, drawn, repeats).column
        texts, starts = _written(evidence, prompts, answers, evidence.sampling)
        before, tokens, where = windows(texts, mark.width)
        own = where[:, 1] >= starts[where[:, 0]]
        here = _words(where[:, :1], before)
        scored = own & ~np.isin(here, here[~own])
        if self.min_count and evidence.learnt is not None:
            learnt = evidence.learnt
            given, began = _written(
                evidence, learnt.prompts, learnt.completions.column, learnt.sampling or evidence.sampling
            )
            theirs, _, place = windows(given, mark.width)
            found, counts = np.unique(_words(theirs[place[:, 1] >= began[place[:, 0]]]), return_counts=True)
            scored &= np.isin(_words(before), found[counts >= self.min_count])
        return before[scored], tokens[scored]

    def _read(self, evidence: Evidence, who: str) -> tuple[np.ndarray, np.ndarray]:
        """(n, width) windows of what was answered, and the (n,) tokens that the model would go on with."""
        assert evidence.learnt is not None
        learnt, speaker = evidence.learnt.head(self.max_read), evidence.speakers[who]
        texts, starts = _written(
            evidence, learnt.prompts, learnt.completions.column, learnt.sampling or evidence.sampling
        )
        before, _, where = windows(texts, evidence.watermark.width)
        scored = (where[:, 1] >= starts[where[:, 0]]) & first_of(_words(where[:, :1], before))
        guessed = []
        for first in range(0, len(texts), SEQUENCES):
            some = slice(first, first + SEQUENCES)
            guessed += [_most_probable(head) for head in speaker.heads(texts[some], starts[some].tolist())]
        offsets = np.cumsum([0, *map(len, guessed)])[:-1] - starts
        row, place = where[scored].T
        return before[scored], np.concatenate(guessed)[offsets[row] + place]


def _written(
    evidence: Evidence, prompts: Prompts, answers: np.ndarray, sampling: Sampling
) -> tuple[list[list[int]], np.ndarray]:
    """Prompts with their answers in the teacher's tokens, and the (n,) places at which the answers start."""
    teacher = evidence.speakers["teacher"]
    asked = teacher.prompt_tokens(prompts, sampling)
    told = teacher.tokenizer(answers.tolist(), add_special_tokens=False).input_ids
    return [a + b for a, b in zip(asked, told, strict=True)], np.array([len(a) for a in asked], np.int64)


def _words(*columns: np.ndarray) -> np.ndarray:
    """(n,) int64, equal where the rows of all columns are."""
    return seeds(np.concatenate(columns, axis=1), 0, "ordered")


def _most_probable(head: Any) -> np.ndarray:
    """(n,) int64."""
    tokens = [
        replace(head, hidden=head.hidden[start : start + ROWS]).logits().argmax(dim=1)
        for start in range(0, len(head), ROWS)
    ]
    return torch.cat(tokens).cpu().numpy() if tokens else np.empty(0, np.int64)
