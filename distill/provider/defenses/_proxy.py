"""The small model of the provider's own that stands in for the attacker's student, and the defenses that ask it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from distill.config import digest
from distill.contracts import LanguageStudent, LanguageTeacher, LocalLanguageTeacher
from distill.decoding import Network
from distill.errors import DistillError
from distill.heads import Head, Sparse
from distill.kept import find, held, weights_hash
from distill.language import Prompts, Sampling, SyntheticSet, Task
from distill.language_training import build_language, fit_language_student
from distill.packing import same_tokens
from distill.provider.defenses._language import Unchanged
from distill.provider.requests import RequestCache
from distill.randomness import derive
from distill.records import Reveals, file_hash
from distill.training import Recipe, Trainer

log = logging.getLogger(__name__)

SCHEMA = 1  # raised when a change of code changes what the same description trains


@dataclass(frozen=True)
class Proxy:
    """A small language model that stands in for the attacker's student.

    Attributes:
        network: A Hugging Face causal language model in evaluation mode, without gradients, on the trainer's device.
            Its tokens are the teacher's; its vocabulary may be padded otherwise.
        fingerprint: Content hash of what determines it.
    """

    network: Any
    fingerprint: str


def training_prompts(task: Task, rows: slice, key: str) -> Prompts:
    """Some of the provider's own prompts. Raises `DistillError` where there are too few."""
    if rows.stop > len(task.train):
        raise DistillError(
            f"{task.name} has {len(task.train)} prompts of the provider's own and {rows.stop} are needed; take fewer",
            key,
        )
    return task.train.take(rows)


def own_answers(teacher: LanguageTeacher, prompts: Prompts, max_tokens: int, cache: Path, seed: int) -> SyntheticSet:
    """What the undefended teacher says, drawn at temperature 1. Each answer is made once, ever, and kept."""
    sampling = Sampling(max_tokens=max_tokens, seed=derive(seed, "own answers"))
    repeats = np.zeros(len(prompts), dtype=np.int64)
    completions = RequestCache(cache / "requests" / teacher.fingerprint).get_or_generate(
        sampling.request_keys(prompts, repeats),
        0,
        lambda part: teacher.generate(prompts.take(part), sampling, repeats[part]),
        teacher.requests_at_once,
    )
    return SyntheticSet(prompts, completions, repeats, sampling, np.zeros(len(prompts)), teacher.fingerprint)


def proxy_of(
    teacher: LanguageTeacher,
    student: LanguageStudent,
    recipe: Recipe,
    prompts: Prompts,
    *,
    max_tokens: int,
    max_length: int,
    trainer: Trainer,
    cache: Path,
    seed: int,
    key: str = "defense.proxy",
) -> Proxy:
    """A proxy trained on what the undefended teacher answers, or the one that was trained before.

    Several processes that need the same one wait for the one that trains it; a killed training goes on from its last
    checkpoint; damaged weights are trained anew.

    Args:
        teacher: Prepared.
        student: What the proxy is.
        recipe: How it is trained.
        prompts: What the teacher answers; with none, the student's first weights are the proxy.
        max_tokens: Of an answer.
        max_length: Positions of a packed row.
        trainer: The engine.
        cache: Where it is kept.
        seed: Of answers, first weights and training.
        key: The config key of the student, for messages.

    Raises:
        DistillError: The teacher's weights are elsewhere, or its tokens are not the student's.
    """
    if not isinstance(teacher, LocalLanguageTeacher):
        raise DistillError(
            "changes the logits while an answer is decoded, so it needs a teacher that is decoded here; use "
            "hf_causal_lm, smollm2 or tiny_cot",
            "defense",
        )
    if student.requires > Reveals.TEXT:
        raise DistillError("is made from its teacher's weights; take llama or causal_lm", key)
    tokenizer = student.tokenizer(teacher.tokenizer)
    if not same_tokens(tokenizer, teacher.tokenizer):
        raise DistillError(
            "has other tokens than the teacher, whose next token it is asked about; take a model of the same family, "
            "or llama, which takes the teacher's tokenizer",
            key,
        )
    own = derive(seed, "proxy")
    network: Any = build_language(student, tokenizer, own)
    told = {name: value for name, value in network.config.to_dict().items() if name != "_name_or_path"}
    facts: dict[str, Any] = {"schema": SCHEMA, "first": weights_hash(network), "config": told}
    if len(prompts):
        facts |= {
            "teacher": teacher.fingerprint,
            "prompts": prompts.fingerprint,
            "max_tokens": max_tokens,
            "max_length": max_length,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "precision": trainer.precision,
        }
        folder = cache / "proxies" / digest(facts, length=16)
        with held(folder, "proxy") if trainer.is_main else contextlib.nullcontext():
            # All ranks must do the same, so one looks. The others hold no lock: this one does until all are done.
            if trainer.broadcast(find(folder, "proxy.json", "proxy") if trainer.is_main else None) is None:
                log.info("training the proxy on %d answers of the teacher; it is kept in %s", len(prompts), folder)
                training = folder.with_name(f"{folder.name}-training")
                network, history = fit_language_student(
                    trainer,
                    student,
                    own_answers(teacher, prompts, max_tokens, cache, seed),
                    _Likelihood(),
                    recipe,
                    teachers=teacher.tokenizer,
                    max_length=max_length,
                    seed=own,
                    name="proxy",
                    directory=training,
                )
                if trainer.is_main:
                    _keep(network, {"history": history, "facts": facts}, folder)
                    shutil.rmtree(training, ignore_errors=True)
            else:
                load_model(network, folder / "model.safetensors")
                log.info("the proxy is the one trained before: %s", folder)
            trainer.wait()
    return Proxy(network.to(trainer.device).eval().requires_grad_(False), digest(facts, length=32))


def _keep(network: Any, record: dict[str, Any], folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_model(network, str(partial / "model.safetensors"))
    record = {"weights": file_hash(partial / "model.safetensors")} | record
    (partial / "proxy.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


class _Likelihood:
    """The objective of a proxy: −ln of the probability of each token of the answers."""

    requires = Reveals.LABEL

    def loss(self, student: Head, labels: torch.Tensor, signal: Head | Sparse | None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(student.logits(), labels, reduction="sum")


def as_wide_as(logits: torch.Tensor, theirs: torch.Tensor, fill: float) -> torch.Tensor:
    """A proxy's values for the (n, vocabulary) tokens of the teacher, whose vocabulary may be padded otherwise: what
    it has no value for gets `fill`."""
    theirs = theirs.to(logits.device)[:, : logits.shape[1]]
    return torch.nn.functional.pad(theirs, (0, logits.shape[1] - theirs.shape[1]), value=fill)


class ProxyDefense(Unchanged):
    """What the defenses share that ask a proxy about each next token.

    Args:
        proxy: What it is: a student.
        recipe: How it is trained.
        answers: Of the teacher to the first so many of its training prompts: what the proxy is trained on. 0 for a
            student that comes trained.
        max_tokens: Of such an answer.
        max_length: Positions of a packed row.

    Raises:
        DistillError: A number is out of its range.
    """

    fingerprint = ""  # until `prepare`

    def __init__(self, proxy: LanguageStudent, recipe: Recipe, answers: int, max_tokens: int, max_length: int) -> None:
        if answers < 0:
            raise DistillError(f"must be at least 0, not {answers}", "defense.answers")
        for name, value in {"max_tokens": max_tokens, "max_length": max_length}.items():
            if value < 1:
                raise DistillError(f"must be at least 1, not {value}", f"defense.{name}")
        self.proxy, self.recipe, self.answers = proxy, recipe, answers
        self.max_tokens, self.max_length = max_tokens, max_length
        self.networks: Sequence[Network] = ()

    def prepare(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> LanguageTeacher:
        """Train or load the proxy."""
        proxy = self.trained(teacher, task, trainer, cache, seed)
        self.networks, self.fingerprint = [Network(proxy.network)], proxy.fingerprint
        return teacher

    @property
    def tokens_read(self) -> int:
        return sum(network.tokens_read for network in self.networks)

    def trained(self, teacher: LanguageTeacher, task: Task, trainer: Any, cache: Path, seed: int) -> Proxy:
        return proxy_of(
            teacher,
            self.proxy,
            self.recipe,
            training_prompts(task, slice(0, self.answers), "defense.answers"),
            max_tokens=self.max_tokens,
            max_length=self.max_length,
            trainer=trainer,
            cache=cache,
            seed=seed,
        )
