from __future__ import annotations

from distill.attacks._repeats import Repeats
from distill.contracts import Attack
from distill.records import Examples


class RepeatedQueries(Repeats):
    """Ask every query of another attack several times, so that a recovery can average the noise away.

    Paper: Prediction Poisoning: Towards Defenses Against DNN Model Stealing Attacks, Orekondy et al., ICLR 2020, names
    it as the way around random noise. Threat model: that of the other attack; the answers to a repeated query differ
    where the defense is random. Every answer counts in the budget: with `times` answers to a query there are as many
    times fewer queries. Only full groups are asked; what is left of the budget is not spent.

    Each answer is in the transfer set, in a group with the others to its query; ``recovery=average`` takes their mean,
    and without it a student learns from each. While it asks, the other attack is told the mean.

    Args:
        attack: The other attack: ``attack@attack.attack=copycat``.
        times: Answers to each query, at least 2. No paper names a number: it is that of `AugmentedQueries`, so that
            both ask about equally many inputs.

    Raises:
        DistillError: The other attack asks nothing, or is one on language models.
    """

    def __init__(self, attack: Attack, times: int = 3) -> None:
        super().__init__(attack, times)

    def variants(self, pool: Examples, seed: int) -> None:
        return None
