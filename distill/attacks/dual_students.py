from __future__ import annotations

import torch

from distill.attacks._data_free import Disagreeing


class DualStudents(Disagreeing):
    """Without any data: a generator seeks images on which two students give different outputs.

    Paper: Dual Student Networks for Data-Free Model Stealing, Beetham et al., ICLR 2023, sec. 3. Threat model: no data
    at all; labels are enough, and probabilities are used where they are told.

    The generator maximises the mean absolute difference of the students' logits; it asks nothing. The students learn
    from labels by cross-entropy, or from the logits that are recovered from probabilities by mean absolute difference.
    Rates fall to 0.3 after 10, 30 and 50 % of the budget. The attack's own student (track B) is the first one.

    The transfer set holds the last `kept` queries, which are coupled to the state of the attack's own students: see
    `distill.attacks.dfme.DFME`.

    Departs from the paper in the end of the budget (as `DFME`). Steps and rates are those of DFME, on which it builds.

    Args:
        batch_size: Images of a step.
        generator_steps: Steps of the generator in a round.
        student_steps: Steps of the students in a round.
        student_lr: SGD's rate in the beginning (momentum 0.9, weight decay 5e-4).
        generator_lr: Adam's rate in the beginning.
        latent: Numbers of noise an image is made of.
        width: Channels of the generator.
        kept: So many of the last queries are kept.

    Raises:
        ValueError: An option is out of its range.
        DistillError: Images are smaller than 8×8.
    """

    def __init__(
        self,
        batch_size: int = 256,
        generator_steps: int = 1,
        student_steps: int = 5,
        student_lr: float = 0.1,
        generator_lr: float = 1e-4,
        latent: int = 256,
        width: int = 64,
        kept: int = 200_000,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            generator_steps=generator_steps,
            student_steps=student_steps,
            replay_steps=0,
            diversity=0.0,
            student_lr=student_lr,
            generator_lr=generator_lr,
            latent=latent,
            width=width,
            kept=kept,
        )

    def disagreement(self, logits: torch.Tensor) -> torch.Tensor:
        first, second = logits
        return (first - second).abs().mean()
