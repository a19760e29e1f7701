from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from distill.errors import DistillError
from distill.language import Evidence


class RougeL:
    """Overlap of the student's answers with the teacher's, in words: ROUGE-L (F1), and the share of equal answers.

    Paper: ROUGE: A Package for Automatic Evaluation of Summaries, Lin, ACL workshop 2004, sec. 3 (longest common
    subsequence), as the package `rouge-score` computes it.

    Raises:
        DistillError: `rouge-score` is not installed.
    """

    section: ClassVar[str] = "fidelity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"rouge_l": True, "same_answer": True}

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from rouge_score.tokenizers import DefaultTokenizer
        except ImportError:
            raise DistillError("needs rouge-score: pip install 'distill-framework[text]'", "metric.rouge_l") from None
        scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))
        teachers, others = evidence.answers["teacher"].column, evidence.answers[who].column
        scores = [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(teachers, others, strict=True)]
        return {"rouge_l": float(np.mean(scores)), "same_answer": float((teachers == others).mean())}
