"""Everything that a configuration names, built and checked against one another before any query is spent."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_model, save_model

from distill.config import build, cache_dir, digest, identity, locate, options_that
from distill.contracts import (
    Attack,
    Defense,
    Knowledge,
    Lesson,
    Loss,
    Metric,
    NetworkDefense,
    Objective,
    Predictor,
    Recovery,
    StatefulDefense,
    Student,
    Teacher,
    TrainingRecovery,
    of_language,
)
from distill.errors import DamagedTransferSet, DistillError, Incompatible
from distill.kept import Kept, train_once, weights_hash
from distill.launch import write_atomically
from distill.provider.ledger import Ledger
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.randomness import derive, generator
from distill.records import (
    ROWS_AT_ONCE,
    Answers,
    Budget,
    Dataset,
    Examples,
    Inputs,
    InputSpec,
    InterfaceProfile,
    Result,
    Reveals,
    TransferSet,
    content_keys,
    file_hash,
    softmax,
)
from distill.training import Recipe, Trainer
from distill.training import measure as measure_size

log = logging.getLogger(__name__)

SAMPLES = 100  # rows of the test set that samples.jsonl shows
OUTLIERS = 2_000  # inputs from elsewhere that the evaluation asks about
DEFENSE_STATE = "defense_state.npz"
OWN_STUDENT = "own_student.npz"

WEIGHTS = "model.safetensors"


def save_weights(module: Any, history: dict[str, Any], folder: Path) -> None:
    """Write weights and history. `student.json` comes last: its presence means that the weights are whole."""
    folder.mkdir(exist_ok=True)
    partial = folder / f".{WEIGHTS}"
    save_model(module, str(partial), metadata={"format": "pt"})  # transformers wants to be told the format
    partial.replace(folder / WEIGHTS)
    record = {"weights": file_hash(folder / WEIGHTS), "history": history}
    write_atomically(folder / "student.json", json.dumps(record, indent=1) + "\n")


def whole_weights(folder: Path) -> dict[str, Any] | None:
    """The history of the training whose weights lie there whole, or None; damage is named in a warning."""
    if not (folder / "student.json").exists():
        return None
    record, weights = json.loads((folder / "student.json").read_text()), folder / WEIGHTS
    if not weights.exists() or file_hash(weights) != record["weights"]:
        log.warning("%s is damaged", weights)
        return None
    return record["history"]


@dataclass
class TrainedStudent:
    """A module with its way of reading inputs (`distill.contracts.Learner`)."""

    module: Any
    student: Student
    spec: InputSpec
    trainer: Trainer
    history: dict[str, Any]
    classes: int

    def predict(self, inputs: Inputs) -> np.ndarray:
        """(n, classes) float32 logits."""
        return self.trainer.predict(self.module, self.student.encode(inputs, self.spec))[:, : self.classes]

    @property
    def device(self) -> torch.device:
        return self.trainer.device

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, classes), differentiable. Raises `DistillError` for texts."""
        if self.spec.kind == "text":
            raise DistillError("a text has no gradient", "attack")
        return self.module(inputs=inputs.to(self.device))[:, : self.classes]


@dataclass
class StandIn:
    """A student in its teacher's place, for an attacker who plays the provider with a defense whose code it knows.

    It is trained when a defense first asks for it: many don't.
    """

    students: StudentTrainer
    learn: Callable[[], TrainedStudent | Kept]
    output: Reveals = Reveals.LOGITS
    usd_per_query: float = 0.0
    remote: bool = False
    rows_at_once: int = ROWS_AT_ONCE
    parameters: int | None = None
    flops_per_query: float | None = None

    @cached_property
    def student(self) -> TrainedStudent | Kept:
        return self.learn()

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.student.module)

    def prepare(self, data: Dataset, trainer: Any, cache: Path) -> None:
        """There is nothing to load."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 logits."""
        return self.student.predict(inputs)

    def latency_s(self, one: np.ndarray) -> float | None:
        return None

    def retrained(
        self, objective: Loss, inputs: Inputs, targets: Mapping[str, torch.Tensor], name: str, cache: Path
    ) -> StandIn:
        """The student's architecture and recipe with another loss (`distill.contracts.TrainableTeacher`)."""
        own = self.students
        learn = partial(
            train_once,
            *(own.student, own.spec, len(own.class_names), inputs, targets, objective, own.recipe),
            trainer=own.trainer,
            cache=cache,
            seed=own.seed,
            name=name,
            key="student",
        )
        return StandIn(own, learn)


@dataclass
class StudentTrainer:
    """Trains fresh students on transfer sets (`distill.contracts.Apprentice`). It knows nothing of the provider but
    what its recovery says that it must.

    Args:
        defense_name: The option of `defense`, for a recovery that knows it.
        defense: Its config node, from which a copy is made for a recovery that knows its code.
        oracle: The provider's clean answers to inputs and its own defense, for a recovery that knows those.
    """

    student: Student
    recovery: Recovery
    objective: Objective
    recipe: Recipe
    trainer: Trainer
    spec: InputSpec
    class_names: tuple[str, ...]
    seed: int
    defense_name: str | None = None
    defense: Any = None
    oracle: Callable[[Inputs], tuple[np.ndarray, Defense]] | None = None
    shown: list[tuple[int, Predictor]] = field(default_factory=list)

    def untrained(self) -> TrainedStudent:
        """The initialisation, which depends on the seed alone: runs over several defenses are paired."""
        extra = self.recovery.extra_outputs if isinstance(self.recovery, TrainingRecovery) else 0
        return self._build(extra, derive(self.seed, "student"))

    def _build(self, extra: int, seed: int) -> TrainedStudent:
        classes = len(self.class_names)
        module = self.trainer.build(self.student, self.spec, classes + extra, seed)
        return TrainedStudent(module, self.student, self.spec, self.trainer, {}, classes)

    def fresh(self, number: int = 0) -> TrainedStudent:
        """An untrained student without outputs besides its classes. See `distill.contracts.Apprentice`."""
        fresh = self._build(0, derive(self.seed, "student", *([number] if number else [])))
        fresh.module.to(fresh.device)
        return fresh

    def show(self, own: Predictor, queries: int) -> None:
        """See `distill.contracts.Apprentice`. A student that goes on learning is copied as it is now."""
        if isinstance(own, TrainedStudent):
            own = replace(own, module=copy.deepcopy(own.module))
        self.shown.append((queries, own))

    def save(self, trained: TrainedStudent, folder: Path) -> None:
        save_weights(trained.module, trained.history, folder)

    def load(self, folder: Path) -> TrainedStudent | None:
        """What `save` wrote, or None where nothing whole is there; damage is named in a warning."""
        if (history := whole_weights(folder)) is None:
            return None
        trained = self.untrained()
        load_model(trained.module, folder / WEIGHTS)
        trained.history = history
        return trained

    def fit(
        self, transfer_set: TransferSet, pool: Examples, name: str = "interim", directory: Path | None = None
    ) -> TrainedStudent:
        """A student from fresh weights. With a `directory`, an interrupted training goes on from there.

        Where the transfer set has targets already, the recovery is left out.
        """
        if transfer_set.targets is not None:
            plain = replace(self, recovery=_AsGiven())
            return plain._learn(plain._lesson(transfer_set, pool), name, directory)
        started = time.monotonic()
        knowledge = self._knowledge(transfer_set, pool)
        recovered = self.recovery.targets(transfer_set, knowledge)
        if isinstance(self.recovery, TrainingRecovery):
            lesson = self.recovery.lesson(recovered, self.objective, knowledge)
        else:
            lesson = self._lesson(recovered, pool)
        seconds = time.monotonic() - started
        student = self._learn(lesson, name, directory)
        student.history["recovery_seconds"] = seconds
        if recovered.note != transfer_set.note:  # what the recovery found out
            student.history["note"] = recovered.note
        return student

    def _lesson(self, recovered: TransferSet, pool: Examples) -> Lesson:
        return Lesson(recovered.inputs(pool), self.objective.prepare(recovered), self.objective)

    def _learn(self, lesson: Lesson, name: str, directory: Path | None) -> TrainedStudent:
        fresh = self.untrained()
        fresh.history = self.trainer.fit(
            fresh.module,
            self.student.encode(lesson.inputs, self.spec),
            lesson.targets,
            lesson.objective,
            self.recipe,
            seed=derive(self.seed, "training"),
            name=name,
            directory=directory,
        )
        return fresh

    def _knowledge(self, transfer_set: TransferSet, pool: Examples) -> Knowledge:
        """What the recovery works with: see `distill.contracts.Knowledge`."""
        own = Knowledge(pool, self, self.trainer, self.seed, cache_dir())
        match self.recovery.knows:
            case "the defense's name":
                return replace(own, defense_name=self.defense_name)
            case "the defense's code":
                return replace(own, defense=self._copy_of_defense(transfer_set, pool))
            case "the clean answers" if self.oracle is not None:
                clean, defense = self.oracle(transfer_set.inputs(pool))
                return replace(own, defense=defense, clean=clean)
            case _:
                return own

    def _copy_of_defense(self, transfer_set: TransferSet, pool: Examples) -> Defense:
        copied: Defense = build(self.defense, "defense")
        if isinstance(copied, NetworkDefense):
            labels = transfer_set.posteriors.argmax(axis=1)
            asked = Examples(transfer_set.inputs(pool), self.spec, labels, self.class_names, "the attacker's queries")
            data = Dataset(asked.name, self.spec, self.class_names, asked, asked.take(np.arange(0)), pool)
            believed = replace(transfer_set, targets=transfer_set.posteriors)
            stand_in = StandIn(self, partial(self.fit, believed, pool, "stand-in"))
            copied.prepare(stand_in, data, self.trainer, cache_dir(), derive(self.seed, "copy of the defense"))
        return copied


class _AsGiven:
    """For a transfer set that has its targets."""

    knows = "nothing"

    def targets(self, transfer_set: TransferSet, knowledge: Knowledge) -> TransferSet:
        return transfer_set


@dataclass
class OwnStudent:
    """What the attack's own student says of the test rows: track B.

    Args:
        queries: (m,) int64, after how many answers.
        logits: (m, n, classes) float32.
        seconds: What it took to ask it.
    """

    queries: np.ndarray
    logits: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Served:
    """What the evaluation has of the provider alone.

    Args:
        answers: To the test rows, of "teacher" and "defended_teacher".
        judged: What the metrics say of each, by section of the result.
        utility: How far the returned answers are from the clean ones, and what the defense takes.
        size: Of the teacher.
    """

    answers: dict[str, Answers]
    judged: dict[str, dict[str, dict[str, float]]]
    utility: dict[str, float]
    size: dict[str, float | None]


@dataclass
class _Place:
    """Where the runs of a process that share a provider find what was measured of it."""

    key: str
    served: Served | None = None


_place = lru_cache(maxsize=8)(_Place)


@dataclass(frozen=True)
class Parts:
    """What a configuration names, built and found to fit together; no teacher is trained and nothing is asked yet."""

    budget: Budget
    data: Dataset
    teacher: Teacher
    defense: Defense
    profile: InterfaceProfile
    attack: Attack
    recovery: Recovery
    objective: Objective
    student: Student
    recipe: Recipe
    metrics: dict[str, Metric]

    @classmethod
    def of(cls, config: Any, choices: dict[str, str]) -> Parts:
        """Raises `DistillError` for a wrong option, and `Incompatible` where options do not fit together."""
        budget = Budget(config.budget.queries, config.budget.usd, config.budget.tokens)
        Ledger(budget, config.access.usd_per_query)  # a price that does not fit is told before a teacher is trained
        if any(not 0 < share < 1 for share in config.curve):
            raise DistillError("shares of the budget between 0 and 1, such as [0.1,0.3]", "curve")
        check_domain(config, choices, language=False)
        teacher: Teacher = build(config.teacher, "teacher")
        defense: Defense = build(config.defense, "defense")
        attack: Attack = build(config.attack, "attack")
        recovery: Recovery = build(config.recovery, "recovery")
        objective: Objective = build(config.objective, "objective")
        student: Student = build(config.student, "student")
        recipe: Recipe = build(config.training, "training")
        metrics: dict[str, Metric] = build(config.metric, "metric")
        data = load_data(described(config.data))
        if data.spec.kind not in attack.inputs:
            fits = options_that("attack", lambda k: not of_language("attack", k) and data.spec.kind in k.inputs)
            raise Incompatible(
                f"{choices['attack']} asks about {' or '.join(f'{kind}s' for kind in attack.inputs)}, and {data.name} "
                f"holds {data.spec.kind}s; compatible: {', '.join(fits)}",
                "attack",
            )
        profile = (
            InterfaceProfile.parse(config.access.profile, config.access.top_k)
            .meet(defense.exposes)
            .meet(InterfaceProfile(teacher.output))
        )
        if profile.top_k is not None and profile.top_k > data.classes:
            key = "access.top_k" if config.access.top_k == profile.top_k else "defense.k"
            raise Incompatible(f"{profile.top_k} is more than the {data.classes} classes of {data.name}", key)
        check_profile("attack", attack, choices, profile)
        check_profile("objective", objective, choices, profile)
        if isinstance(recovery, TrainingRecovery):
            recovery.check(data.spec, defense)
        student.build(data.spec, data.classes)  # an architecture that can't read these inputs is told now
        return cls(budget, data, teacher, defense, profile, attack, recovery, objective, student, recipe, metrics)


@dataclass
class Experiment:
    """Both sides of an experiment. `teacher` and `defense` belong to the provider and to the evaluation.

    `teacher` is the undefended one; `serving` is what answers, which differs under a defense of training. `outliers`
    are inputs from elsewhere, by which the evaluation sees whether answers still tell what the teacher does not know.
    """

    config: Any
    trainer: Trainer
    data: Dataset
    pool: Examples
    outliers: Examples | None
    teacher: Teacher
    serving: Teacher
    defense: Defense
    profile: InterfaceProfile
    budget: Budget
    attack: Attack
    students: StudentTrainer
    metrics: dict[str, Metric]
    choices: dict[str, str]
    queries: Path
    own: OwnStudent | None = None

    @classmethod
    def build(cls, config: Any, trainer: Trainer, choices: dict[str, str], queries: Path) -> Experiment:
        """Raises `DistillError` for whatever does not fit together. The teacher is trained here if it has to be.

        `queries` is the folder of the query stage, where the provider keeps its log.
        """
        parts = Parts.of(config, choices)
        data, teacher, defense = parts.data, parts.teacher, parts.defense
        pool: Examples = build(config.pool, "pool").load(data)
        if len(pool) == 0:
            raise DistillError("the pool is empty", "pool")
        outliers = None
        if config.outliers is not None:
            outliers = _load_outliers(described(config.outliers), described(config.data))
        teacher.prepare(data, trainer, cache_dir())
        serving = teacher
        if isinstance(defense, NetworkDefense):
            serving = defense.prepare(teacher, data, trainer, cache_dir(), 0)  # as the teacher's, not the run's seed
        students = StudentTrainer(
            *(parts.student, parts.recovery, parts.objective, parts.recipe, trainer),
            *(data.spec, data.class_names, config.seed),
            *(choices["defense"], config.defense),
        )
        experiment = cls(
            config=config,
            trainer=trainer,
            data=data,
            pool=pool,
            outliers=outliers,
            teacher=teacher,
            serving=serving,
            defense=defense,
            profile=parts.profile,
            budget=parts.budget,
            attack=parts.attack,
            students=students,
            metrics=parts.metrics,
            choices=choices,
            queries=queries,
        )
        if parts.recovery.knows == "the clean answers":
            students.oracle = lambda inputs: (experiment.provider.clean(inputs).posteriors, defense)
        return experiment

    @cached_property
    def provider(self) -> Provider:
        """The provider of this experiment, for the attack and for the evaluation."""
        networks = self.defense.fingerprint if isinstance(self.defense, NetworkDefense) else ""
        return Provider(
            self.serving,
            self.defense,
            undefended=self.teacher,
            spec=self.data.spec,
            classes=self.data.classes,
            access=InterfaceProfile.parse(self.config.access.profile, self.config.access.top_k),
            usd_per_query=self.config.access.usd_per_query,
            budget=self.budget,
            seed=self.config.seed,
            cache=cache_dir(),
            log=self.queries / "provider_log",
            defense_id=digest([identity(self.config.defense), networks]),
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of what the configuration only names."""
        named = {
            "teacher": self.teacher.fingerprint,
            "train": self.data.train.fingerprint,
            "test": self.data.test.fingerprint,
            "pool": self.pool.fingerprint,
        }
        if isinstance(self.defense, NetworkDefense):
            named["defense"] = self.defense.fingerprint
        if self.outliers is not None:
            named["outliers"] = self.outliers.fingerprint
        return named

    # --- what the entry points ask of either domain ---------------------------------------------------------------

    def ask(self) -> TransferSet:
        """Let the attack loose on the provider, and ask the students that it hands in about the test rows."""
        self.students.shown.clear()
        with serve(self.provider) as oracle:
            transfer_set = self.attack.extract(oracle, self.pool, self.students, self.config.seed)
        started = time.monotonic()
        shown = [(queries, student.predict(self.data.test.inputs)) for queries, student in self.students.shown]
        self.students.shown.clear()
        self.own = None
        if shown:
            asked, logits = (np.array(column) for column in zip(*shown, strict=True))
            self.own = OwnStudent(asked, logits, time.monotonic() - started)
        return transfer_set

    def save_answers(self, transfer_set: TransferSet) -> None:
        """The transfer set and what the attack's own student said, and what the defense remembers."""
        from distill import transfer

        transfer.save(transfer_set, self.queries / "transfer_set")
        if self.own is not None:
            _save_arrays(self.queries / OWN_STUDENT, vars(self.own))
        else:
            (self.queries / OWN_STUDENT).unlink(missing_ok=True)
        if isinstance(self.defense, StatefulDefense):
            _save_arrays(self.queries / DEFENSE_STATE, self.defense.state())

    def load_answers(self) -> TransferSet:
        """Raises `DamagedTransferSet`."""
        from distill import transfer

        transfer_set = transfer.load(self.queries / "transfer_set")
        self.own = None
        if (self.queries / OWN_STUDENT).exists():
            told = _load_arrays(self.queries / OWN_STUDENT)
            self.own = OwnStudent(told["queries"], told["logits"], float(told["seconds"]))
        if isinstance(self.defense, StatefulDefense):
            try:
                self.defense.restore(_load_arrays(self.queries / DEFENSE_STATE))
            except (ValueError, KeyError) as error:
                raise DamagedTransferSet(f"{self.queries / DEFENSE_STATE} is damaged ({error})") from None
        return transfer_set

    def export(self, transfer_set: TransferSet, path: Path) -> None:
        """A self-contained copy, inputs included."""
        from distill import transfer

        transfer.export(transfer_set, self.pool, path, class_names=self.data.class_names)

    def push_to_hub(self, transfer_set: TransferSet, repo: str) -> str:
        raise DistillError(
            "sets of classifiers are exported to a folder only, since their inputs may not be yours to publish; "
            "set run.export",
            "run.push_to_hub",
        )

    def fit(self, transfer_set: TransferSet, name: str, directory: Path) -> TrainedStudent:
        """A student from fresh weights; an interrupted training goes on from `directory`."""
        return self.students.fit(transfer_set, self.pool, name, directory)

    def measure(self, student: TrainedStudent, result: Result, run_dir: Path) -> None:
        """Fill in what is measured on the test rows; it writes `samples.jsonl` on the way."""
        test, theirs = self.data.test, self.served()
        answers = {**theirs.answers, "student": Answers(softmax(student.predict(test.inputs)))}
        outliers = None if self.outliers is None else Answers(softmax(student.predict(self.outliers.inputs)))
        judged = {**theirs.judged, "student": self._judged(answers["student"], outliers)}
        for who, sections in judged.items():
            for section, numbers in sections.items():
                getattr(result, section)[who] = dict(numbers)
        clean = theirs.answers["teacher"].posteriors
        result.fidelity |= self._distance(answers["student"].posteriors, clean)
        result.utility |= theirs.utility | result.calibration.get("defended_teacher", {})
        one = self.students.student.encode(test.inputs[:1], self.data.spec)
        result.sizes = {"teacher": dict(theirs.size), "student": {**measure_size(student.module, one)}}
        result.classes, result.test_rows = self.data.classes, len(test)
        result.tracks = self._tracks(answers["student"].posteriors, clean)
        result.cost["evaluation_seconds"] = 0.0 if self.own is None else self.own.seconds
        _write_samples(self.data, answers, run_dir / "samples.jsonl")

    def served(self) -> Served:
        """What the evaluation needs of the provider, measured once for all students of this process."""
        config, teachers = self.config, (self.teacher, self.serving)
        state = self.defense.state() if isinstance(self.defense, StatefulDefense) else {}
        parts = [
            *(teacher.fingerprint for teacher in teachers),
            *(identity(config[group]) for group in ("defense", "access", "metric", "precision", "seed")),
            {name: self.fingerprints.get(name) for name in ("test", "outliers", "defense")},
            {name: content_keys(array.reshape(1, -1)).item().hex() for name, array in state.items()},
            str(self.trainer.device),
        ]
        place = _place(digest(parts, length=32))
        if place.served is None:
            place.served = self._serve()
        return place.served

    def _serve(self) -> Served:
        provider, test = self.provider, self.data.test.inputs
        answers = {"teacher": provider.clean(test), "defended_teacher": provider.returned(test)}
        outliers: dict[str, Answers | None] = dict.fromkeys(answers)
        if self.outliers is not None:
            strange = self.outliers.inputs
            outliers = {"teacher": provider.clean(strange), "defended_teacher": provider.returned(strange)}
        utility = self._distance(answers["defended_teacher"].posteriors, answers["teacher"].posteriors)
        size = {
            "parameters": self.teacher.parameters,
            "flops_per_query": self.teacher.flops_per_query,
            "latency_s": self.teacher.latency_s(test[:1]),
        }
        return Served(
            answers,
            {who: self._judged(given, outliers[who]) for who, given in answers.items()},
            utility | {"latency_s": provider.defense_latency_s(test)},  # besides the teacher's own
            size,
        )

    def _judged(self, answers: Answers, outliers: Answers | None) -> dict[str, dict[str, float]]:
        """By section: what the metrics say of one side's answers to the test rows and to inputs from elsewhere."""
        found: dict[str, dict[str, float]] = {}
        for metric in self.metrics.values():
            reference = self.data.test_labels
            if metric.compares_with == "outliers" and outliers is not None:
                reference = outliers.posteriors
            elif metric.compares_with != "labels":
                continue
            found.setdefault(metric.section, {}).update(metric.measure(answers.posteriors, reference))
        return found

    def _distance(self, posteriors: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """What the metrics say of answers to the test rows, given the undefended teacher's."""
        numbers: dict[str, float] = {}
        for metric in self.metrics.values():
            if metric.compares_with == "teacher":
                numbers |= metric.measure(posteriors, clean)
        return numbers

    def compare(self, student: TrainedStudent) -> dict[str, float]:
        """The student's accuracy and fidelity on the test rows, for a point of the budget curve."""
        posteriors = softmax(student.predict(self.data.test.inputs))
        return self._compared(posteriors, self.served().answers["teacher"].posteriors)

    def _tracks(self, posteriors: np.ndarray, clean: np.ndarray) -> dict[str, dict[str, Any]]:
        """Both students: see `distill.records.Result`."""
        fresh = self._compared(posteriors, clean)
        if self.own is None:
            return {"A": fresh, "B": {"own": False, **fresh}}
        curve = [
            {"cost/queries": int(queries), **self._compared(softmax(logits), clean)}
            for queries, logits in zip(self.own.queries, self.own.logits, strict=True)
        ]
        return {"A": fresh, "B": {"own": True, **curve[-1], "curve": curve}}

    def _compared(self, posteriors: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        """What the metrics say of a student's posteriors of the test rows, given the teacher's."""
        numbers = {f"fidelity/{name}": value for name, value in self._distance(posteriors, clean).items()}
        for section in self._judged(Answers(posteriors), None).values():
            numbers |= {f"student/{name}": value for name, value in section.items()}
        return numbers


def open_experiment(config: Any, trainer: Trainer, choices: dict[str, str], queries: Path) -> Any:
    """The `Experiment` or `LanguageExperiment` of a configuration: whoever says how to draw text asks for text."""
    if config.sampling is None:
        return Experiment.build(config, trainer, choices, queries)
    from distill.language_experiment import LanguageExperiment

    return LanguageExperiment.build(config, trainer, choices, queries)


def check(config: Any, choices: dict[str, str]) -> None:
    """Raises as `open_experiment` would for what can be told without a teacher, a pool or a query."""
    if config.sampling is None:
        Parts.of(config, choices)
        return
    from distill.language_experiment import LanguageParts

    LanguageParts.of(config, choices)


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")  # savez wants the ending
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Raises `DamagedTransferSet`."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DamagedTransferSet(f"{path} is damaged ({error})") from None


def described(node: Any) -> str:
    """A config node as text, with the contents of the files that it names."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True)
    return json.dumps([node, identity(node)])


@lru_cache(maxsize=1)
def load_data(data: str) -> Any:
    """The data that a node describes (see `described`), once for all runs of this process."""
    return build(json.loads(data)[0], "data").load()


@lru_cache(maxsize=1)
def _load_outliers(pool: str, data: str) -> Examples:
    """Some inputs of a pool, once for all jobs of a sweep."""
    drawn: Examples = build(json.loads(pool)[0], "outliers").load(load_data(data))
    rows = generator(0, "outliers").permutation(len(drawn))[:OUTLIERS]
    return replace(drawn.take(rows), inputs=drawn.inputs[rows])


def check_domain(config: Any, choices: dict[str, str], language: bool) -> None:
    """Raises `DistillError` where a component is of the other domain, before anything is loaded."""
    for group in ("teacher", "defense", "attack", "recovery", "objective", "student", "pool", "metric"):
        nodes = config.metric if group == "metric" else {choices.get(group, ""): config[group]}
        for option, node in nodes.items():
            if not _fits(group, language, locate(node["_target_"], group)):
                fits = options_that(group, partial(_fits, group, language))
                what = "generates text" if language else "classifies (no sampling is set)"
                raise Incompatible(f"{option} is of the other domain; this experiment {what}: {', '.join(fits)}", group)
    if not language and config.own_examples:
        raise DistillError("mixes labelled answers into the training of a language model; leave it 0", "own_examples")


def _fits(group: str, language: bool, kind: type) -> bool:
    if group == "defense" and language:
        return "release" in dir(kind)  # no defense at all is of both domains
    return of_language(group, kind) is language


def make_trainer(config: Any, log_row: Callable[[dict[str, Any]], None] | None = None) -> Trainer:
    """The training loop's engine, on the device that the configuration names."""
    if config.run.threads is not None:
        import torch

        if config.run.threads < 1:
            raise DistillError(f"must be at least 1, not {config.run.threads}", "run.threads")
        torch.set_num_threads(config.run.threads)
    return Trainer(
        device=config.run.device,
        workers=config.run.workers,
        progress=config.run.progress,
        precision=config.precision,
        log=log_row,
    )


def check_profile(group: str, method: Any, choices: dict[str, str], profile: InterfaceProfile) -> None:
    """Raises `DistillError` where a method needs richer answers than there are, naming those that would do."""
    if profile.reveals >= method.requires:
        return
    language = of_language(group, type(method))
    fits = options_that(group, lambda k: of_language(group, k) is language and k.requires <= profile.reveals)
    raise Incompatible(
        f"{choices[group]} requires {method.requires.name.lower()}, but defense={choices['defense']} behind "
        f"access={choices['access']} reveals {profile} only; compatible: {', '.join(fits)}",
        group,
    )


def _write_samples(data: Dataset, answers: dict[str, Answers], path: Path) -> None:
    """The first test rows with what each side says of them: for reading, with clean answers, not for training."""
    inputs = data.test.inputs[: min(SAMPLES, len(data.test))]
    lines = []
    for i, shown in enumerate(inputs):
        row: dict[str, Any] = {"row": i, "label": data.class_names[data.test_labels[i]]}
        if data.spec.kind == "text":
            row["input"] = str(shown)[:500]
        for who, given in answers.items():
            row[who] = data.class_names[given.posteriors[i].argmax()]
            row[f"{who}_posterior"] = [round(float(p), 5) for p in given.posteriors[i]]
        lines.append(json.dumps(row))
    write_atomically(path, "\n".join(lines) + "\n")
