"""Everything that a configuration of the generation domain names, built and checked before any query is spent."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file
from transformers.utils.logging import disable_progress_bar

from distill import synthetic as answers_on_disk
from distill.config import build, cache_dir, digest, identity
from distill.contracts import (
    AdaptedStudent,
    CrossTokenObjective,
    Curation,
    LanguageDefense,
    LanguageMetric,
    LanguageObjective,
    LanguageOracle,
    LanguageStudent,
    LanguageTeacher,
    LocalLanguageTeacher,
    PreparedCuration,
    PreparedLanguageDefense,
    PromptAttack,
    Rollout,
    Signal,
    Watermark,
    WhiteBoxObjective,
    WhiteBoxStudent,
)
from distill.errors import DistillError, Incompatible
from distill.experiment import (
    SAMPLES,
    WEIGHTS,
    check_domain,
    check_profile,
    described,
    load_data,
    save_weights,
    whole_weights,
)
from distill.language import Completions, Evidence, Prompts, Sampling, SyntheticSet, Task, texts
from distill.language_training import TeacherSignal, build_language, fit_language_student
from distill.launch import write_atomically
from distill.objectives.sequence_kd import SequenceKD
from distill.on_policy import fit_on_policy
from distill.packing import same_tokens
from distill.provider.defenses.language_chain import LanguageChain
from distill.provider.language_provider import LanguageProvider
from distill.provider.ledger import LanguageLedger, Prices
from distill.provider.oracle import serve_text
from distill.randomness import derive, generator
from distill.records import Budget, InterfaceProfile, Result, Reveals
from distill.rollouts.off_policy import OffPolicy
from distill.signals.store import SignalCache
from distill.signals.text import Text
from distill.speaker import CausalLM
from distill.training import Recipe, Trainer

log = logging.getLogger(__name__)

disable_progress_bar()  # transformers shows one for each model of a few megabytes

SIGNALS_AT_ONCE = 256  # answers whose distributions are held in memory before they are stored
NO_PROMPTS = Prompts(texts([]))
MEMORY = "memory.safetensors"  # what an adapted student remembers


@dataclass
class TrainedLanguageModel:
    """A network with its tokenizer."""

    module: Any
    tokenizer: Any
    history: dict[str, Any]
    memory: dict[str, torch.Tensor] | None = None
    adapted: AdaptedStudent | None = None

    @cached_property
    def speaker(self) -> CausalLM:
        """The network, as a model that answers."""
        speaker = CausalLM(batch_size=64)
        speaker.hold(self.module, self.tokenizer)
        if self.adapted is not None and self.memory is not None:
            speaker.speaking = [self.adapted.speaking(self.memory)]
        return speaker


@dataclass
class Apprentice:
    """Trains students on texts alone, for a curation that looks at them (`distill.contracts.LanguageApprentice`)."""

    students: LanguageStudents
    seed: int

    def fit(self, synthetic: SyntheticSet) -> TrainedLanguageModel:
        students = self.students
        objective: Any = SequenceKD()
        network, history = fit_language_student(
            students.trainer,
            students.student,
            synthetic,
            objective,
            students.recipe,
            teachers=students.tokenizer,
            max_length=students.max_length,
            seed=derive(self.seed, "student"),
            name="a student of the recovery's",
        )
        return TrainedLanguageModel(network, students.student.tokenizer(students.tokenizer), history)


@dataclass
class StoredSignal:
    """A signal cache as what a student's training asks for (`distill.language_training.Signal`).

    Args:
        cache: Holds the answers of the transfer set.
        rows: (n,) int64, which of them the curated ones are.
    """

    cache: SignalCache
    rows: np.ndarray

    def for_positions(self, sequence: np.ndarray, token: np.ndarray) -> Any:
        return self.cache.rows(self.rows[sequence], token)


@dataclass
class LanguageStudents:
    """Trains fresh students on synthetic sets. It knows nothing of the provider but its public tokenizer."""

    student: LanguageStudent
    curation: Curation
    rollout: Rollout
    objective: LanguageObjective
    recipe: Recipe
    trainer: Trainer
    tokenizer: Any
    max_length: int
    seed: int
    knowledge: dict[str, Any]
    pool: Prompts = NO_PROMPTS
    own_examples: int = 0

    def untrained(self) -> TrainedLanguageModel:
        """The initialisation, which depends on the seed alone: runs over several defenses are paired."""
        tokenizer = self.student.tokenizer(self.tokenizer)
        network = build_language(self.student, tokenizer, derive(self.seed, "student"))
        return TrainedLanguageModel(network.to(self.trainer.device), tokenizer, {})

    def save(self, trained: TrainedLanguageModel, folder: Path) -> None:
        """Write weights, config and tokenizer, which `transformers` loads, and the history."""
        folder.mkdir(exist_ok=True)
        trained.module.config.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        if trained.memory is not None:
            save_file(trained.memory, folder / MEMORY)
        save_weights(trained.module, trained.history, folder)

    def load(self, folder: Path) -> TrainedLanguageModel | None:
        """What `save` wrote, or None where nothing whole is there; damage is named in a warning."""
        if (history := whole_weights(folder)) is None:
            return None
        trained = self.untrained()
        load_model(trained.module, folder / WEIGHTS)
        trained.history = history
        if isinstance(self.student, AdaptedStudent):
            trained.memory, trained.adapted = load_file(folder / MEMORY), self.student
        return trained

    def own(self, synthetic: SyntheticSet) -> SyntheticSet:
        """The attacker's labelled examples: prompts of the pool that were not asked, with their right answers.

        Raises:
            DistillError: The pool has no references, or not so many.
        """
        order = generator(self.seed, "own examples").permutation(len(self.pool))
        free = order[~np.isin(self.pool.keys[order], synthetic.prompts.keys)][: self.own_examples]
        if self.pool.references is None or len(free) < self.own_examples:
            known = 0 if self.pool.references is None else len(free)
            raise DistillError(
                f"{self.own_examples} are wanted, and {self.pool.name} has {known} prompts with a reference that were "
                "not asked",
                "own_examples",
            )
        references = self.pool.references[free]
        return SyntheticSet.without_teacher(self.pool.take(free), references, "the attacker's own")

    def fit(
        self,
        synthetic: SyntheticSet,
        signal_of: Any,
        name: str = "interim",
        directory: Path | None = None,
        oracle: LanguageOracle | None = None,
    ) -> TrainedLanguageModel:
        """A student from fresh weights. With a `directory`, an interrupted training goes on from there.

        Args:
            synthetic: The answers as they were returned.
            signal_of: From the curated answers to the teacher's distributions at their tokens, or to None.
            name: The stage in the log.
            directory: Where the checkpoint lies while this runs.
            oracle: Scores the student's own text, where it learns from that.
        """
        started, knowledge = time.monotonic(), self.knowledge
        if self.curation.knows == "own labelled examples":
            knowledge = {"own": self.own(synthetic), "student": Apprentice(self, self.seed)}
        curated = self.curation.curate(synthetic, knowledge)
        seconds = time.monotonic() - started
        signal = signal_of(curated)
        if self.own_examples:
            curated = curated.followed_by(self.own(synthetic))
        learn: Any = partial(fit_language_student, teachers=self.tokenizer)
        if oracle is not None:
            learn = partial(fit_on_policy, rollout=self.rollout, oracle=oracle)
        network, history = learn(
            self.trainer,
            self.student,
            curated,
            self.objective,
            self.recipe,
            signal=signal,
            max_length=self.max_length,
            seed=derive(self.seed, "student"),
            name=name,
            directory=directory,
        )
        history["dropped"] = curated.dropped
        history["recovery_seconds"] = seconds
        if isinstance(signal, StoredSignal):
            history["signal"] = signal.cache.summary()
        trained = TrainedLanguageModel(network, self.student.tokenizer(self.tokenizer), history)
        if isinstance(self.student, AdaptedStudent):
            trained.adapted = self.student
            trained.memory = self.student.adapt(network, trained.tokenizer, curated)
        return trained


@dataclass(frozen=True)
class LanguageParts:
    """What a configuration names, built and found to fit together; no teacher is trained and nothing is asked yet.

    Attributes:
        inside: Whether the objective looks inside the teacher.
        live: Whether the teacher reads what the student is trained on as it is trained.
    """

    budget: Budget
    task: Task
    teacher: LanguageTeacher
    defense: LanguageDefense
    profile: InterfaceProfile
    sampling: Sampling
    attack: PromptAttack
    curation: Curation
    objective: LanguageObjective
    signal: Signal
    rollout: Rollout
    student: LanguageStudent
    recipe: Recipe
    metrics: dict[str, LanguageMetric]
    inside: bool
    live: bool

    @classmethod
    def of(cls, config: Any, choices: dict[str, str]) -> LanguageParts:
        """Raises `DistillError` for a wrong option, and `Incompatible` where options do not fit together."""
        check_domain(config, choices, language=True)
        budget = Budget(config.budget.queries, config.budget.usd, config.budget.tokens)
        LanguageLedger(budget, _prices(config))  # a price that does not fit is told before a teacher is trained
        if config.samples < 1:
            raise DistillError(f"is at least 1, not {config.samples}", "samples")
        if any(not 0 < share < 1 for share in config.curve):
            raise DistillError("shares of the budget between 0 and 1, such as [0.1,0.3]", "curve")
        if config.outliers is not None:
            raise DistillError("asks classifiers about inputs from elsewhere; leave it null for text", "outliers")
        if config.own_examples < 0:
            raise DistillError(f"is at least 0, not {config.own_examples}", "own_examples")
        sampling: Sampling = build(config.sampling, "sampling")
        teacher: LanguageTeacher = build(config.teacher, "teacher")
        defense: LanguageDefense = build(config.defense, "defense")
        attack: PromptAttack = build(config.attack, "attack")
        curation: Curation = build(config.recovery, "recovery")
        objective: LanguageObjective = build(config.objective, "objective")
        signal: Signal = Text() if config.signal is None else build(config.signal, "signal")
        rollout: Rollout = OffPolicy() if config.rollout is None else build(config.rollout, "rollout")
        student: LanguageStudent = build(config.student, "student")
        recipe: Recipe = build(config.training, "training")
        metrics: dict[str, LanguageMetric] = build(config.metric, "metric")

        task = load_data(described(config.data))
        if not isinstance(task, Task):
            raise Incompatible(f"{choices['data']} holds classes, but sampling is set, which asks for text", "data")
        access = _access(config)
        profile = access.meet(defense.exposes)
        check_profile("attack", attack, choices, profile)
        check_profile("objective", objective, choices, profile)
        check_profile("signal", signal, choices, profile)
        check_profile("student", student, choices, profile)
        check_profile("rollout", rollout, choices, profile)
        if rollout.writes and config.budget.scored is None:
            raise Incompatible("a student that learns on its own text needs it scored; set how often", "budget.scored")
        inside = isinstance(objective, WhiteBoxObjective)
        if inside and (rollout.writes or not isinstance(signal, Text)):
            raise Incompatible(
                f"objective={choices['objective']} looks inside the teacher as it reads the answers; take signal=text "
                "and rollout=off_policy",
                "rollout" if rollout.writes else "signal",
            )
        # What came with the answers is all that an objective across tokens needs that makes do with the top k.
        told = isinstance(objective, CrossTokenObjective) and objective.requires <= Reveals.TOP_K
        live = rollout.writes or inside  # the teacher reads what the student is trained on as it is trained
        if isinstance(signal, Text) and not live and objective.requires > Reveals.TEXT and not told:
            raise Incompatible(f"objective={choices['objective']} learns from distributions; take top_k, say", "signal")
        if config.own_examples and (live or not isinstance(signal, Text)):
            raise Incompatible(
                "come as text alone; take signal=text and rollout=off_policy, or leave it 0", "own_examples"
            )
        if curation.knows == "own labelled examples" and not config.own_examples:
            raise Incompatible(f"{choices['recovery']} measures on them; give it some", "own_examples")
        if curation.knows == "the task's checker" and task.check is None:
            raise Incompatible(f"{task.name} has no checker to verify answers with", "recovery")
        return cls(
            *(budget, task, teacher, defense, profile, sampling, attack, curation, objective, signal, rollout),
            *(student, recipe, metrics, inside, live),
        )


@dataclass
class LanguageExperiment:
    """Both sides of an experiment. `teacher` belongs to the provider and to the evaluation."""

    config: Any
    trainer: Trainer
    task: Task
    pool: Prompts
    teacher: LanguageTeacher
    serving: LanguageTeacher
    defense: LanguageDefense
    profile: InterfaceProfile
    budget: Budget
    sampling: Sampling
    signal: Signal
    attack: PromptAttack
    students: LanguageStudents
    metrics: dict[str, LanguageMetric]
    choices: dict[str, str]
    queries: Path

    @classmethod
    def build(cls, config: Any, trainer: Trainer, choices: dict[str, str], queries: Path) -> LanguageExperiment:
        """Raises `DistillError` for whatever does not fit together. The teacher is trained here if it has to be.

        `queries` is the folder of the query stage.
        """
        parts = LanguageParts.of(config, choices)
        task, teacher, defense, curation = parts.task, parts.teacher, parts.defense, parts.curation
        objective, signal, student, profile = parts.objective, parts.signal, parts.student, parts.profile
        pool: Prompts = build(config.pool, "pool").load_prompts(task)
        if len(pool) == 0:
            raise DistillError("the pool is empty", "pool")
        teacher.prepare(task, trainer, cache_dir())
        serving = teacher
        if isinstance(defense, PreparedLanguageDefense):
            serving = defense.prepare(teacher, task, trainer, cache_dir(), 0)  # as the teacher's, not the run's seed
        if isinstance(curation, PreparedCuration):
            curation.prepare(Task("none", NO_PROMPTS, NO_PROMPTS, NO_PROMPTS), trainer, cache_dir())
        opened = teacher if profile.reveals is Reveals.WEIGHTS and isinstance(teacher, LocalLanguageTeacher) else None
        if isinstance(student, WhiteBoxStudent) and opened is not None:
            student = student.of_teacher(opened.network)
        if parts.inside and opened is None:
            raise DistillError(
                f"objective={choices['objective']} takes a teacher whose weights are here, and access=white_box",
                "teacher",
            )
        over_tokens = not isinstance(signal, Text) or parts.live
        if over_tokens and not isinstance(objective, CrossTokenObjective) and teacher.tokenizer is not None:
            _check_tokens(student, teacher, choices)
        if teacher.tokenizer is None and not isinstance(signal, Text):
            raise DistillError(
                "a signal is over tokens, and this teacher's are not known; state its tokenizer", "teacher"
            )
        knowledge: dict[str, Any] = {"check": task.check} if curation.knows == "the task's checker" else {}
        return cls(
            config=config,
            trainer=trainer,
            task=task,
            pool=pool,
            teacher=teacher,
            serving=serving,
            defense=defense,
            profile=parts.profile,
            budget=parts.budget,
            sampling=parts.sampling,
            signal=parts.signal,
            attack=parts.attack,
            students=LanguageStudents(
                student,
                curation,
                parts.rollout,
                objective,
                parts.recipe,
                trainer,
                teacher.tokenizer,
                config.max_length,
                config.seed,
                knowledge,
                pool,
                config.own_examples,
            ),
            metrics=parts.metrics,
            choices=choices,
            queries=queries,
        )

    @cached_property
    def provider(self) -> LanguageProvider:
        """The provider of this experiment, for the attack and for the evaluation."""
        return self._provider(self.budget, self.queries / "provider_log")

    def _provider(self, budget: Budget, log: Path | None = None) -> LanguageProvider:
        return LanguageProvider(
            self.teacher,
            access=_access(self.config),
            prices=_prices(self.config),
            budget=budget,
            sampling=self.sampling,
            cache=cache_dir(),
            log=log,
            defense=self.defense,
            serving=self.serving,
            defense_id=digest([identity(self.config.defense), self._fingerprint], length=16),
            seed=self.config.seed,
        )

    @property
    def _fingerprint(self) -> str:
        return self.defense.fingerprint if isinstance(self.defense, PreparedLanguageDefense) else ""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Content hashes of what the configuration only names."""
        return {
            "teacher": self.teacher.fingerprint,
            "defense": self._fingerprint,
            "train": self.task.train.fingerprint,
            "test": self.task.test.fingerprint,
            "pool": self.pool.fingerprint,
        }

    # --- what the entry points ask of either domain ---------------------------------------------------------------

    def ask(self) -> SyntheticSet:
        """Let the attack loose on the provider."""
        with serve_text(self.provider) as oracle:
            return self.attack.synthesise(oracle, self.pool, self.config.samples, self.config.seed)

    def save_answers(self, synthetic: SyntheticSet) -> None:
        answers_on_disk.save(synthetic, self.queries / "transfer_set")

    def load_answers(self) -> SyntheticSet:
        """Raises `DamagedTransferSet`."""
        return answers_on_disk.load(self.queries / "transfer_set")

    def export(self, synthetic: SyntheticSet, path: Path) -> None:
        """A self-contained copy in the hub's own form."""
        answers_on_disk.export(synthetic, path)

    def push_to_hub(self, synthetic: SyntheticSet, repo: str) -> str:
        """The same on the Hugging Face hub, private. Returns where."""
        return answers_on_disk.push_to_hub(synthetic, repo)

    def fit(self, synthetic: SyntheticSet, name: str, directory: Path) -> TrainedLanguageModel:
        """A student from fresh weights; an interrupted training goes on from `directory`."""
        if not self.students.rollout.writes:
            return self.students.fit(synthetic, self.signal_of, name, directory)
        scorer = self._provider(Budget(queries=self.config.budget.scored))
        with serve_text(scorer) as oracle:
            student = self.students.fit(synthetic, self.signal_of, name, directory, oracle)
        cost = scorer.cost()
        student.history["scored"] = {"queries": cost.queries, "tokens": cost.tokens_in, "usd": cost.usd}
        return student

    def signal_of(self, curated: SyntheticSet) -> StoredSignal | TeacherSignal | None:
        """What the student learns from besides text: stored once, beside the transfer set, for all students of it; or
        the teacher itself, for an objective that looks inside (white-box)."""
        if isinstance(self.students.objective, WhiteBoxObjective) and isinstance(self.teacher, LocalLanguageTeacher):
            return TeacherSignal(self.teacher, curated)
        if isinstance(self.signal, Text):
            return None
        rows = np.arange(len(curated)) if curated.rows is None else curated.rows
        folder = self.queries / "signals" / digest(self.signal.identity)
        vocabulary = len(self.teacher.tokenizer)
        if self.trainer.is_main:
            cache = SignalCache(folder, self.signal, self.teacher.fingerprint, vocabulary)
            missing = np.flatnonzero(np.isin(rows, cache.missing(rows)))
            for start in range(0, len(missing), SIGNALS_AT_ONCE):
                some = missing[start : start + SIGNALS_AT_ONCE]
                distributions, lengths = self.provider.distributions(curated.take(some))
                cache.write(rows[some], lengths, distributions)
        self.trainer.wait()
        return StoredSignal(SignalCache(folder, self.signal, self.teacher.fingerprint, vocabulary), rows)

    def measure(self, student: TrainedLanguageModel, result: Result, run_dir: Path) -> None:
        """Fill in what is measured on the test prompts; it writes `samples.jsonl` on the way."""
        evidence = self._evidence({"student": student, "untrained": self.students.untrained()})
        for metric in self.metrics.values():
            if metric.section == "fidelity":
                result.fidelity |= metric.judge(evidence, "student")
            else:
                section = getattr(result, metric.section)
                for who in evidence.answers:
                    section.setdefault(who, {}).update(metric.judge(evidence, who))
        result.sizes = {
            "teacher": {
                "parameters": self.teacher.parameters,
                "flops_per_query": self.teacher.flops_per_token,
                "tokens_per_s": self._pace(self.teacher) if isinstance(self.teacher, LocalLanguageTeacher) else None,
            },
            "student": {
                "parameters": student.speaker.parameters,
                "flops_per_query": student.speaker.flops_per_token,
                "tokens_per_s": self._pace(student.speaker),
            },
        }
        result.test_rows = len(self.task.test)
        _write_samples(evidence, self.task.test, run_dir / "samples.jsonl")

    def compare(self, student: TrainedLanguageModel) -> dict[str, float]:
        """The student's accuracy and fidelity on the test prompts, for a point of the budget curve."""
        evidence = self._evidence({"student": student})
        numbers: dict[str, float] = {}
        for metric in self.metrics.values():
            prefix = "fidelity" if metric.section == "fidelity" else "student"
            numbers |= {f"{prefix}/{name}": value for name, value in metric.judge(evidence, "student").items()}
        return numbers

    def _evidence(self, students: dict[str, TrainedLanguageModel]) -> Evidence:
        test, sampling = self.task.test, replace(self.sampling, temperature=0.0)
        repeats = np.zeros(len(test), dtype=np.int64)
        # The teacher as its users have it, with and without the defense; a student may answer as it likes.
        answers: dict[str, Completions] = {
            "teacher": self.provider.clean(test, self.sampling, repeats),
            "defended_teacher": self.provider.defended(test, self.sampling, repeats),
        }
        speakers: dict[str, Any] = {"teacher": self.teacher} if isinstance(self.teacher, LocalLanguageTeacher) else {}
        for who, model in students.items():
            answers[who] = model.speaker.generate(test, sampling, repeats)
            if self.teacher.tokenizer is not None and same_tokens(model.tokenizer, self.teacher.tokenizer):
                speakers[who] = model.speaker
        mark = self.defense.watermark if isinstance(self.defense, LanguageChain) else self.defense
        mark = mark if isinstance(mark, Watermark) else None
        learnt = None if mark is None else self.load_answers()
        return Evidence(test, sampling, answers, self.task.check, self.task.held_out_text, speakers, mark, learnt)

    def _pace(self, model: Any) -> float:
        """Answer tokens a second to 32 test prompts at once."""
        prompts, sampling = self.task.test.take(slice(0, 32)), replace(self.sampling, temperature=0.0)
        started = time.perf_counter()
        made = model.generate(prompts, sampling, np.zeros(len(prompts), dtype=np.int64))
        return float(made.completion_tokens.sum() / (time.perf_counter() - started))


def _check_tokens(student: LanguageStudent, teacher: LanguageTeacher, choices: dict[str, str]) -> None:
    """Raises `Incompatible` where the two have different vocabularies."""
    if not same_tokens(student.tokenizer(teacher.tokenizer), teacher.tokenizer):
        raise Incompatible(
            f"{choices['student']} has other tokens than its teacher, and objective={choices['objective']} compares "
            "them one by one; take uld, byte_likelihood, or sequence_kd with signal=text",
            "student",
        )


def _access(config: Any) -> InterfaceProfile:
    access = config.access
    return InterfaceProfile.parse(access.profile, access.top_k, access.logit_bias, access.prompt_logprobs)


def _prices(config: Any) -> Prices:
    access = config.access
    return Prices(access.usd_per_query, access.usd_per_mtok_in, access.usd_per_mtok_out)


def _write_samples(evidence: Evidence, prompts: Prompts, path: Path) -> None:
    """The first test prompts with what each side answers: for reading."""
    lines = []
    for row in range(min(SAMPLES, len(prompts))):
        shown: dict[str, Any] = {"row": row, "prompt": prompts.messages(row)[-1]["content"]}
        if prompts.references is not None:
            shown["reference"] = prompts.references[row]
        shown |= {who: given.column[row] for who, given in evidence.answers.items()}
        lines.append(json.dumps(shown, ensure_ascii=False))
    write_atomically(path, "\n".join(lines) + "\n")
