from __future__ import annotations

from distill.attacks.jbda import JBDA


class JBSelf(JBDA):
    """Jacobian-based augmentation that always moves an input further into its own class.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks, Orekondy et al., ICLR 2020
    ("jbself"): x' = clip(x - lambda sgn(dCE(F(x), y)/dx)), with F the student and y the oracle's label of x. The minus
    is that of the loss: these are the first rounds of `JBDA`, which turns later. Threat model, box, units and norms are
    the same.

    Departs from the released code, which asks about x - d, stores x + d over the earlier inputs, and turns the sign
    every few rounds.

    Args:
        seeds: See `JBDA`; 100 in the released code.
        step: lambda.
        norm: "linf" or "l2".
        reservoir: See `JBDA`.
        reservoir_after: See `JBDA`.

    Raises:
        ValueError: An option is out of its range.
        DistillError: The budget or the pool is smaller than the seeds.
    """

    def __init__(
        self,
        seeds: int = 100,
        step: float = 0.1,
        norm: str = "linf",
        reservoir: int | None = None,
        reservoir_after: int = 3,
    ) -> None:
        super().__init__(seeds, step, True, None, norm, reservoir, reservoir_after)
