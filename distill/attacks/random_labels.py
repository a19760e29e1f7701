from __future__ import annotations

import numpy as np

from distill.attacks._relabelled import Relabelled
from distill.contracts import Apprentice
from distill.randomness import KeyedRandom, derive
from distill.records import ROWS_AT_ONCE, Examples, TransferSet, content_keys, one_hot


class RandomLabels(Relabelled):
    """Control: a uniformly random label for each of the very queries of another attack.

    The student that comes out knows the inputs and nothing of the task: one that scores above chance means a leak. A
    label depends on the seed and the input alone, so that a repeated query gets the same one.

    Args:
        attack: The other attack: ``attack@attack.attack=active_thief``.

    Raises:
        DistillError: The other attack is one on language models or a control.
    """

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """One-hot."""
        inputs, labels = asked.inputs(pool), np.empty(len(asked), dtype=np.int64)
        for start in range(0, len(asked), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            keys = content_keys(inputs[part])
            draws = KeyedRandom(derive(seed, "random labels"), keys, np.zeros(len(keys), dtype=np.int64)).uniform(1)
            labels[part] = (draws[:, 0] * asked.classes).astype(np.int64)
        return one_hot(labels, asked.classes)
