"""What the defenses whose formula is written in torch share.

On a CPU `torch.pow` and `torch.sigmoid` round a number differently by its place in a batch; `exp`, `log` and sums along
rows do not, so the formulas are made of those.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distill.records import Answers, keep_label


def through(
    transform: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    answers: Answers,
    info: np.ndarray | None,
    keeps_argmax: bool,
) -> Answers:
    """The answers of a `TensorDefense`: its formula in float64, rounded to float32.

    Rounding may tie the label with another class; where the arg-max is claimed, the label gets one float32 step.
    """
    with torch.no_grad():
        known = None if info is None else torch.from_numpy(info)
        returned = transform(torch.from_numpy(answers.posteriors.astype(np.float64)), known).numpy().astype(np.float32)
    return Answers(keep_label(returned, answers.labels) if keeps_argmax else returned)


def straight_through(value: torch.Tensor, posteriors: torch.Tensor) -> torch.Tensor:
    """`value`, to the bit, with the gradient of `posteriors`: for a quantiser, whose own gradient is zero."""
    return value.detach() + (posteriors - posteriors.detach())
