"""The one door: nothing that an attacker is handed leads to the teacher, the provider or a clean answer."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toys import ToyTeacher, a_pool, a_provider

from distill import transfer
from distill.contracts import Oracle
from distill.errors import BudgetExceeded, DistillError
from distill.provider.cache import RowCache
from distill.provider.defenses.gaussian_noise import GaussianNoise
from distill.provider.journal import Journal
from distill.provider.ledger import Ledger
from distill.provider.oracle import serve
from distill.provider.provider import Provider
from distill.records import Answers, Budget, Examples, InterfaceProfile, Queries, Reveals, TransferSet

ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, np.generic, np.dtype, types.ModuleType, type)
FORBIDDEN = (ToyTeacher, Provider, RowCache, Journal, Ledger, GaussianNoise)


# Of the names with underscores, those that lead from one instance to another; the rest are methods of classes.
LEADING = {
    *("__dict__", "__self__", "__func__", "__wrapped__", "__closure__", "__defaults__", "__kwdefaults__"),
    *("__cause__", "__context__", "__traceback__"),
}
# Frames are looked into by their locals. A frame's caller is the program, not something that is handed out.
SKIPPED = {"f_globals", "f_builtins", "f_back", "tb_frame", "gi_frame"}


def neighbours(thing: object) -> Iterator[tuple[str, object]]:
    """Everything that one step leads to: attributes, items, closures, bound objects, frames, weak references.

    A function's module globals are left out: they hold classes, which anyone can import, but no provider.
    """
    if isinstance(thing, np.ndarray):  # its other attributes are views of it
        if thing.base is not None:
            yield ".base", thing.base
        if thing.dtype == object:
            yield from ((f"[{i}]", value) for i, value in enumerate(thing.ravel()))
        return
    for name in dir(thing):
        if (name.startswith("__") and name not in LEADING) or name in SKIPPED:
            continue
        try:
            yield f".{name}", getattr(thing, name)
        except Exception:
            continue
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", value) for key, value in list(thing.items()))
        yield from ((".key", key) for key in list(thing))
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", value) for i, value in enumerate(thing))
    elif isinstance(thing, types.CellType):
        yield ".cell_contents", thing.cell_contents
    elif isinstance(thing, types.TracebackType):
        yield ".tb_frame.f_locals", dict(thing.tb_frame.f_locals)
    elif isinstance(thing, types.GeneratorType) and thing.gi_frame is not None:
        yield ".gi_frame.f_locals", dict(thing.gi_frame.f_locals)
    elif isinstance(thing, weakref.ref):
        yield "()", thing()
    elif isinstance(thing, functools.partial):
        yield ".args", (thing.args, thing.keywords)


def leaks(handed: dict[str, object], clean: Answers) -> list[str]:
    """The paths that lead from what is handed out to what must stay behind the door."""
    found, seen = [], dict[int, object]()  # the objects are kept, so that no id is used twice
    todo = list(handed.items())
    while todo:
        path, thing = todo.pop()
        if isinstance(thing, ATOMS) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, FORBIDDEN):
            found.append(f"{path} is a {type(thing).__name__}")
            continue
        if isinstance(thing, np.ndarray) and _holds(thing, clean):
            found.append(f"{path} holds clean answers")
        todo.extend((path + step, next_thing) for step, next_thing in neighbours(thing))
    return found


def _holds(array: np.ndarray, clean: Answers) -> bool:
    """Whether any row of `array` is a clean answer, as posterior or as logits."""
    if array.ndim != 2 or array.shape[1] != clean.classes or array.dtype.kind != "f":
        return False
    secrets = [clean.posteriors] + ([clean.logits] if clean.logits is not None else [])
    return any((np.abs(array[:, None] - secret[None]) < 1e-6).all(axis=2).any() for secret in secrets)


class Hoarder:
    """An attack that keeps all that it is given, and what it can get by going wrong."""

    def extract(self, oracle: Oracle, pool: Examples, student: object, budget: int, seed: int) -> TransferSet:
        self.handed = {"oracle": oracle, "pool": pool, "bound": oracle.ask, "spent": oracle.spent()}
        answers = oracle.ask(Queries.of_pool(pool, np.arange(20)))
        parts = [answers, oracle.ask(Queries.of_pool(pool, np.arange(20, 25)), partial=True)]
        try:
            oracle.ask(Queries.of_pool(pool, np.arange(40)))
        except BudgetExceeded as error:
            self.handed["exceeded"] = error
        try:
            oracle.ask(Queries.made(np.zeros((2, 99), np.float32)))
        except DistillError as error:
            self.handed["refused"] = error
        self.handed["answers"] = parts
        return TransferSet(np.arange(25), Answers.join(parts).posteriors, pool=pool.fingerprint, profile="probs")


@pytest.mark.parametrize("access", [InterfaceProfile(Reveals.PROBS), InterfaceProfile(Reveals.LOGITS)])
def test_nothing_that_an_attack_is_handed_leads_behind_the_door(tmp_path: Path, access: InterfaceProfile) -> None:
    pool = a_pool(40)
    provider = a_provider(tmp_path, defense=GaussianNoise(), access=access, budget=Budget(queries=25))
    hoarder = Hoarder()
    with serve(provider) as oracle:
        hoarder.handed = {}
        transfer_set = hoarder.extract(oracle, pool, object(), 25, 0)
        transfer.save(transfer_set, tmp_path / "transfer_set")
        loaded = transfer.load(tmp_path / "transfer_set")
        # What recoveries, objectives and students are given is made of these.
        handed = hoarder.handed | {"attack": hoarder, "transfer_set": transfer_set, "loaded": loaded}
        assert {"exceeded", "refused"} <= set(handed)
        clean = provider.clean(pool.inputs)
        assert leaks(handed, clean) == []
    assert leaks(handed, clean) == []


def test_a_failure_of_the_provider_leads_nowhere(tmp_path: Path) -> None:
    class Failing(ToyTeacher):
        def predict(self, inputs: np.ndarray) -> np.ndarray:
            if len(inputs) == 3:
                error = RuntimeError("the teacher fell over")
                error.teacher = self  # type: ignore[attr-defined]
                raise error from ValueError(self)
            return super().predict(inputs)

    def provoke(oracle: Oracle) -> DistillError:
        """The attacker's side: a frame of its own, which holds no provider."""
        try:
            oracle.ask(Queries.of_pool(a_pool(40), np.arange(20, 23)))
        except DistillError as error:
            return error
        raise AssertionError

    provider = a_provider(tmp_path, Failing(), defense=GaussianNoise())
    clean = provider.clean(a_pool(10).inputs)
    handed: dict[str, object] = {}
    with pytest.raises(RuntimeError, match="fell over"), serve(provider) as oracle:
        handed |= {"oracle": oracle, "error": provoke(oracle)}
    assert len(handed) == 2
    assert leaks(handed, clean) == []


class LeakyOracle:
    """Leaks in every way that the walk must see."""

    def __init__(self, provider: Provider, how: str) -> None:
        teacher, answer = provider.teacher, provider.answer
        self.leak: object
        match how:
            case "attribute":
                self.leak = {"nested": [(provider,)]}
            case "bound method":
                self.leak = answer
            case "closure":
                self.leak = lambda: teacher
            case "default":
                self.leak = lambda it=teacher: it
            case "partial":
                self.leak = functools.partial(print, teacher)
            case "weak reference":
                self.leak = weakref.ref(teacher)
            case "generator":
                self.leak = (teacher for _ in range(1))
            case "view":
                self.leak = provider.clean(a_pool(40).inputs).posteriors[:, :2]
            case "copy of clean answers":
                self.leak = Answers(provider.clean(a_pool(3).inputs).posteriors.copy())
            case "slot":
                self.leak = Slotted(teacher)
            case "object array":
                self.leak = np.array([None, teacher], dtype=object)
            case "exception":
                self.leak = raised(provider)
            case "cause":
                self.leak = DistillError("no")
                self.leak.__cause__ = ValueError(teacher)


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden: object) -> None:
        self.hidden = hidden


def raised(provider: Provider) -> Exception:
    """A refusal whose traceback runs through the provider's own frames."""
    try:
        provider.ledger.require(10**9)
    except BudgetExceeded as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "how",
    [
        *("attribute", "bound method", "closure", "default", "partial", "weak reference", "generator", "view"),
        *("copy of clean answers", "slot", "object array", "exception", "cause"),
    ],
)
def test_the_walk_finds_a_leak(tmp_path: Path, how: str) -> None:
    provider = a_provider(tmp_path, defense=GaussianNoise())
    clean = provider.clean(a_pool(40).inputs)
    assert leaks({"oracle": LeakyOracle(provider, how)}, clean) != []


def test_an_oracle_that_just_holds_its_provider_is_caught(tmp_path: Path) -> None:
    class Straight:
        def __init__(self, provider: Provider) -> None:
            self.profile, self.ask = provider.profile, provider.answer

    provider = a_provider(tmp_path, defense=GaussianNoise())
    clean = provider.clean(a_pool(40).inputs)
    assert any("is a Provider" in leak for leak in leaks({"oracle": Straight(provider)}, clean))


def test_an_attacks_own_column_is_read_in_the_attacks_own_thread(tmp_path: Path) -> None:
    """Else its code could look at the provider's frames from inside."""
    import threading

    class Spy:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, rows: object, /) -> np.ndarray:
            self.thread = threading.current_thread()
            return a_pool(4).inputs[rows]

    spy = Spy()
    with serve(a_provider(tmp_path)) as oracle:
        oracle.ask(Queries(spy, np.arange(4), from_pool=False))
    assert spy.thread is threading.main_thread()


def test_an_attacker_cannot_spoil_what_the_provider_keeps(tmp_path: Path) -> None:
    pool = a_pool(10)
    provider = a_provider(tmp_path)
    with serve(provider) as oracle:
        answers = oracle.ask(Queries.of_pool(pool, np.arange(10)))
        kept = answers.posteriors.copy()
        answers.posteriors[:] = 0
    np.testing.assert_array_equal(provider.returned(pool.inputs).posteriors, kept)
    again = a_provider(tmp_path)
    with serve(again) as oracle:
        np.testing.assert_array_equal(oracle.ask(Queries.of_pool(pool, np.arange(10))).posteriors, kept)
