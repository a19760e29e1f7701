from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from distill.contracts import Teacher, of_language
from distill.errors import DistillError
from distill.records import Dataset, Reveals, content_keys, one_hot, softmax

if TYPE_CHECKING:
    from distill.training import Trainer


class Several:
    """Several teachers of one task, each of which answers its share of the queries.

    It stands for an attacker who spreads its queries over several providers, so that none of them sees more than a
    share. Which one answers is a hash of the query's content: a repeated query goes to the same one, and an answer does
    not depend on the batch. Bytes and the same picture in [0, 1] are two contents. The students' fidelity is measured
    against the same spread: each test row against the teacher that would have answered it. Defense, access and budget
    are one for all; answers are as poor as the poorest teacher's.

    `usd_per_query` and `flops_per_query` are means over the teachers, `parameters` is their sum, latency the largest.

    Args:
        teachers: At least two, by name. On the command line, without an experiment that sizes a teacher:
            ``teacher=several student@teacher.teachers.second.architecture=mlp``; a third is
            ``+teacher@teacher.teachers.third=torch_classifier``.

    Raises:
        DistillError: There are fewer than two, or one of them is a language model.
    """

    rows_at_once: int
    parameters: int | None
    flops_per_query: float | None
    fingerprint: str

    ROUTE: ClassVar[str] = "first word of the content hash, modulo"  # part of the fingerprint

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if len(teachers) < 2:
            raise DistillError(f"teachers are at least two, not {len(teachers)}")
        for name, teacher in teachers.items():
            if of_language("teacher", type(teacher)):
                raise DistillError(f"teachers are classifiers, and {name} is a language model")
        self.teachers = dict(teachers)
        each = list(self.teachers.values())
        self.output: Reveals = min(teacher.output for teacher in each)
        self.usd_per_query = sum(teacher.usd_per_query for teacher in each) / len(each)
        self.remote = any(teacher.remote for teacher in each)
        self.rows_at_once = min(teacher.rows_at_once for teacher in each)

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Prepare each, one after the other."""
        self._classes = data.classes
        each = list(self.teachers.values())
        for teacher in each:
            teacher.prepare(data, trainer, cache)
        sizes = [teacher.parameters for teacher in each if teacher.parameters is not None]
        flops = [teacher.flops_per_query for teacher in each if teacher.flops_per_query is not None]
        self.parameters = sum(sizes) if len(sizes) == len(each) else None
        self.flops_per_query = sum(flops) / len(each) if len(flops) == len(each) else None
        parts = "\x1f".join([self.ROUTE, self.output.name, *(teacher.fingerprint for teacher in each)])
        self.fingerprint = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def route(self, inputs: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of the teacher that answers each."""
        words = np.frombuffer(content_keys(inputs).tobytes(), dtype="<u8").reshape(-1, 2)
        return (words[:, 0] % np.uint64(len(self.teachers))).astype(np.int64)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32: `output` of whoever answers each."""
        answers = np.zeros((len(inputs), self._classes), dtype=np.float32)
        routes = self.route(inputs)
        for number, teacher in enumerate(self.teachers.values()):
            rows = np.flatnonzero(routes == number)
            if len(rows):
                answers[rows] = self._poorer(teacher.predict(inputs[rows]), teacher.output)
        return answers

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of the slowest."""
        seconds = [teacher.latency_s(one) for teacher in self.teachers.values()]
        known = [each for each in seconds if each is not None]
        return max(known) if len(known) == len(seconds) else None

    def _poorer(self, values: np.ndarray, output: Reveals) -> np.ndarray:
        if output is self.output:
            return values
        if self.output is Reveals.LABEL:
            return one_hot(values.argmax(axis=1), self._classes)
        return softmax(values)
