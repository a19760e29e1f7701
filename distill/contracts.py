"""The contracts of the framework, on one page.

A method is one class that fits one of these protocols, in a module of the room that the protocol names, with one yaml
beside the room's others. Nothing is registered and nothing is inherited: the contract tests hold every class of every
room against this page. Rooms lean on this page and on `distill.records`, never on one another.

Who holds what: the provider holds the teacher and the defense; the attacker holds an `Oracle`, a pool and a student;
the evaluation holds everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from distill.language import Completions, Evidence, Prompts, Sampling, SyntheticSet, Task
from distill.randomness import KeyedRandom
from distill.records import (
    Answers,
    Cost,
    Dataset,
    Examples,
    Inputs,
    InputSpec,
    InterfaceProfile,
    Queries,
    Result,
    Reveals,
    TransferSet,
)

if TYPE_CHECKING:  # this page is read where torch is not loaded
    import torch

    from distill.alignment import Aligned
    from distill.decoding import Guided, Processor
    from distill.heads import Head, Sparse


class Data(Protocol):
    """`distill.data`: a labelled data set for the provider, and the test rows of the evaluation."""

    def load(self) -> Dataset:
        """Raises `MissingAsset` when the data is nowhere to be found, `DistillError` when it can't serve."""
        ...


class Pool(Protocol):
    """`distill.data.pools`: unlabelled (or otherwise labelled) inputs that an attacker draws from."""

    def load(self, data: Dataset) -> Examples:
        """Inputs of the same spec as `data.spec`. Only `data.held_out` may be taken from `data`."""
        ...


# --- the provider's side --------------------------------------------------------------------------------------------


class Teacher(Protocol):
    """`distill.provider.teachers`: a model that answers queries.

    Attributes:
        output: What `predict` returns: LOGITS, PROBS or (one-hot) LABEL.
        usd_per_query: What one answer really costs whoever calls it; 0 for a model of one's own.
        remote: True where each answer is paid for or sent over a network.
        rows_at_once: How many rows `predict` is handed between two writes to the cache: what a crash can lose.
        parameters: Number of parameters, or None where it can't be known.
        flops_per_query: Floating-point operations of one answer, or None.
        fingerprint: Content hash of weights and preprocessing; known once `prepare` has returned.
    """

    output: Reveals
    usd_per_query: float
    remote: bool
    rows_at_once: int
    parameters: int | None
    flops_per_query: float | None

    @property
    def fingerprint(self) -> str: ...

    def prepare(self, data: Dataset, trainer: Any, cache: Path) -> None:
        """Load the model, or train it once with `trainer` (a `distill.training.Trainer`) and keep it under `cache`.

        Several processes may do so at once.
        """
        ...

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32, row i for input i, the same whatever else is in the batch. Clean: no defense."""
        ...

    def latency_s(self, one: np.ndarray) -> float | None:
        """Median seconds of one answer to one query, measured now; None where measuring costs money."""
        ...


class Defense(Protocol):
    """`distill.provider.defenses`: a function of the clean answer and of what is known about the query.

    It needs no teacher, so clean answers are computed once and every defense is applied to the same ones; and an
    attacker who knows the defense can simulate it.

    Attributes:
        exposes: The richest profile that it lets through.
        keeps_argmax: It claims that the label of every answer is the clean one. Checked on every batch in tests.
        deterministic: It claims that a repeated query gets the same answer.
        l1_budget: It claims that no answer moves further than this in L1 (at most 2), or None.
    """

    exposes: InterfaceProfile
    keeps_argmax: bool
    deterministic: bool
    l1_budget: float | None

    def query_info(self, inputs: np.ndarray) -> np.ndarray | None:
        """(n, m) float32 that `perturb` needs to know of each query, computed once and cached; None for nothing."""
        ...

    def perturb(self, answers: Answers, info: np.ndarray | None, rng: KeyedRandom) -> Answers:
        """The answers that are returned, a distribution in each row. Row i depends on row i of the arguments only."""
        ...


@runtime_checkable
class TensorDefense(Defense, Protocol):
    """A deterministic defense whose formula is there in torch, for an attacker who trains through it."""

    def transform(self, posteriors: torch.Tensor, info: torch.Tensor | None) -> torch.Tensor:
        """What `perturb` computes: (n, classes) float64 in and out, on the device of `posteriors`.

        Differentiable: a quantiser passes the gradient straight through; a choice among candidates counts as fixed.
        """
        ...


@runtime_checkable
class StatefulDefense(Defense, Protocol):
    """A defense that remembers what it answered: row i of `perturb` depends on the rows before it too, in the order of
    asking, and on nothing else, so that the cut into batches changes nothing."""

    def state(self) -> dict[str, np.ndarray]:
        """Everything that it remembers: arrays, which are saved with the run."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Become what it was when `state` was taken."""
        ...


@runtime_checkable
class NetworkDefense(Defense, Protocol):
    """A defense with networks of its own, or one that changes how the teacher is trained.

    Attributes:
        fingerprint: Content hash of its networks; empty until `prepare` has returned.
    """

    fingerprint: str

    def prepare(self, teacher: Teacher, data: Dataset, trainer: Any, cache: Path, seed: int) -> Teacher:
        """Train its networks once and keep them under `cache`; several processes may do so at once.

        An attacker who knows the code calls this too, with a student in the teacher's place, its own queries as the
        data and its own seed.

        Args:
            teacher: The undefended teacher, prepared.
            data: The provider's data.
            trainer: A `distill.training.Trainer`.
            cache: The folder that runs share.
            seed: Of the networks.

        Returns:
            The teacher that answers from now on: the same one, unless the defense is one of training.
        """
        ...


@runtime_checkable
class TrainableTeacher(Teacher, Protocol):
    """A teacher whose architecture and recipe are here, so that a defense can train it differently."""

    def retrained(
        self, objective: Loss, inputs: Inputs, targets: Mapping[str, torch.Tensor], name: str, cache: Path
    ) -> Teacher:
        """The same architecture, recipe and seed, trained from fresh weights with another loss; prepared, and cached.

        Args:
            objective: The loss; its plain attributes are part of its identity.
            inputs: n inputs.
            targets: Tensors of n rows.
            name: What is trained, for the log.
            cache: The folder that runs share.
        """
        ...


class Oracle(Protocol):
    """The attacker's handle on a provider, and the only thing on the provider's side that an attack may touch.

    Attributes:
        profile: What the answers reveal.
        classes: Number of classes.
    """

    profile: InterfaceProfile
    classes: int

    def ask(self, queries: Queries, *, partial: bool = False) -> Answers:
        """Ask, pay and receive. Row i answers query i.

        Raises:
            BudgetExceeded: The budget does not afford all of them; nothing was asked or charged. With `partial`, the
                affordable first ones are answered instead (possibly none).
        """
        ...

    def affordable(self) -> int:
        """How many more answers the budget pays for (a large number where it has no bound)."""
        ...

    def spent(self) -> Cost:
        """What this attacker was billed so far."""
        ...


# --- the attacker's side --------------------------------------------------------------------------------------------


class Apprentice(Protocol):
    """What an attack is handed as `student`: it can train fresh students on what was asked so far.

    Attributes:
        class_names: The classes that it tells apart, which an API publishes.
    """

    class_names: tuple[str, ...]

    def fit(self, transfer_set: TransferSet, pool: Examples) -> Learner:
        """A student trained from fresh weights, the same each time for the same transfer set.

        Its recovery is applied, unless the transfer set has its `targets` already.
        """
        ...

    def fresh(self, number: int = 0) -> Learner:
        """An untrained student, for an attack that trains it by itself. Number 0 starts where `fit` starts."""
        ...

    def show(self, own: Predictor, queries: int) -> None:
        """Hand in the attack's own student as it is after so many answers: track B, of which the last one counts and
        the others are its curve. Each is evaluated, so some ten in a run are enough.

        An attack whose own training is `fit` on all that it asked hands in nothing: that is track A.
        """
        ...


class Predictor(Protocol):
    """A student that answers."""

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, classes) float32 logits."""
        ...


class Learner(Predictor, Protocol):
    """A student whose network is here. Of images and tables alone, in `logits`.

    Attributes:
        module: The network, on `device`. `predict` puts it in evaluation mode.
        device: Where it computes.
    """

    module: torch.nn.Module

    @property
    def device(self) -> torch.device: ...

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, classes) logits in the mode that the module is in, differentiable in inputs and weights.

        Args:
            inputs: (n, height, width, channels) float32 pixels in [0, 1], or (n, features) float32 columns.
        """
        ...


class Attack(Protocol):
    """`distill.attacks`: what to ask.

    Attributes:
        requires: The poorest profile that it works with.
        uses_teacher: False for a control that asks nothing.
        adapts: What it asks depends on earlier answers, or on students that it trains.
        inputs: The kinds of inputs that it works on: some of "image", "table" and "text".
    """

    requires: Reveals
    uses_teacher: bool
    adapts: bool
    inputs: tuple[str, ...]

    def extract(self, oracle: Oracle, pool: Examples, student: Apprentice, seed: int) -> TransferSet:
        """Spend what `oracle.affordable()` allows and return what was learnt. Every answer counts, whatever it is for.

        Given the same answers it must ask the same queries: an interrupted run is continued by playing the answers
        back.

        Raises:
            DistillError: Before anything is asked: the budget is smaller than the least that it can begin with, or the
                pool does not serve.
        """
        ...


@dataclass(frozen=True)
class Knowledge:
    """What a recovery works with: the attacker's own things, and of the provider what `Recovery.knows` asks for.

    Attributes:
        pool: The attacker's pool.
        student: Trains fresh students of the attacker's on transfer sets whose `targets` are set (shadow models).
        trainer: A `distill.training.Trainer`, for other networks.
        seed: The run's.
        cache: A folder for networks that are trained once.
        defense_name: None unless asked for.
        defense: A copy of the defense, made from its code and options: its noise has another seed, and where it has
            networks they were trained by the attacker on its own answers. With "the clean answers" it is the
            provider's own. None unless asked for.
        clean: (n, classes) the undefended answers to the n queries, which no attacker has. None unless asked for.
    """

    pool: Examples
    student: Apprentice
    trainer: Any
    seed: int
    cache: Path
    defense_name: str | None = None
    defense: Defense | None = None
    clean: np.ndarray | None = None


class Recovery(Protocol):
    """`distill.recovery`: how returned answers become training targets.

    Attributes:
        knows: What the attacker must know: "nothing", "the defense's name", "the defense's code" (and its options), or,
            as a bound on what any attacker could do, "the clean answers".
    """

    knows: str

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        """The transfer set with `targets` set; queries that belong together may become one."""
        ...


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on.

    Args:
        inputs: n inputs.
        targets: Tensors of n rows.
        objective: The loss; with `TrainingRecovery.extra_outputs` e, its `output` is (m, classes + e).
    """

    inputs: Inputs
    targets: Mapping[str, torch.Tensor]
    objective: Loss


@runtime_checkable
class TrainingRecovery(Recovery, Protocol):
    """A recovery that changes how the student is trained, and not its targets alone.

    Attributes:
        extra_outputs: How many outputs the student has besides its classes while it is trained; they are cut off later.
    """

    extra_outputs: int

    def check(self, spec: InputSpec, defense: Defense) -> None:
        """Raises `Incompatible`, before any query is spent, where it can't work with such inputs or answers."""
        ...

    def lesson(self, transfer_set: TransferSet, objective: Objective, knowledge: Knowledge) -> Lesson:
        """What to train on, given the transfer set with its targets and the objective that was chosen."""
        ...


class Loss(Protocol):
    """What a training minimises."""

    def loss(self, output: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scalar: the loss *summed* over the valid positions of this (micro-)batch; `output` is what the module gives.

        The loop divides by the global number of valid positions, so that batch size, gradient accumulation and the
        number of processes do not change the result.
        """
        ...

    def positions(self, targets: Mapping[str, torch.Tensor]) -> int:
        """The number of valid positions in this batch (rows of a classifier, tokens of a language model)."""
        ...


class Objective(Loss, Protocol):
    """`distill.objectives`: a distillation loss. Of a classifier, `output` is (n, classes) logits.

    Attributes:
        requires: The poorest profile that it makes sense with (a logit loss needs LOGITS or PROBS).
    """

    requires: Reveals

    def prepare(self, transfer_set: TransferSet) -> Mapping[str, torch.Tensor]:
        """The training targets as tensors whose first dimension is the row."""
        ...


class Features(Protocol):
    """A column of n encoded inputs."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: torch.Tensor, /) -> dict[str, torch.Tensor]:
        """The module's keyword arguments for these rows ((m,) int64): tensors whose first dimension is m."""
        ...


class Student(Protocol):
    """`distill.students`: an architecture that can be built and fed. A teacher trained here is built from one too."""

    def build(self, spec: InputSpec, classes: int) -> torch.nn.Module:
        """Fresh (or pretrained) weights drawn from torch's global generator; ``module(**features)`` gives logits. The
        one feature of images and tables is called ``inputs``.

        Raises `DistillError` where the architecture does not take such inputs. Pixels are scaled and normalised
        inside the module, so that every bound outside of it is in pixel space.
        """
        ...

    def encode(self, inputs: Inputs, spec: InputSpec) -> Features:
        """The inputs as the module's keyword arguments; lazily where they don't fit in memory."""
        ...


# --- the evaluation -------------------------------------------------------------------------------------------------


class Metric(Protocol):
    """`distill.metrics`: one comparison of posteriors.

    Attributes:
        compares_with: "labels" or "outliers" (measures the teacher, the defended teacher and the student), or "teacher"
            (measures how far the student and the returned answers are from the undefended teacher).
        section: Where `result.json` keeps it: "accuracy", "calibration" or "fidelity".
        higher_is_better: For each name that `measure` returns.
    """

    compares_with: ClassVar[str]
    section: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]

    def measure(self, posteriors: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """`posteriors` (n, classes) against `reference`: (n,) labels, the teacher's (n, classes) posteriors, or the
        same model's (m, classes) posteriors of inputs from elsewhere."""
        ...


class Tracker(Protocol):
    """`distill.trackers`: a view of a run, made from what its files hold. Its failures are warnings."""

    def start(self, run_dir: Path, run_id: str, group: str, config: Mapping[str, Any]) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of `metrics.jsonl`."""
        ...

    def finish(self, result: Result | None) -> None:
        """The end: `result` is None where the run failed."""
        ...


@runtime_checkable
class Dashboard(Tracker, Protocol):
    """A tracker to which finished runs can be sent later, and what they are together (`distill.trackers.push`)."""

    where: str  # where to look at it, for people; known once something was sent

    def held(self, folders: Mapping[str, Path]) -> set[str]:
        """Which of these runs it has. `folders`: run id to where a run of this machine keeps what is not sent yet."""
        ...

    def summarise(
        self, folder: Path, name: str, config: Mapping[str, Any], tables: Mapping[str, Any], images: Mapping[str, Any]
    ) -> None:
        """One run for a whole comparison, which takes the place of an earlier one: ``pandas.DataFrame`` and
        ``PIL.Image.Image`` by name."""
        ...


# --- generation -----------------------------------------------------------------------------------------------------
# The same rooms, with text instead of posteriors. A room's class fits the contract of one domain or of the other, and
# is known by the method that only that contract has.

LANGUAGE_METHODS = {"generate", "synthesise", "curate", "build_language", "load_prompts", "judge"}


def of_language(group: str, kind: type) -> bool:
    """Whether a class of a room is of the generation domain."""
    if group == "objective":  # both have `loss`; that of a classifier prepares targets
        return "prepare" not in dir(kind)
    if group == "defense":  # no defense at all is of both
        return "perturb" not in dir(kind)
    return bool(LANGUAGE_METHODS & set(dir(kind)))


class TaskData(Protocol):
    """`distill.data`, in the generation domain."""

    def load(self) -> Task:
        """Raises `MissingAsset` when the data is nowhere to be found, `DistillError` when it can't serve."""
        ...


class PromptPool(Protocol):
    """`distill.data.pools`, in the generation domain: prompts that an attacker draws from."""

    def load_prompts(self, task: Task) -> Prompts:
        """Only `task.held_out` may be taken from `task`."""
        ...


@runtime_checkable
class LanguageTeacher(Protocol):
    """`distill.provider.teachers`, in the generation domain: a model that answers prompts.

    Attributes:
        remote: True where each answer is paid for or sent over a network.
        requests_at_once: How many requests `generate` is handed between two writes to the cache: what a crash can lose.
        usd_per_mtok_in: What a million prompt tokens really cost whoever calls it; 0 for a model of one's own.
        usd_per_mtok_out: The same of answer tokens.
        parameters: Number of parameters, or None where it can't be known.
        flops_per_token: Floating-point operations of one token of an answer, or None.
        context_tokens: Longest prompt and answer together, or None where it isn't known.
        top_k: How many log-probabilities it can tell at each position; None for the whole vocabulary, 0 for none.
        tokenizer: A Hugging Face tokenizer, where it is public; None otherwise. Known once `prepare` has returned.
        fingerprint: Content hash of weights, tokenizer and chat template; known once `prepare` has returned.
    """

    remote: bool
    requests_at_once: int
    usd_per_mtok_in: float
    usd_per_mtok_out: float
    parameters: int | None
    flops_per_token: float | None
    context_tokens: int | None
    top_k: int | None
    tokenizer: Any
    fingerprint: str

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        """Load the model, or train it once with `trainer` and keep it under `cache`, or find out what an API serves."""
        ...

    def count_tokens(self, prompts: Prompts, sampling: Sampling) -> np.ndarray:
        """(n,) int64: the tokens of each prompt with its template, as billed. An estimate where the API alone knows.

        Raises `DistillError` for an empty prompt and for a prompt that leaves no room for `sampling.max_tokens`.
        """
        ...

    def generate(self, prompts: Prompts, sampling: Sampling, repeats: np.ndarray, top_k: int = 0) -> Completions:
        """Clean answers. A drawn one depends on (sampling.seed, prompt, repeat) and not on what else is in the batch.

        Args:
            prompts: n prompts.
            sampling: How to draw.
            repeats: (n,) int64.
            top_k: How many log-probabilities to tell at each position.
        """
        ...


@runtime_checkable
class LocalLanguageTeacher(LanguageTeacher, Protocol):
    """A language teacher whose weights are here: it can score any tokens, not only answers of its own.

    Attributes:
        network: The Hugging Face model itself. Known once `prepare` has returned.
    """

    network: Any

    def prompt_tokens(self, prompts: Prompts, sampling: Sampling) -> list[list[int]]:
        """The tokens that each prompt becomes, template and generation prompt included."""
        ...

    def heads(self, sequences: list[list[int]], starts: list[int], layers: Sequence[int] = ()) -> list[Head]:
        """For each sequence the distributions of its tokens from `starts` on: row j is the one that token
        ``starts + j`` was drawn from. All share one weight. Without gradients.

        `layers`: Whose hidden states `Head.layers` holds: 0 for the embeddings, i for what comes out of layer i.
        """
        ...


@runtime_checkable
class LanguageDefense(Protocol):
    """`distill.provider.defenses`, in the generation domain: what a provider does to text and log-probabilities.

    A request passes through `sampling`, is decoded under `logits_processor` and goes out through `release`. Answers as
    they were decoded are cached, so what is done to them after that is applied to the same ones.

    Attributes:
        exposes: The richest profile that it lets through. `distill.records.EVERY_LOGPROB` where it changes the logits:
            the states behind them are not what is released.
        tokens_read: How many tokens models of its own have read or written so far: what it costs its provider.
    """

    exposes: InterfaceProfile

    @property
    def tokens_read(self) -> int: ...

    def sampling(self, asked: Sampling) -> Sampling:
        """How an answer is drawn in place of what was asked for; never with more `max_tokens`."""
        ...

    def logits_processor(self, sampling: Sampling) -> Processor | Guided | None:
        """What is done to the logits of each next token, before they are divided by `sampling.temperature` and cut to
        `sampling.top_p`; None for nothing. The log-probabilities that are told are those of its result.

        Like an answer, what it does to a row depends on that row's tokens alone.
        """
        ...

    def release(self, prompts: Prompts, completions: Completions, sampling: Sampling, rng: KeyedRandom) -> Completions:
        """What is given out of n answers. Row i depends on row i of the arguments only.

        Everything that goes out must tell the same story: texts, tokens and their log-probabilities, the reasons why
        answers ended and `completion_tokens`, which is what is billed. None is longer than `sampling.max_tokens`.

        Args:
            prompts: n prompts.
            completions: n answers as they were decoded, with the log-probabilities that the profile tells.
            sampling: As it was asked for.
            rng: Of n rows.
        """
        ...


@runtime_checkable
class PreparedLanguageDefense(LanguageDefense, Protocol):
    """A language defense with models of its own, or one that changes the teacher's weights.

    Attributes:
        fingerprint: Content hash of its models; empty until `prepare` has returned.
    """

    fingerprint: str

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """Load or train its models once and keep them under `cache`; several processes may do so at once.

        Args:
            teacher: The undefended teacher, prepared.
            task: The provider's; what it learns from is `task.train`.
            trainer: A `distill.training.Trainer`.
            cache: The folder that runs share.
            seed: Of the models.

        Returns:
            The teacher that answers from now on: the same one, unless the defense is one of training.

        Raises:
            DistillError: The teacher's weights are elsewhere and it needs them, or its tokens are not its models'.
        """
        ...


@runtime_checkable
class Watermark(LanguageDefense, Protocol):
    """A language defense that marks its text, so that whoever holds the key can tell.

    Attributes:
        width: How many tokens before a token decide how it is marked.
    """

    width: int

    def evidence(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) float64: how marked each token looks; large where it does.

        Args:
            windows: (n, width) integers, the tokens before.
            tokens: (n,) integers.
            key: Another key than the provider's own, for a control.
        """
        ...

    def countable(self, windows: np.ndarray, tokens: np.ndarray, key: int | None = None) -> np.ndarray:
        """(n,) bool: the tokens that may be counted together, each marked by numbers of its own: the first of those
        that have what decides in common. Arguments as of `evidence`."""
        ...

    def p_value(self, evidence: np.ndarray) -> float:
        """Chance of at least so much evidence in n countable tokens that know nothing of the key. 1 for no tokens."""
        ...

    def log10_p_value(self, evidence: np.ndarray) -> float:
        """The same, where it is too small for a float."""
        ...


class LanguageOracle(Protocol):
    """The attacker's handle on a provider of text.

    Attributes:
        profile: What the answers reveal: LABEL is text alone, TOP_K adds log-probabilities, PROBS all of them.
        tokenizer: The teacher's, where it is public; None otherwise.
    """

    profile: InterfaceProfile
    tokenizer: Any

    def ask(
        self, prompts: Prompts, sampling: Sampling | None = None, samples: int = 1, *, partial: bool = False
    ) -> SyntheticSet:
        """Ask, pay and receive `samples` answers to each prompt, one prompt after the other.

        Args:
            prompts: n prompts.
            sampling: How to draw; None for the experiment's own.
            samples: Answers to each prompt.
            partial: Answer the affordable first ones instead of raising.

        Raises:
            BudgetExceeded: The budget does not afford all of them at their longest; nothing was asked or charged.
        """
        ...

    def score(self, sequences: list[list[int]], starts: list[int]) -> list[Head] | list[Sparse]:
        """The distributions of each sequence's tokens from `starts` on, or the most probable tokens, as many as answers
        tell, where the API tells no more (`InterfaceProfile.scores`).

        One query for each sequence, its tokens billed as those of a prompt.

        Raises:
            BudgetExceeded: The budget does not afford all; nothing was scored.
            DistillError: The API does not score given tokens.
        """
        ...

    def affordable(self) -> int:
        """How many more answers the budget's bound on queries pays for (a large number where it has none)."""
        ...

    def spent(self) -> Cost:
        """What this attacker was billed so far."""
        ...


@runtime_checkable
class PromptAttack(Protocol):
    """`distill.attacks`, in the generation domain: which prompts to ask.

    Attributes:
        requires: The poorest profile that it works with.
        uses_teacher: False for a control that asks nothing.
    """

    requires: Reveals
    uses_teacher: bool

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Spend what the budget allows and return what was answered, `samples` answers to a prompt.

        Given the same answers it must ask the same: an interrupted run is continued by playing the answers back.
        """
        ...


@runtime_checkable
class Curation(Protocol):
    """`distill.recovery`, in the generation domain: which answers to train on, and how much each counts.

    Attributes:
        knows: As of `Recovery`; "the task's checker" for verified answers, "own labelled examples" for a recovery that
            measures on those of the attacker (``own_examples``).
    """

    knows: str

    def curate(self, synthetic: SyntheticSet, knowledge: Mapping[str, Any]) -> SyntheticSet:
        """What is left, with the counts of what was dropped.

        Args:
            synthetic: The answers as they were returned.
            knowledge: What `knows` asks for and no more: "check", the task's checker; or "own", the attacker's labelled
                examples as a `SyntheticSet`, and "student", a `LanguageApprentice`.
        """
        ...


@runtime_checkable
class PreparedCuration(Curation, Protocol):
    """A curation with a model of the attacker's own."""

    def prepare(self, task: Task, trainer: Any, cache: Path) -> None:
        """Load it, as a teacher is loaded; `task` has no prompts."""
        ...


class LanguageApprentice(Protocol):
    """What a curation is handed that trains students of its own on the way.

    Attributes:
        seed: The run's.
    """

    seed: int

    def fit(self, synthetic: SyntheticSet) -> TrainedLanguage:
        """A student trained on the texts of these answers from fresh weights, with the run's recipe and rollout off."""
        ...


class TrainedLanguage(Protocol):
    """A language model of the attacker's own.

    Attributes:
        module: A Hugging Face causal language model in evaluation mode.
        tokenizer: Its tokenizer.
    """

    module: Any
    tokenizer: Any


class Codec(Protocol):
    """A signal with the tables of one cache."""

    def encode(self, distributions: Head | Sparse, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of n positions, one after the other (uint8), and the length of each ((n,) int64).

        `keys`: (n,) ``S16``, what a position is known by; draws depend on it.
        """
        ...

    def decode(self, data: np.ndarray, lengths: np.ndarray) -> Head | Sparse | None:
        """The distributions of n positions; each depends on its own bytes only."""
        ...


class Signal(Protocol):
    """`distill.signals`: how a teacher's distribution at a position is stored.

    Attributes:
        requires: The poorest profile that it can be made from.
        identity: Its name and options: what must agree for a cache to be read.
    """

    requires: Reveals
    identity: dict[str, Any]

    def fit(self, first: Head | Sparse, vocabulary: int) -> dict[str, np.ndarray]:
        """What all positions of a cache share, made from the first ones and stored once."""
        ...

    def codec(self, shared: dict[str, np.ndarray]) -> Codec: ...


@runtime_checkable
class LanguageObjective(Protocol):
    """`distill.objectives`, in the generation domain: a loss at the positions of an answer.

    Attributes:
        requires: LABEL for text alone, TOP_K where truncated distributions will do, PROBS for whole ones.
    """

    requires: Reveals

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        """Scalar: summed over n positions, in nats.

        Args:
            student: The student's distributions at the n valid positions.
            labels: (n,) int64, the teacher's token at each.
            signal: The teacher's distributions at the same positions; None where there is text alone.
        """
        ...


@runtime_checkable
class CrossTokenObjective(LanguageObjective, Protocol):
    """An objective that also serves a student whose tokens are not its teacher's."""

    def across(self, student: Head, labels: torch.Tensor, aligned: Aligned) -> torch.Tensor:
        """Scalar: summed over n positions, in nats.

        Args:
            student: The student's distributions at the n valid positions.
            labels: (n,) int64, the student's token at each.
            aligned: The teacher's side of the same answers.
        """
        ...


@runtime_checkable
class WhiteBoxObjective(LanguageObjective, Protocol):
    """An objective on hidden states of the layers inside both models, which nobody has who only queries a teacher.

    Attributes:
        pairs: Layers of student and teacher, as of `LocalLanguageTeacher.heads`: `loss` finds the hidden states of pair
            i at place i of `Head.layers`. Known of what `between` returns.
    """

    pairs: Sequence[tuple[int, int]] | None

    def between(self, student: torch.nn.Module, teacher: torch.nn.Module) -> WhiteBoxObjective:
        """The objective of one training, a module: what it learns beside the student is drawn from torch's global
        generator.

        Args:
            student: A Hugging Face causal language model.
            teacher: Another.

        Raises:
            DistillError: A pair names a layer that is not there.
        """
        ...


Example = tuple[list[int], list[int]]  # the tokens of a prompt and of an answer to it


class Write(Protocol):
    """How a rollout has the student write."""

    def __call__(self, prompts: list[list[int]], sampling: Sampling, teacher_share: float = 0.0) -> list[list[int]]:
        """An answer to each prompt, by the student as it is now, none longer than a row has room for.

        Args:
            prompts: n lists of tokens.
            sampling: How to draw.
            teacher_share: Chance of each token to be drawn from the teacher instead. Each such token is a query.
        """
        ...


class Rollout(Protocol):
    """`distill.rollouts`: on whose text a step learns.

    Attributes:
        requires: The poorest profile that it works with, at text that the student wrote.
        writes: False where it is always the synthetic set's.
        needs_validation: It looks at the loss on rows held out.
    """

    requires: ClassVar[Reveals]
    writes: ClassVar[bool]
    needs_validation: ClassVar[bool]

    def state(self, width: int) -> torch.nn.Module | None:
        """A new training begins. Returns the buffers that a checkpoint must hold for it to be continued, or None.

        Args:
            width: Tokens of the longest example.
        """
        ...

    def examples(self, prompts: list[list[int]], write: Write, chance: float, progress: float) -> list[Example] | None:
        """What is learnt from in place of the answers to these prompts; None for these answers of the synthetic set.

        What else is random comes from torch's generator.

        Args:
            prompts: Those of one forward pass.
            write: The student.
            chance: Uniform in [0, 1), the same for the whole step.
            progress: Share of the training that is over.
        """
        ...

    def validated(self, loss: float) -> None:
        """The mean loss on the rows held out, after each epoch; they are the synthetic set's."""
        ...

    def credit(self, student: Head, teacher: Head, labels: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor | None:
        """What is added to the objective's loss on text that the rollout gave; None for nothing.

        Args:
            student: At n positions.
            teacher: At the same.
            labels: (n,) int64, the tokens.
            sequence: (n,) int64, which answer each belongs to. Those of one answer are neighbours, in order.
        """
        ...


@runtime_checkable
class LanguageStudent(Protocol):
    """`distill.students`, in the generation domain.

    Attributes:
        requires: The poorest profile that it works with: WEIGHTS for one that is built from its teacher's.
    """

    requires: Reveals

    def tokenizer(self, teachers: Any) -> Any:
        """The student's tokenizer: `teachers` (or None, where it is not public) or its own."""
        ...

    def build_language(self, tokenizer: Any) -> torch.nn.Module:
        """A Hugging Face causal language model with fresh (or pretrained) weights from torch's global generator."""
        ...


@runtime_checkable
class AdaptedStudent(LanguageStudent, Protocol):
    """A student that speaks otherwise than it was trained to: its logits are changed while it answers."""

    def adapt(self, network: torch.nn.Module, tokenizer: Any, synthetic: SyntheticSet) -> dict[str, torch.Tensor]:
        """What it has to remember for that, made after training; it is saved with the student.

        Args:
            network: The trained student, a Hugging Face causal language model.
            tokenizer: Its tokenizer.
            synthetic: What it was trained on.
        """
        ...

    def speaking(self, memory: dict[str, torch.Tensor]) -> Processor:
        """The change of the logits, from what `adapt` returned."""
        ...


@runtime_checkable
class WhiteBoxStudent(LanguageStudent, Protocol):
    """A student that is built from the teacher's own weights, which nobody has who only queries it."""

    def of_teacher(self, network: torch.nn.Module) -> WhiteBoxStudent:
        """The same student with a teacher's network to copy from."""
        ...


@runtime_checkable
class LanguageMetric(Protocol):
    """`distill.metrics`, in the generation domain.

    Attributes:
        section: Where `result.json` keeps it: "accuracy", "calibration" or "ownership" (one entry for each `who` of the
            evidence), or "fidelity" (of the student).
        higher_is_better: For each name that `judge` returns.
    """

    section: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]

    def judge(self, evidence: Evidence, who: str) -> dict[str, float]:
        """The numbers of `who`; empty where the evidence does not tell."""
        ...


@dataclass(frozen=True)
class Inside:
    """What the evaluation knows of a language model whose weights are here, to judge what was found out about it.

    Attributes:
        head: (vocabulary, width) float64 output matrix.
        hidden: From n prompts to the (n, width) float64 states that the first token of each answer is drawn from.
        logits: From n prompts to the (n, vocabulary) float64 logits of that token.
    """

    head: np.ndarray
    hidden: Callable[[Prompts], np.ndarray]
    logits: Callable[[Prompts], np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """How far an extraction came.

    Attributes:
        recovered: By the attack's own criterion; None where nobody knows the truth.
        error: What that criterion looks at, in its units; None where nobody knows.
        note: What the attacker believes, in a few words.
        formula: How many queries the paper's formula says that it takes; None where it says nothing.
    """

    recovered: bool | None
    error: float | None
    note: str
    formula: int | None = None


class Leak(Protocol):
    """`distill.leaks`: an extraction attack on the interface of a language model, which learns what answers were not
    meant to tell of the model behind it."""

    def refusal(self, oracle: LanguageOracle) -> str:
        """Why this interface stops it before anything is asked, such as "no logit bias"; "" where it may begin."""
        ...

    def extract(self, oracle: LanguageOracle, pool: Prompts, seed: int) -> Any:
        """Ask, and return what was found out.

        Raises:
            BudgetExceeded: The budget does not pay for it.
            DistillError: The answers do not tell what the interface promised, or the pool does not serve.
        """
        ...

    def judge(self, found: Any, inside: Inside | None) -> Verdict:
        """Compare what was found out with the model, or say what is believed where its weights are elsewhere."""
        ...
