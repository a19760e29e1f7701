"""What the data-free attacks share: a generator makes the queries, and students learn from the answers, by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from distill.attacks._generator import Generator, squash
from distill.attacks._options import at_least, positive
from distill.attacks._own import Showing
from distill.contracts import Apprentice, Learner, Oracle
from distill.errors import DistillError
from distill.randomness import derive
from distill.records import Examples, Queries, Reveals, TransferSet

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the students, as Truong et al. and those who build on them

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits and posteriors, (n, classes) each -> (n,)


# --- how far a student is from the answers ----------------------------------------------------------------------------


def recovered(posteriors: torch.Tensor) -> torch.Tensor:
    """Logits of (n, classes) posteriors up to a constant a row, which is chosen so that the row's mean is 0."""
    logs = posteriors.clamp_min(1e-12).log()
    return logs - logs.mean(dim=1, keepdim=True)


def l1(logits: torch.Tensor, posteriors: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference from the recovered logits."""
    return (logits - recovered(posteriors)).abs().mean(dim=1)


def kl(logits: torch.Tensor, posteriors: torch.Tensor) -> torch.Tensor:
    """Divergence of the student from the answers, in nats."""
    return (posteriors * (posteriors.clamp_min(1e-12).log() - logits.log_softmax(dim=1))).sum(dim=1)


def cross_entropy(logits: torch.Tensor, posteriors: torch.Tensor) -> torch.Tensor:
    """Of the answers' labels, in nats."""
    return functional.cross_entropy(logits, posteriors.argmax(dim=1), reduction="none")


def lack_of_diversity(posteriors: torch.Tensor) -> torch.Tensor:
    """Negative entropy, in nats, of the mean of (n, classes) posteriors: least where all classes come alike."""
    mean = posteriors.mean(dim=0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def forward_differences(
    value: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, directions: int, step: float, rng: torch.Generator
) -> torch.Tensor:
    """The gradient of each row's value, of shape (n, ...) as `at`, estimated from values alone.

    It is d/m sum_i [v(x + e u_i) - v(x)]/e u_i (Truong et al. 2021, sec. 3.3), whose mean is the gradient, and whose
    relative error is about the root of d/m.

    Args:
        value: (m, ...) points to (m,) values, of which each depends on its own point alone. Called once.
        at: (n, ...) points x of d numbers each.
        directions: m, the number of random directions u_i on the unit sphere for each point.
        step: e.
        rng: Of the directions.
    """
    units = torch.randn((directions, *at.shape), generator=rng, dtype=at.dtype)
    units = functional.normalize(units.flatten(2), dim=2).view_as(units).to(at.device)
    points = torch.cat([at[None], at + step * units])
    values = value(points.flatten(0, 1)).unflatten(0, (directions + 1, len(at)))
    slopes = (values[1:] - values[0]) / step
    return at[0].numel() / directions * torch.einsum("mn,mn...->n...", slopes, units)


# --- what goes on -----------------------------------------------------------------------------------------------------


class Memory:
    """The last `capacity` queries with their answers, as columns of equal length; room is taken as it is needed.

    Args:
        capacity: How many rows are kept.
        columns: Empty arrays (0, ...) that say what a row of each column is.
    """

    def __init__(self, capacity: int, *columns: np.ndarray) -> None:
        self._capacity, self._columns = capacity, list(columns)
        self._seen = 0

    def __len__(self) -> int:
        return min(self._seen, self._capacity)

    def add(self, *rows: np.ndarray) -> None:
        """The same number of rows for each column; the oldest make room."""
        first = max(0, len(rows[0]) - self._capacity)
        places = np.arange(self._seen + first, self._seen + len(rows[0])) % self._capacity
        self._seen += len(rows[0])
        room = len(self._columns[0])
        if len(self) > room:
            more = min(self._capacity, max(len(self), 2 * room)) - room
            self._columns = [
                np.concatenate([old, np.empty((more, *old.shape[1:]), old.dtype)]) for old in self._columns
            ]
        for column, new in zip(self._columns, rows, strict=True):
            column[places] = new[first:]

    def draw(self, n: int, rng: torch.Generator) -> list[np.ndarray]:
        """n random rows, with replacement."""
        places = torch.randint(len(self), (n,), generator=rng).numpy()
        return [column[places] for column in self._columns]

    def in_order(self) -> list[np.ndarray]:
        """All that is kept, the oldest first."""
        oldest = self._seen % self._capacity if self._seen > self._capacity else 0
        return [np.roll(column[: len(self)], -oldest, axis=0) for column in self._columns]


class Game:
    """One attack under way: the generator, the students, and everything that was asked.

    Args:
        oracle: Whom to ask.
        shape: (height, width, channels) of an image.
        students: Untrained, on one device.
        generator: Makes activations of noise.
        kept: How many queries are remembered.
        rng: Of the noise, of directions and of what is replayed.
    """

    def __init__(
        self,
        oracle: Oracle,
        shape: tuple[int, ...],
        students: list[Learner],
        generator: Generator,
        kept: int,
        rng: torch.Generator,
    ) -> None:
        self.oracle, self.students, self.rng = oracle, students, rng
        self.device = students[0].device
        self.generator = generator.to(self.device)
        self.total, self.asked = oracle.affordable(), 0
        answers = np.empty((0, oracle.classes), dtype=np.float32)
        logits = [answers] if oracle.profile.reveals is Reveals.LOGITS else []
        self.memory = Memory(kept, np.empty((0, *shape), dtype=np.float32), answers, *logits)

    @property
    def left(self) -> int:
        """How many answers the budget still pays for."""
        return self.total - self.asked

    def activations(self, n: int) -> torch.Tensor:
        """(n, height, width, channels) of fresh noise, before `squash`."""
        return self.generator(torch.randn((n, self.generator.latent), generator=self.rng).to(self.device))

    def ask(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, classes) posteriors of (n, height, width, channels) pixels, which are remembered."""
        made = pixels.detach().cpu().contiguous().numpy()
        answers = self.oracle.ask(Queries.made(made))
        self.asked += len(made)
        self.memory.add(made, answers.posteriors, *([] if answers.logits is None else [answers.logits]))
        return torch.from_numpy(answers.posteriors).to(self.device)


class DataFree:
    """Rounds of steering the generator and teaching the students, until the budget is spent. Subclasses say how.

    Of a round's answers, `steering_queries` a step are for steering. Where what is left pays for no whole round, it all
    goes to the students.

    Args:
        batch_size: Images of a step.
        generator_steps: Steps of the generator in a round.
        student_steps: Steps of the students in a round, on images that are made at once.
        replay_steps: Further steps of a round on queries from earlier.
        student_lr: SGD's rate in the beginning.
        generator_lr: The generator's rate in the beginning.
        latent: Numbers of noise an image is made of.
        width: Channels of the generator.
        kept: So many of the last queries are kept, for the transfer set and to be replayed.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("image",)
    students: ClassVar[int] = 1
    rate_steps: ClassVar[tuple[float, ...]] = (0.1, 0.3, 0.5)  # shares of the budget after which rates fall to 0.3

    def __init__(
        self,
        *,
        batch_size: int,
        generator_steps: int,
        student_steps: int,
        replay_steps: int,
        student_lr: float,
        generator_lr: float,
        latent: int,
        width: int,
        kept: int,
    ) -> None:
        at_least(1, batch_size=batch_size, generator_steps=generator_steps, student_steps=student_steps)
        at_least(1, latent=latent, width=width, kept=kept)
        at_least(0, replay_steps=replay_steps)
        positive(student_lr=student_lr, generator_lr=generator_lr)
        self.batch_size, self.generator_steps, self.student_steps = batch_size, generator_steps, student_steps
        self.replay_steps, self.student_lr, self.generator_lr = replay_steps, student_lr, generator_lr
        self.latent, self.width, self.kept = latent, width, kept

    # --- what differs -------------------------------------------------------------------------------------------------

    @property
    def steering_queries(self) -> int:
        """Answers that one step of the generator takes."""
        return 0

    def distance(self, profile: Reveals) -> Distance:
        """What the students minimise, given what the answers reveal: posteriors where they are told, else labels."""
        return l1 if profile >= Reveals.PROBS else cross_entropy

    def steering(self, game: Game, pool: Examples) -> Callable[[], torch.Tensor]:
        """What to call for each step of the generator: it returns the scalar that the step lowers."""
        raise NotImplementedError

    def rate(self, done: float) -> float:
        """What rates are multiplied with when this share of the budget is spent."""
        return float(np.prod([0.3 for step in self.rate_steps if done >= step]))

    def generator_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.generator_lr, fused=True)

    # --- what is the same ---------------------------------------------------------------------------------------------

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """See `distill.contracts.Attack`. The transfer set holds the last `kept` queries."""
        if min(pool.spec.shape[:2]) < 8:
            raise DistillError(f"it makes images from 8×8, not {pool.spec.shape[0]}×{pool.spec.shape[1]}", "attack")
        students = [student.fresh(number) for number in range(self.students)]
        device = students[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive(seed, "attack", "networks"))
            generator = Generator(pool.spec.shape, self.latent, self.width)
            rng = torch.Generator().manual_seed(derive(seed, "attack", "draws"))
            game = Game(oracle, pool.spec.shape, students, generator, self.kept, rng)
            self._play(game, pool, student)
        made, posteriors, *logits = game.memory.in_order()
        return TransferSet(
            rows=np.full(len(made), -1, dtype=np.int64),
            posteriors=posteriors,
            made=made,
            logits=logits[0] if logits else None,
            pool=pool.fingerprint,
            profile=str(oracle.profile),
            note=f"{type(self).__name__}, which makes its own inputs",
        )

    def _play(self, game: Game, pool: Examples, student: Apprentice) -> None:
        distance, steer = self.distance(game.oracle.profile.reveals), self.steering(game, pool)
        parameters = list(game.generator.parameters())
        generating = self.generator_optimizer(parameters)
        learning = [
            torch.optim.SGD(
                *(own.module.parameters(), self.student_lr, MOMENTUM), weight_decay=WEIGHT_DECAY, fused=True
            )
            for own in game.students
        ]
        a_round = self.batch_size * self.student_steps + self.generator_steps * self.steering_queries
        showing = Showing(student, game.total)
        while game.left:
            rate = self.rate(game.asked / game.total)
            for optimizer, lr in ((generating, self.generator_lr), *((each, self.student_lr) for each in learning)):
                optimizer.param_groups[0]["lr"] = lr * rate
            if game.left >= a_round:
                for own in game.students:
                    own.module.eval()
                for _ in range(self.generator_steps):
                    loss = steer()
                    generating.zero_grad()
                    loss.backward(inputs=parameters)
                    generating.step()
            self._teach(game, min(game.left, self.batch_size * self.student_steps), distance, learning)
            showing.after(game.students[0], game.asked)

    def _teach(self, game: Game, n: int, distance: Distance, learning: Sequence[torch.optim.Optimizer]) -> None:
        """Let the students learn from n new queries, and from earlier ones."""
        with torch.no_grad():
            pixels = squash(game.activations(n))
        lessons = list(zip(pixels.split(self.batch_size), game.ask(pixels).split(self.batch_size), strict=True))
        for _ in range(self.replay_steps):
            earlier, told = game.memory.draw(self.batch_size, game.rng)[:2]
            lessons.append((torch.from_numpy(earlier), torch.from_numpy(told)))
        for own in game.students:
            own.module.train()
        for inputs, posteriors in lessons:
            for own, optimizer in zip(game.students, learning, strict=True):
                loss = distance(own.logits(inputs), posteriors.to(game.device)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


# --- two ways to steer ------------------------------------------------------------------------------------------------


class Estimating(DataFree):
    """Steer to where student and answers are far apart, along a gradient that is estimated from answers.

    Args:
        directions: Random directions for each image.
        step: How far the activations are moved along each.
        options: As of `DataFree`.
    """

    requires: ClassVar[Reveals] = Reveals.PROBS

    def __init__(self, *, directions: int, step: float, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        at_least(1, directions=directions)
        positive(step=step)
        self.directions, self.step = directions, step

    @property
    def steering_queries(self) -> int:
        return self.batch_size * (self.directions + 1)

    def steering(self, game: Game, pool: Examples) -> Callable[[], torch.Tensor]:
        distance, own = self.distance(game.oracle.profile.reveals), game.students[0]

        def value(activations: torch.Tensor) -> torch.Tensor:
            pixels = squash(activations)
            with torch.no_grad():
                return distance(own.logits(pixels), game.ask(pixels))

        def steer() -> torch.Tensor:
            at = game.activations(self.batch_size)
            slopes = forward_differences(value, at.detach(), self.directions, self.step, game.rng)
            return -(slopes * at).sum() / self.batch_size

        return steer


class Disagreeing(DataFree):
    """Steer to where two students disagree, which costs no answers.

    Args:
        diversity: Weight of `lack_of_diversity` of the students' posteriors.
        options: As of `DataFree`.
    """

    students: ClassVar[int] = 2

    def __init__(self, *, diversity: float, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        if not diversity >= 0:
            raise ValueError(f"diversity is at least 0, not {diversity}")
        self.diversity = diversity

    def disagreement(self, logits: torch.Tensor) -> torch.Tensor:
        """Scalar, of the students' (students, n, classes) logits."""
        raise NotImplementedError

    def steering(self, game: Game, pool: Examples) -> Callable[[], torch.Tensor]:
        def steer() -> torch.Tensor:
            pixels = squash(game.activations(self.batch_size))
            logits = torch.stack([own.logits(pixels) for own in game.students])
            posteriors = logits.softmax(dim=2).mean(dim=0)
            return self.diversity * lack_of_diversity(posteriors) - self.disagreement(logits)

        return steer
