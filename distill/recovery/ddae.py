from __future__ import annotations

from typing import ClassVar

from distill.contracts import Knowledge
from distill.records import TransferSet
from distill.recovery._restorer import check, restored, shadow_answers, simulated
from distill.recovery._simulated import code


class DDAE:
    """A restorer learns to undo the defense from what the defense makes of the answers of shadow models.

    Paper: D-DAE: Defense-Penetrating Model Extraction Attacks, Chen et al., IEEE S&P 2023 (restorer and
    loss: Σ|R(D(y)) - y|); 20 shadow models as in ModelGuard, Tang et al., USENIX Security 2024. The restorer is a
    perceptron K-128-64-K (1024-512 from 100 classes on, 2048-1024 from 200), trained by SGD in batches of 1,024, or in
    16 batches an epoch where that is less.
    Threat model: the attacker knows the defense's code and options, not its randomness; it asks nothing more than what
    it asked. What the deployed defense is may be found out first: `ddae_identified`.

    Departs from the papers, whose shadow models learn from labelled data (ModelGuard: random classes of the query set):
    here they are students of the attacker's own, trained on the returned labels of random shares of its own queries,
    and asked all of its queries. Momentum (0.9) and the cosine schedule are ours. A defense that leaves the answers of
    the shadow models as they are needs no restorer.

    Args:
        shadows: How many shadow models, at least 2. Each costs the training of a student.
        share: Of the queries, that each shadow model is trained on. The nearer its answers are to the teacher's, the
            better is what the restorer learns; a small share makes them too flat.
        epochs: Of the restorer, over all answers of all shadow models.

    Raises:
        DistillError: An option is out of range.
    """

    knows: ClassVar[str] = "the defense's code"

    def __init__(self, shadows: int = 20, share: float = 0.8, epochs: int = 200) -> None:
        check(shadows=shadows, share=share, epochs=epochs)
        self.shadows, self.share, self.epochs = shadows, share, epochs

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """`targets` = the restored answers, (n, classes); logits are dropped."""
        clean = shadow_answers(transfer_set, knowledge, self.shadows, self.share)
        returned = simulated(code(knowledge), clean, transfer_set, knowledge)
        return restored(transfer_set, returned, clean, knowledge, self.epochs)
