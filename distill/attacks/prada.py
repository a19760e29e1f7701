from __future__ import annotations

from distill.attacks._moves import TargetedMoves
from distill.attacks._options import at_least


class Prada(TargetedMoves):
    """Double what was asked, round after round, by iterated steps from each input towards one random other class.

    Paper: PRADA: Protecting against DNN Model Stealing Attacks, Juuti et al., EuroS&P 2019, the attack with
    synthetic queries of kind T-RND: I-FGSM (Kurakin et al., 2017) towards a random class, 64/255 in 11 equal steps.
    Threat model: ten inputs or so of each class, labels or probabilities; the student's architecture is the run's.

    Departs from the paper, which draws its seeds class by class (here: random rows of a pool that need not be
    labelled), looks for a learning rate and a number of epochs by cross-validation on the seeds (here: the run's
    recipe), and trains with dropout where the student has any. It is `distill.attacks.jbda_tr.JBDATR` with one new
    input for each, a wider ball and steps that just reach its border; box and units are the same.

    Args:
        seeds: Random pool rows that are asked first: ten for each of ten classes in the paper.
        epsilon: Radius of the ball around an input.
        steps: How many, of epsilon / steps each.
        norm: "linf" or "l2".
        reservoir: At most so many inputs are moved in a round, from round `reservoir_after` on; None for all.
        reservoir_after: Counted from 0.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 100,
        epsilon: float = 64 / 255,
        steps: int = 11,
        norm: str = "linf",
        reservoir: int | None = None,
        reservoir_after: int = 3,
    ) -> None:
        at_least(1, steps=steps)
        super().__init__(seeds, 1, epsilon, epsilon / steps, steps, norm, reservoir, reservoir_after)
