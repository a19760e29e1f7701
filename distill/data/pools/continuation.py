from __future__ import annotations

from distill.data.passages import beginnings, read_passages
from distill.errors import DistillError
from distill.language import Prompts, Task

RUN = 13


class Continuation:
    """Plain text cut into beginnings to continue, in the order of the text.

    Threat model: the attacker holds unlabelled text, and an API that completes text without a chat around it. Passages
    that follow one another do not overlap; the rest of each is the reference. A passage that shares 13 words in a row
    with the task's text for perplexity is left out (the rule of Brown et al., "Language Models are Few-Shot Learners",
    NeurIPS 2020, appendix C), so that the same book may serve both.

    Args:
        path: A file of UTF-8 text; null: the King James Bible (Debian's package bible-kjv).
        prompt_words: Length of a beginning.
        answer_words: Length of its reference.
    """

    def __init__(self, path: str | None = None, prompt_words: int = 32, answer_words: int = 96) -> None:
        for name, words in (("prompt_words", prompt_words), ("answer_words", answer_words)):
            if words < 1:
                raise DistillError(f"{name} must be at least 1, not {words}")
        self.path, self.prompt_words, self.answer_words = path, prompt_words, answer_words

    def load_prompts(self, task: Task) -> Prompts:
        """Raises `MissingAsset` without a text, `DistillError` when it is not UTF-8, too short, or tested."""
        passages = read_passages(self.path, self.prompt_words + self.answer_words, "pool.path")
        if task.held_out_text is not None:
            tested = {run for passage in task.held_out_text for run in _runs(passage)}
            passages = passages[[tested.isdisjoint(_runs(passage)) for passage in passages]]
        if not len(passages):
            raise DistillError("all of this text is in the task's own for perplexity; bring another one", "pool.path")
        return beginnings(passages, self.prompt_words, "continuation")


def _runs(passage: str) -> list[tuple[str, ...]]:
    """All runs of 13 words; a shorter passage is one."""
    words = passage.split()
    return [tuple(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))]
