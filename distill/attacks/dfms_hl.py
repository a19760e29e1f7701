from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from distill.attacks._data_free import DataFree, Distance, Game, cross_entropy, lack_of_diversity
from distill.attacks._generator import Discriminator, squash
from distill.records import Examples, Reveals

BETAS = (0.5, 0.999)  # of Adam, for both networks of the game (Radford et al. 2016)


class DFMSHL(DataFree):
    """From labels alone: a GAN on unrelated images makes the queries, and is pushed to make all classes alike.

    Paper: Towards Data-Free Model Stealing in a Hard Label Setting, Sanyal et al., CVPR 2022, sec. 3 (DFMS-HL). Threat
    model: labels, and images that need not be the teacher's (drawn shapes in the paper): those of the pool, which are
    shown to the discriminator and never asked about.

    In a round the discriminator and the generator take `generator_steps` each, and the student `student_steps`, by
    cross-entropy with the labels of what the generator makes. The generator's loss is that of the GAN plus `diversity`
    times the negative entropy of the batch's mean posterior, as the student sees it. In the beginning, for
    `initial_queries` and at most half of the budget, it is that of the GAN alone.

    The transfer set holds the last `kept` queries, which are coupled to the state of the attack's own student: see
    `distill.attacks.dfme.DFME`.

    Departs from the paper: the GAN is not trained before, for hundreds of epochs, but beside the student, so a budget
    bounds the work too; the student learns from made images alone, which are not augmented; its rate is DFME's, and
    rates fall as in `DFME`.

    Args:
        batch_size: Images of a step.
        generator_steps: Steps of the discriminator and the generator in a round.
        student_steps: Steps of the student in a round.
        initial_queries: So many queries at first are of the plain GAN.
        diversity: Weight of the entropy of classes.
        student_lr: SGD's rate in the beginning (momentum 0.9, weight decay 5e-4).
        generator_lr: Adam's rate in the beginning, of the discriminator too.
        latent: Numbers of noise an image is made of.
        width: Channels of the generator, and of the discriminator.
        kept: So many of the last queries are kept.

    Raises:
        ValueError: An option is out of its range.
        DistillError: Images are smaller than 8×8.
    """

    def __init__(
        self,
        batch_size: int = 64,
        generator_steps: int = 1,
        student_steps: int = 1,
        initial_queries: int = 50_000,
        diversity: float = 500.0,
        student_lr: float = 0.1,
        generator_lr: float = 2e-4,
        latent: int = 100,
        width: int = 64,
        kept: int = 200_000,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            generator_steps=generator_steps,
            student_steps=student_steps,
            replay_steps=0,
            student_lr=student_lr,
            generator_lr=generator_lr,
            latent=latent,
            width=width,
            kept=kept,
        )
        if initial_queries < 0:
            raise ValueError(f"initial_queries is at least 0, not {initial_queries}")
        if not diversity >= 0:
            raise ValueError(f"diversity is at least 0, not {diversity}")
        self.initial_queries, self.diversity = initial_queries, diversity

    def distance(self, profile: Reveals) -> Distance:
        return cross_entropy

    def generator_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.generator_lr, betas=BETAS, fused=True)

    def steering(self, game: Game, pool: Examples) -> Callable[[], torch.Tensor]:
        judge = Discriminator(pool.spec.shape, self.width).to(game.device)
        judging = self.generator_optimizer(judge.parameters())

        def discriminate(real: torch.Tensor, made: torch.Tensor) -> None:
            loss = functional.softplus(-judge(real)).mean() + functional.softplus(judge(made)).mean()
            judging.zero_grad()
            loss.backward()
            judging.step()

        def steer() -> torch.Tensor:
            pixels = squash(game.activations(self.batch_size))
            discriminate(self._unrelated(game, pool), pixels.detach())
            loss = functional.softplus(-judge(pixels)).mean()
            if game.asked >= min(self.initial_queries, game.total // 2):
                loss = loss + self.diversity * lack_of_diversity(game.students[0].logits(pixels).softmax(dim=1))
            return loss

        return steer

    def _unrelated(self, game: Game, pool: Examples) -> torch.Tensor:
        """(batch_size, height, width, channels) pixels of the pool in [0, 1]."""
        rows = torch.randint(len(pool), (self.batch_size,), generator=game.rng).numpy()
        images = torch.from_numpy(pool.inputs[rows]).to(game.device)
        return images / 255 if images.dtype == torch.uint8 else images
