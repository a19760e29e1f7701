from __future__ import annotations

from typing import ClassVar

import torch

from distill.attacks._data_free import Disagreeing


class DisGUIDE(Disagreeing):
    """Without any data: a generator seeks images on which two students disagree, of all classes alike.

    Paper: DisGUIDE: Disagreement-Guided Data-Free Model Extraction, Rosenthal et al., AAAI 2023, sec. 3. Threat model:
    no data at all; labels are enough, and probabilities are used where they are told.

    The generator maximises the standard deviation of the students' posteriors, averaged over classes and images, less
    `diversity` times the negative entropy of the batch's mean posterior; it asks nothing. The students learn from
    labels by cross-entropy, or from the logits that are recovered from probabilities by mean absolute difference, and
    once more from earlier queries. Rates fall to 0.3 after 40 and 80 % of the budget. The attack's own student (track
    B) is the first one.

    The transfer set holds the last `kept` queries, which are coupled to the state of the attack's own students: see
    `distill.attacks.dfme.DFME`.

    Departs from the paper, which makes an eighth of the images grey and evaluates both students as one ensemble.

    Args:
        batch_size: Images of a step.
        generator_steps: Steps of the generator in a round.
        student_steps: Steps of the students in a round, on new queries.
        replay_steps: Steps of the students in a round, on queries from earlier.
        diversity: Weight of the entropy of classes.
        student_lr: SGD's rate in the beginning (momentum 0.9, weight decay 5e-4).
        generator_lr: Adam's rate in the beginning.
        latent: Numbers of noise an image is made of.
        width: Channels of the generator.
        kept: So many of the last queries are kept, for the transfer set and to be replayed.

    Raises:
        ValueError: An option is out of its range.
        DistillError: Images are smaller than 8×8.
    """

    rate_steps: ClassVar[tuple[float, ...]] = (0.4, 0.8)

    def __init__(
        self,
        batch_size: int = 256,
        generator_steps: int = 1,
        student_steps: int = 1,
        replay_steps: int = 3,
        diversity: float = 0.2,
        student_lr: float = 0.03,
        generator_lr: float = 1e-4,
        latent: int = 256,
        width: int = 64,
        kept: int = 1_000_000,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            generator_steps=generator_steps,
            student_steps=student_steps,
            replay_steps=replay_steps,
            diversity=diversity,
            student_lr=student_lr,
            generator_lr=generator_lr,
            latent=latent,
            width=width,
            kept=kept,
        )

    def disagreement(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=2).std(dim=0).mean()
