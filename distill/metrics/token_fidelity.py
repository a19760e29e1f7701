from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from distill.language import Evidence, Speaker

ROWS = 256  # positions whose whole distributions are held at once


class TokenFidelity:
    """How close the student's next-token distributions q come to the teacher's p, token for token.

    On the teacher's answers: `agreement` (same most probable token), `kl` (KL(p‖q) in nats) and `acceptance`
    (Σ min(p, q): the share of the student's tokens that speculative decoding would accept; Fast Inference from
    Transformers via Speculative Decoding, Leviathan, Kalman and Matias, ICML 2023, theorem 3.5). The same on the
    student's own answers, with `student_text_` before the name: there an error that leads away from all teacher text
    shows.

    Args:
        max_sequences: So many test prompts, the first ones.

    Raises:
        ValueError: There is no sequence to look at.
    """

    section: ClassVar[str] = "fidelity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"agreement": True, "kl": False, "acceptance": True} | {
        "student_text_agreement": True,
        "student_text_kl": False,
        "student_text_acceptance": True,
    }

    def __init__(self, max_sequences: int = 200) -> None:
        if max_sequences < 1:
            raise ValueError(f"max_sequences is at least 1, not {max_sequences}")
        self.max_sequences = max_sequences

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """Empty where one of the two is not at hand, or their tokens differ."""
        if not {"teacher", who} <= set(evidence.speakers):
            return {}
        numbers: dict[str, float] = {}
        for author, prefix in (("teacher", ""), (who, "student_text_")):
            numbers |= {f"{prefix}{name}": value for name, value in self._compare(evidence, who, author).items()}
        return numbers

    def _compare(self, evidence: Evidence, who: str, author: str) -> dict[str, float]:
        teacher, student = evidence.speakers["teacher"], evidence.speakers[who]
        prompts = evidence.prompts.take(slice(0, self.max_sequences))
        before = teacher.prompt_tokens(prompts, evidence.sampling)
        answers = [evidence.answers[author].tokens(row).tolist() for row in range(len(prompts))]
        sequences = [asked + answered for asked, answered in zip(before, answers, strict=True)]
        sums = np.zeros(4)
        for first in range(0, len(sequences), 16):
            some = slice(first, first + 16)
            for both in _distributions(teacher, student, sequences[some], [len(asked) for asked in before[some]]):
                sums += both
        return dict(zip(("agreement", "kl", "acceptance"), (sums[1:] / max(1.0, sums[0])).tolist(), strict=True))


def _distributions(
    teacher: Speaker, student: Speaker, sequences: list[list[int]], starts: list[int]
) -> Iterator[np.ndarray]:
    """For some positions at a time: their number, and the sums over them of agreement, KL and acceptance."""
    pairs = zip(teacher.heads(sequences, starts), student.heads(sequences, starts), strict=True)
    for ours, theirs in pairs:
        shared = min(ours.vocabulary, theirs.vocabulary)  # padded vocabularies: the rest is never used
        for start in range(0, len(ours), ROWS):
            p, q = (_logprobs(head, slice(start, start + ROWS), shared) for head in (ours, theirs))
            kl = (p.exp() * (p - q)).sum()
            overlap = p.minimum(q).exp().sum()
            yield np.array([len(p), (p.argmax(1) == q.argmax(1)).sum().item(), kl.item(), overlap.item()])


def _logprobs(head: Any, rows: slice, vocabulary: int) -> Any:
    return replace(head, hidden=head.hidden[rows]).logits()[:, :vocabulary].double().log_softmax(dim=1)
