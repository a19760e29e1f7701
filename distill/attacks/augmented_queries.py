from __future__ import annotations

import numpy as np

from distill.attacks._repeats import Repeats, Vary
from distill.contracts import Attack
from distill.errors import DistillError
from distill.randomness import KeyedRandom, derive
from distill.records import Examples, content_keys


class AugmentedQueries(Repeats):
    """Ask about variants of every input that another attack asks about, so that a recovery can average their answers.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security
    2024 (the "smoothing" attacker, 3 augmented queries to an input). Threat model: that of the other attack; it gains
    where the defense is random, or not smooth, between inputs that the teacher holds for the same. Every answer counts
    in the budget. Only full groups are asked; what is left of the budget is not spent.

    A group is the input as it is, followed by ``times - 1`` variants of it. Pictures are shifted, edge pixels filling
    what becomes free, and mirrored; pixels stay bytes, and inside [0, 1] where they are floats. Tables get normal
    noise; of texts some words are left out. A variant depends on the seed, the input and its place in the group.
    While it asks, the other attack is told the mean answer. Departs from the paper, whose queries are all augmented, in
    asking about the input itself too: it is what a student is trained on.

    Args:
        attack: The other attack: ``attack@attack.attack=copycat``.
        times: Answers to each input, at least 2.
        mirror: Mirror half of the pictures' variants, left to right: not for digits.
        shift: Largest shift of a picture as a share of its height and width, rounded to pixels, at least one pixel.
        jitter: Standard deviation of a table's noise, in those of each feature in the pool.
        dropped: Share of a text's words that are left out, below 1; one word always stays.

    Raises:
        DistillError: The other attack asks nothing, or is one on language models, or an option is out of its range.
    """

    def __init__(
        self,
        attack: Attack,
        times: int = 3,
        mirror: bool = False,
        shift: float = 0.1,
        jitter: float = 0.1,
        dropped: float = 0.1,
    ) -> None:
        super().__init__(attack, times)
        if not 0 < shift < 1:
            raise DistillError(f"shift lies between 0 and 1, not {shift}")
        if not jitter > 0:
            raise DistillError(f"jitter is more than 0, not {jitter}")
        if not 0 < dropped < 1:
            raise DistillError(f"dropped lies between 0 and 1, not {dropped}")
        self.mirror, self.shift, self.jitter, self.dropped = mirror, shift, jitter, dropped

    def variants(self, pool: Examples, seed: int) -> Vary:
        kind = pool.spec.kind
        spread = np.std(pool.inputs[: len(pool)], axis=0) if kind == "table" else None

        def vary(inputs: np.ndarray, variant: int) -> np.ndarray:
            keys = content_keys(inputs)
            rng = KeyedRandom(derive(seed, "augmented queries"), keys, np.full(len(inputs), variant))
            if kind == "image":
                return self._moved(inputs, rng)
            if spread is not None:
                return inputs + (self.jitter * spread * rng.normal(inputs.shape[1])).astype(np.float32)
            return self._thinned(inputs, rng)

        return vary

    def _moved(self, images: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        places = []
        draws = rng.uniform(3)
        for axis, draw in ((1, draws[:, 0]), (2, draws[:, 1])):
            size = images.shape[axis]
            most = max(1, round(self.shift * size))
            by = np.floor(draw * (2 * most + 1)).astype(np.int64) - most
            places.append(np.clip(np.arange(size) + by[:, None], 0, size - 1))
        down, across = places
        if self.mirror:
            mirrored = draws[:, 2] < 0.5
            across[mirrored] = across[mirrored, ::-1]
        return images[np.arange(len(images))[:, None, None], down[:, :, None], across[:, None, :]]

    def _thinned(self, texts: np.ndarray, rng: KeyedRandom) -> np.ndarray:
        words = [text.split() for text in texts]
        draws = rng.uniform(max((len(each) for each in words), default=0))
        thinned = np.empty(len(texts), dtype=object)
        for i, each in enumerate(words):
            kept = [word for word, draw in zip(each, draws[i], strict=False) if draw >= self.dropped]
            thinned[i] = " ".join(kept or each[:1])
        return thinned
