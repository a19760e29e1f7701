from __future__ import annotations

from dataclasses import replace

from distill.attacks.knockoff_random import KnockoffRandom
from distill.contracts import Apprentice, Oracle
from distill.records import Examples, TransferSet, one_hot


class Copycat(KnockoffRandom):
    """Random pool inputs, and only the hard label of each answer is kept, whatever the interface reveals.

    Paper: Copycat CNN: Stealing Knowledge by Persuading Confession with Random Non-Labeled Data, Correia-Silva et al.,
    IJCNN 2018. Threat model: label-only access, a pool of unlabelled inputs. The paper's augmentation of the
    transfer set is in `distill.attacks.copycat_augmented`.
    """

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """As `KnockoffRandom`, with one-hot posteriors."""
        asked = super().extract(oracle, pool, student, seed)
        labels = asked.posteriors.argmax(axis=1)
        return replace(asked, posteriors=one_hot(labels, asked.classes), logits=None, profile="label")
