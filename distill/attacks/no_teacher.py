from __future__ import annotations

import numpy as np

from distill.attacks._relabelled import Relabelled
from distill.contracts import Apprentice
from distill.records import Examples, TransferSet


class NoTeacher(Relabelled):
    """Control: the very queries of another attack, and no answer at all: every class is equally likely.

    The student that comes out is what the pipeline gives by itself. One that scores above chance means a leak.

    Args:
        attack: The other attack: ``attack@attack.attack=active_thief``.

    Raises:
        DistillError: The other attack is one on language models or a control.
    """

    def posteriors(self, asked: TransferSet, pool: Examples, student: Apprentice, seed: int) -> np.ndarray:
        """Uniform."""
        return np.full((len(asked), asked.classes), 1 / asked.classes, dtype=np.float32)
