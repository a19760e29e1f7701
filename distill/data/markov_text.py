from __future__ import annotations

import numpy as np

from distill.errors import DistillError
from distill.language import Prompts, Task, texts
from distill.randomness import generator

FIRST_SYMBOL = 0x4E00  # 20,000 letters from here on, none of them a space
BLOCK = 256  # texts drawn at once, however many are wanted
TEXT = 20_000  # characters of the text for perplexity


class MarkovText:
    """A language of which everything is known and in which much can be said: a random Markov chain over characters.

    Each character is followed by one of `successors` others, whose probabilities are drawn from a flat Dirichlet
    distribution: 3.06 nats a character at the defaults, where written-out arithmetic has next to none. A watermark can
    only mark where there is a choice.

    Prompts are plain texts to be continued; no two are equal, and fewer rows of a part are a prefix of more. References
    are how the chain went on. The checker gives the share of an answer's transitions, the one from the prompt's last
    character included, that the chain can make: about ``successors / symbols`` for random characters, 0 for an empty
    answer; what is likely does not count.

    Args:
        train_rows: What a teacher that is trained here learns from.
        held_out_rows: What an attacker may hold.
        test_rows: What the evaluation asks.
        symbols: Characters of the language, at most 20,000.
        successors: How many of them may follow each, at least 2.
        prompt_characters, answer_characters: Lengths.
        split_seed: Which texts.
        chain_seed: Which language.

    Raises:
        DistillError: A number is out of range, or there are not enough prompts of this length.
    """

    def __init__(
        self,
        train_rows: int = 40_000,
        held_out_rows: int = 10_000,
        test_rows: int = 500,
        symbols: int = 256,
        successors: int = 32,
        prompt_characters: int = 8,
        answer_characters: int = 64,
        split_seed: int = 0,
        chain_seed: int = 0,
    ) -> None:
        self.rows = {"test": test_rows, "held_out": held_out_rows, "train": train_rows}
        numbers = {f"{part}_rows": rows for part, rows in self.rows.items()}
        numbers |= {"prompt_characters": prompt_characters, "answer_characters": answer_characters}
        for name, number in numbers.items():
            if number < 1:
                raise DistillError(f"{name} must be at least 1, not {number}")
        if not 2 <= successors <= symbols <= 20_000:
            raise DistillError(
                f"successors ({successors}) must be at least 2 and at most symbols ({symbols}), which is at most 20000"
            )
        # Some prompts are unlikely, so that by far not all of them are drawn.
        if 8 * sum(self.rows.values()) > symbols * successors ** (prompt_characters - 1):
            raise DistillError(
                f"prompt_characters ({prompt_characters}) are too few for {sum(self.rows.values())} rows"
            )
        self.symbols, self.successors = symbols, successors
        self.prompt_characters, self.answer_characters = prompt_characters, answer_characters
        self.split_seed, self.chain_seed = split_seed, chain_seed

    @property
    def chain(self) -> np.ndarray:
        """(symbols, symbols) float64: row i is what follows character i, as `chr` of its number counted from U+4E00."""
        rng = generator(self.chain_seed, "markov_text", "chain")
        chain = np.zeros((self.symbols, self.symbols))
        for row in chain:
            followers = rng.choice(self.symbols, size=self.successors, replace=False)
            row[followers] = rng.dirichlet(np.ones(self.successors))
        return chain

    def load(self) -> Task:
        """Never raises."""
        chain = self.chain
        cumulated = chain.cumsum(axis=1)
        seen: set[str] = set()
        test, held_out, train = (self._draw(cumulated, part, rows, seen) for part, rows in self.rows.items())
        (text,) = self._texts(cumulated, generator(self.split_seed, "markov_text", "text"), 1, TEXT)

        def possible(prompts: Prompts, answers: np.ndarray) -> np.ndarray:
            return np.array(
                [_share(chain, prompt[-1:] + answer) for prompt, answer in zip(prompts.column, answers, strict=True)]
            )

        return Task("markov_text", train, held_out, test, possible, held_out_text=texts([text]))

    def _draw(self, cumulated: np.ndarray, part: str, rows: int, seen: set[str]) -> Prompts:
        """Prompts that are not in `seen`, which grows by them."""
        rng = generator(self.split_seed, "markov_text", part)
        prompts: list[str] = []
        references: list[str] = []
        while len(prompts) < rows:
            for text in self._texts(cumulated, rng, BLOCK, self.prompt_characters + self.answer_characters):
                prompt = text[: self.prompt_characters]
                if prompt not in seen and len(prompts) < rows:
                    seen.add(prompt)
                    prompts.append(prompt)
                    references.append(text[self.prompt_characters :])
        return Prompts(texts(prompts), chat=False, references=texts(references), name=f"markov_text/{part}")

    def _texts(self, cumulated: np.ndarray, rng: np.random.Generator, n: int, length: int) -> list[str]:
        """n texts; any first character is equally likely."""
        uniforms = rng.random((n, length))
        drawn = np.empty((n, length), dtype=np.int64)
        drawn[:, 0] = uniforms[:, 0] * self.symbols
        for i in range(1, length):
            row = cumulated[drawn[:, i - 1]]
            drawn[:, i] = (row <= uniforms[:, i : i + 1] * row[:, -1:]).sum(axis=1)
        return ["".join(map(chr, row)) for row in (FIRST_SYMBOL + drawn).tolist()]


def _share(chain: np.ndarray, text: str) -> float:
    """The share of the steps of a text that the chain can make; 0 where there are none."""
    numbers = np.array([ord(character) for character in text], dtype=np.int64) - FIRST_SYMBOL
    known = (numbers >= 0) & (numbers < len(chain))
    before, after = numbers[:-1] * known[:-1], numbers[1:] * known[1:]
    steps = (chain[before, after] > 0) & known[:-1] & known[1:]
    return float(steps.mean()) if len(steps) else 0.0
