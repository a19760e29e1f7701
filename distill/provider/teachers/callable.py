from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distill.config import locate
from distill.errors import BadAnswer, DistillError, nearest
from distill.provider.teachers.classes import column_order
from distill.records import Dataset, Reveals, one_hot

if TYPE_CHECKING:
    from distill.training import Trainer

OUTPUTS = ("probs", "logits", "label")


class Callable:
    """Any Python function as the teacher: a model of another library, a lookup, a client of one's own.

    The function is called with a list of `str` (text) or a numpy array (uint8 pixels (n, height, width, channels) or
    a float32 table (n, features)) and returns, for `output`

    * ``probs``: (n, classes) probabilities, or (n,) the probability of class 1 of two;
    * ``logits``: (n, classes), or (n,) the log-odds of class 1 of two;
    * ``label``: (n,) class numbers or class names.

    Row i of what it returns must depend on row i of its inputs only.

    Args:
        function: ``package.module:function``. A module outside of distill must be allowed by `DISTILL_ALLOW_TARGETS`.
        output: What it returns: ``probs``, ``logits`` or ``label``.
        classes: The class names in the order of its columns (and of its class numbers), where that isn't the data's
            order. They must be the data's names, up to case and punctuation.
        usd_per_query: What one answer costs you. Above zero, answers are stored as they arrive.
        fingerprint: Identifies the version of the model. Left out, it is a hash of every file of the package (or of
            the module, where it is no package) that the function comes from; state one where the weights lie elsewhere.

    Raises:
        DistillError: The function can't be found, may not be named, or fails.
        BadAnswer: What it returns has not one row for each input and one column for each class.
    """

    parameters: ClassVar[None] = None
    flops_per_query: ClassVar[None] = None

    def __init__(
        self,
        function: str,
        output: str = "probs",
        classes: Sequence[str] | None = None,
        usd_per_query: float = 0.0,
        fingerprint: str | None = None,
    ) -> None:
        module, colon, name = function.partition(":")
        if not (module and colon and name):
            raise DistillError(f"'{function}' is not of the form package.module:function", "teacher.function")
        if output not in OUTPUTS:
            raise DistillError(f"no output '{output}'.{nearest(output, OUTPUTS)}", "teacher.output")
        if not usd_per_query >= 0:
            raise DistillError(f"must be at least 0, not {usd_per_query}", "teacher.usd_per_query")
        self.function, self.output = function, Reveals[output.upper()]
        self.usd_per_query, self.remote = usd_per_query, usd_per_query > 0
        self.rows_at_once = 16 if self.remote else 4096
        self._call = locate(f"{module}.{name}", "teacher.function")
        if not callable(self._call):
            raise DistillError(f"'{function}' is not a function", "teacher.function")
        self._module = module
        self._classes = classes
        self._version = fingerprint

    def prepare(self, data: Dataset, trainer: Trainer, cache: Path) -> None:
        """Find out what the function's columns mean. It is not called."""
        self._names = list(data.class_names)
        self._text = data.spec.kind == "text"
        self._order = None
        if self._classes is not None:
            self._order = column_order(self._classes, self._names, "teacher.classes")
        version = self._version or _package_hash(self._module)
        order = [] if self._order is None else self._order.tolist()
        facts = f"callable {self.function} {self.output.name} {version} {order}"
        self.fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """(n, classes) float32 in the form that `output` says."""
        if not len(inputs):
            return np.zeros((0, len(self._names)), dtype=np.float32)
        try:
            answer = np.asarray(self._call(inputs.tolist() if self._text else inputs))
        except Exception as error:  # whatever the user's function may raise
            problem = " ".join(str(error).split())
            raise DistillError(f"{self.function} failed: {type(error).__name__}: {problem}", "teacher") from error
        if self.output is Reveals.LABEL:
            return self._from_labels(answer, len(inputs))
        try:
            values = answer.astype(np.float32)
        except (ValueError, TypeError):
            raise BadAnswer(f"{self.function} returned {answer.dtype}, not numbers", "teacher") from None
        classes = len(self._names)
        if values.shape == (len(inputs),) and classes == 2:
            rest = 1 - values if self.output is Reveals.PROBS else np.zeros_like(values)
            values = np.stack([rest, values], axis=1)
        if values.shape != (len(inputs), classes):
            raise BadAnswer(
                f"{self.function} returned shape {values.shape}; {len(inputs)} inputs and {classes} classes make "
                f"{(len(inputs), classes)}",
                "teacher",
            )
        return values if self._order is None else values[:, self._order]

    def latency_s(self, one: np.ndarray) -> float | None:
        """Of one call with one input, where calls cost nothing."""
        if self.remote:
            return None
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            self.predict(one)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def _from_labels(self, answer: np.ndarray, n: int) -> np.ndarray:
        if answer.shape != (n,):
            raise BadAnswer(f"{self.function} returned shape {answer.shape}; {n} labels make ({n},)", "teacher")
        names = self._names if self._classes is None else list(self._classes)
        if answer.dtype.kind in "iub":
            known: dict[Any, int] = {i: i for i in range(len(names))}
        else:
            known = {name: i for i, name in enumerate(names)}
        if unknown := [label for label in answer.tolist() if label not in known]:
            raise BadAnswer(f"{self.function} returned the label {unknown[0]!r}, which is no class", "teacher")
        rows = one_hot(np.array([known[label] for label in answer.tolist()]), len(names))
        return rows if self._order is None else rows[:, self._order]


def _package_hash(module: str) -> str:
    """Versions and content of the outermost package (or the single file) that a module lies in.

    Raises `DistillError` where the module has no files, such as one typed into an interpreter.
    """
    package = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # "__main__" has none
        spec = None
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        raise DistillError(f"{module} has no files that tell its version; state one", "teacher.fingerprint")
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(importlib.metadata.packages_distributions().get(package, [])):
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    for root in sorted(spec.submodule_search_locations or [str(spec.origin)]):
        top = Path(root)
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(top) if file != top else file.name}\n".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()
