from __future__ import annotations

from distill.data.passages import beginnings, read_passages
from distill.data.splits import check_share
from distill.errors import DistillError
from distill.language import Task
from distill.randomness import generator


class PlainText:
    """Real text: beginnings to be continued, and whole passages for perplexity. Nothing can be checked.

    Prompts are plain texts without a chat; the reference is how the passage goes on. Passages do not overlap, and which
    of them are the test's is drawn at random.

    Args:
        path: A file of UTF-8 text; null: the King James Bible (Debian's package bible-kjv; 820,000 words).
        prompt_words: Length of a beginning.
        answer_words: Length of its reference.
        test_share: The share of the passages that is the test and the text for perplexity.
        split_seed: Which passages.

    Raises:
        DistillError: A number is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        prompt_words: int = 32,
        answer_words: int = 96,
        test_share: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        for name, words in (("prompt_words", prompt_words), ("answer_words", answer_words)):
            if words < 1:
                raise DistillError(f"{name} must be at least 1, not {words}")
        self.path, self.prompt_words, self.answer_words = path, prompt_words, answer_words
        self.test_share, self.split_seed = check_share(test_share), split_seed

    def load(self) -> Task:
        """Raises `MissingAsset` without a text, `DistillError` when it is not UTF-8 or too short."""
        passages = read_passages(self.path, self.prompt_words + self.answer_words, "data.path")
        if len(passages) < 2:
            raise DistillError("one passage can't be shared out; bring a longer text or lower the words", "data.path")
        order = generator(self.split_seed, "split").permutation(len(passages))
        tests = max(1, round(len(order) * self.test_share))
        test = beginnings(passages[order[:tests]], self.prompt_words, "plain_text/test")
        held_out = beginnings(passages[order[tests:]], self.prompt_words, "plain_text/held_out")
        return Task("plain_text", held_out.take(slice(0, 0)), held_out, test, held_out_text=passages[order[:tests]])
