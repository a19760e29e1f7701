from __future__ import annotations

from distill.attacks._data_free import Estimating


class DFME(Estimating):
    """Without any data: a generator seeks images on which the student is wrong, along gradients estimated from answers.

    Paper: Data-Free Model Extraction, Truong et al., CVPR 2021, sec. 3. Threat model: no data at all (the pool tells
    the size of an image and nothing else), probabilities, and hundreds of thousands of queries or more.

    In a round the generator takes `generator_steps`, each with ``batch_size * (directions + 1)`` answers, and the
    student `student_steps`, each with ``batch_size`` answers. Both play for the mean absolute difference of the
    student's logits from those that are recovered from the answers (log-probabilities less their mean); the generator's
    gradient is that of forward differences on activations before they become pixels. Rates fall to 0.3 after 10, 30 and
    50 % of the budget.

    The transfer set holds the last `kept` queries. They were made against a student in the making, whose state they are
    coupled to: a student that is trained on them from fresh weights (track A) says little of this attack; its own
    student (track B) is the point.

    Departs from the paper: the difference is averaged over the classes, not summed; the images of a round's student
    steps are made, and asked about, at once; what is left at the end and pays for no whole round goes to the student.

    Args:
        batch_size: Images of a step.
        generator_steps: n_G.
        student_steps: n_S.
        directions: m, random directions of an estimate.
        step: e, how far the activations are moved along each; a unit is the length of the direction.
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
        directions: int = 1,
        step: float = 1e-3,
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
            directions=directions,
            step=step,
            student_lr=student_lr,
            generator_lr=generator_lr,
            latent=latent,
            width=width,
            kept=kept,
        )
