from __future__ import annotations

from distill.attacks._moves import TargetedMoves
from distill.attacks._options import at_least


class JBDATR(TargetedMoves):
    """From each input, small steps towards k classes drawn at random.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security 2024
    ("JBDA-TR"), after Juuti et al. (see `distill.attacks.prada.Prada`); numbers of its released code: k = 3, step 1.85
    epsilon / T. Threat model: that of `distill.attacks.jbda.JBDA`, and its box and units.

    Each new input has one target from its first step to its last; the k of one input differ, and none is the oracle's
    label. The released code draws a target anew at each step, so that the steps undo one another, and clips pixels that
    were normalised to [0, 1].

    Args:
        seeds: Random pool rows that are asked first.
        k: Targets of an input, at most one less than there are classes.
        epsilon: Radius of the ball around an input.
        steps: T.
        norm: "linf" or "l2".
        reservoir: At most so many inputs are moved in a round, from round `reservoir_after` on; None for all.
        reservoir_after: Counted from 0.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 1000,
        k: int = 3,
        epsilon: float = 0.1,
        steps: int = 8,
        norm: str = "linf",
        reservoir: int | None = None,
        reservoir_after: int = 3,
    ) -> None:
        at_least(1, steps=steps)
        super().__init__(seeds, k, epsilon, 1.85 * epsilon / steps, steps, norm, reservoir, reservoir_after)
