from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from distill.contracts import Knowledge
from distill.records import TransferSet, content_keys


class Average:
    """The mean of the answers to one query: it undoes noise that is drawn anew, by 1/√n for n answers.

    Paper: ModelGuard: Information-Theoretic Defense Against Model Extraction Attacks, Tang et al., USENIX Security
    2024 (the "smoothing" attacker, with ``attack=augmented_queries``); with ``attack=repeated_queries`` it averages
    answers to the very same input. It changes nothing where every query was asked once.

    Queries belong together that the attack asked as one (`TransferSet.groups`); where it doesn't say, those of equal
    content: the same row of the pool, or equal inputs of the attack's own.
    """

    knows: ClassVar[str] = "nothing"

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """The first query of each group, in the order of asking, with the group's mean as its target.

        Logits are dropped where anything was averaged.
        """
        groups = transfer_set.groups if transfer_set.groups is not None else equal_queries(transfer_set)
        _, first, group, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        if len(first) == len(transfer_set):
            return replace(transfer_set, targets=transfer_set.posteriors)
        sums = np.zeros((len(first), transfer_set.classes))
        np.add.at(sums, group, transfer_set.posteriors)
        order = np.argsort(first)
        means = (sums / sizes[:, None]).astype(np.float32)[order]
        return replace(transfer_set.take(first[order]), targets=means, logits=None, groups=None)


def equal_queries(transfer_set: TransferSet) -> np.ndarray:
    """(n,) int64: a number for each different query, the pool's rows their own."""
    groups = transfer_set.rows.copy()
    if transfer_set.made is not None:
        groups[groups < 0] = -1 - np.unique(content_keys(transfer_set.made), return_inverse=True)[1]
    return groups
