"""From yaml to objects: where the configs lie, the schema of the plain keys, run identity and `build`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from distill.errors import DistillError, nearest

_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

IDENTITY_SCHEMA = 1  # raised when a change of code changes what the same configuration means
# What the answers depend on, and what the student depends on besides.
QUERY_GROUPS = (
    *("data", "pool", "teacher", "defense", "access", "attack", "budget", "precision", "seed"),
    *("sampling", "samples"),
)
STUDENT_GROUPS = (
    *("recovery", "signal", "rollout", "objective", "student", "training", "max_length", "own_examples"),
    *("metric", "outliers", "curve"),
)
# What the queries of an attack that adapts depend on besides: the students that it trains on the way.
LEARNER_GROUPS = ("recovery", "objective", "student", "training")
# Keys that say where or how fast, not what; they are left out of every identity.
NOT_IDENTITY = frozenset(
    {
        "root",
        "workers",
        "checkpoint_steps",
        "log_steps",
        "timeout_s",
        "max_attempts",
        "concurrency",
        "max_usd",
        "authorized",
        "api_key_env",
    }
)
# Keys that name a file or folder by path: the identity takes what it holds instead.
CONTENT_KEYS = frozenset({"path", "test_path", "model"})


@dataclass
class AccessConfig:
    """What the API reveals and lets ask, and what the attacker is billed; tokens are those of language models."""

    profile: str = "probs"
    top_k: int | None = None
    usd_per_query: float = 0.0
    usd_per_mtok_in: float = 0.0
    usd_per_mtok_out: float = 0.0
    logit_bias: bool = False
    prompt_logprobs: bool = False


@dataclass
class BudgetConfig:
    """What the attacker may spend: at least one of the first three; `scored` is how many texts of a student's own the
    teacher scores while it learns on-policy, besides."""

    queries: int | None = None
    usd: float | None = None
    tokens: int | None = None
    scored: int | None = None


@dataclass
class RunConfig:
    """Where and how, not what: nothing here changes a result."""

    device: str = "auto"
    workers: int = 0
    threads: int | None = None
    force: bool = False
    progress: bool = True
    export: str | None = None
    push_to_hub: str | None = None


@dataclass
class Config:
    """The root. Component nodes are free-form here; `build` checks them against the class that they name."""

    data: Any = MISSING
    pool: Any = MISSING
    teacher: Any = MISSING
    defense: Any = MISSING
    access: AccessConfig = field(default_factory=AccessConfig)
    attack: Any = MISSING
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    recovery: Any = MISSING
    objective: Any = MISSING
    student: Any = MISSING
    training: Any = MISSING
    metric: Any = MISSING
    tracker: Any = MISSING
    curve: list[float] = field(default_factory=list)
    outliers: Any = None  # a pool of inputs from elsewhere, for the evaluation of classifiers
    precision: str = "no"
    seed: int = 0
    # Of language models: how answers are drawn, how many to a prompt, what a student learns from besides text, on whose
    # text, and the positions of a packed training row.
    sampling: Any = None
    samples: int = 1
    signal: Any = None
    rollout: Any = None
    max_length: int = 512
    own_examples: int = 0  # labelled ones of the attacker's own, which are mixed into the training of a language model
    name: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)


def build(node: Any, key: str, **context: Any) -> Any:
    """Make the object that a config node describes, inner nodes first.

    Args:
        node: A mapping with a ``_target_`` (``package.module.Class``); lists and mappings without one are walked.
        key: Where the node lies in the config, for messages.
        **context: Further arguments for the outermost class, such as a seed.

    Raises:
        DistillError: The class does not exist or may not be named, or an option is unknown, missing or refused.
    """
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
    if isinstance(node, list):
        return [build(child, f"{key}.{i}") for i, child in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {str(name): build(child, f"{key}.{name}") for name, child in node.items() if name != "_target_"}
    if "_target_" not in node:
        return values
    target = locate(node["_target_"], key)
    values.update(context)
    asked = inspect.signature(target).parameters
    takes = {name: parameter for name, parameter in asked.items() if parameter.kind is not parameter.VAR_KEYWORD}
    any_option = len(takes) != len(asked)
    title = target.__name__
    for name in values:
        if name not in takes and not any_option:
            options = sorted(set(takes) - set(context))
            raise DistillError(f"{title} has no option '{name}'; it takes {', '.join(options) or 'none'}", key)
    for name, parameter in takes.items():
        if values.get(name) == "???" or (parameter.default is inspect.Parameter.empty and name not in values):
            raise DistillError(f"{title} needs it; set {key}.{name}=…", f"{key}.{name}")
    try:
        return target(**values)
    except DistillError as error:
        if error.key:
            raise
        raise _keyed(str(error), key, takes) from None
    except (TypeError, ValueError) as error:
        raise _keyed(str(error), key, takes) from error


def _keyed(message: str, key: str, takes: Mapping[str, Any]) -> DistillError:
    """A class says "lr is more than 0"; the user set `training.lr`."""
    option, _, rest = message.partition(" ")
    return DistillError(rest, f"{key}.{option}") if option in takes else DistillError(message, key)


def locate(path: str, key: str) -> Any:
    """The class or function at ``package.module.Name``; modules outside of distill need `DISTILL_ALLOW_TARGETS`."""
    allowed = ("distill.", *(p for p in os.environ.get("DISTILL_ALLOW_TARGETS", "").split(",") if p))
    if not path.startswith(allowed):
        raise DistillError(
            f"'{path}' is outside of distill; allow it with DISTILL_ALLOW_TARGETS={path.split('.')[0]}.", key
        )
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise DistillError(f"cannot import {module_name}: {error}", key) from error
    if name not in vars(module):
        classes = [n for n, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        raise DistillError(f"no '{name}' in {module_name}.{nearest(name, classes)}", key)
    return vars(module)[name]


def options_that(group: str, fits: Callable[[Any], bool]) -> list[str]:
    """The options of a group whose classes satisfy a condition, for messages that name what would work."""
    found = []
    for path in sorted((CONFIG_DIR / group).glob("*.yaml")):
        if fits(locate(str(OmegaConf.select(OmegaConf.load(path), "_target_")), group)):
            found.append(path.stem)
    return found


# --- identity -------------------------------------------------------------------------------------------------------


def identity(node: Any) -> Any:
    """The part of a config that can change a result: no paths, no workers; a file stands for what it holds."""
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, Mapping):
        return {
            str(name): _content(value) if name in CONTENT_KEYS else identity(value)
            for name, value in sorted(node.items())
            if name not in NOT_IDENTITY
        }
    if isinstance(node, (list, tuple)):
        return [identity(child) for child in node]
    return node


def _content(value: Any) -> Any:
    path = Path(value).expanduser() if isinstance(value, str) else None
    if path is None or not path.exists():
        return value
    digest = hashlib.blake2b(digest_size=16)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return f"content:{digest.hexdigest()}"


def digest(value: Any, length: int = 8) -> str:
    """The first hexadecimal digits of the hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:length]


def query_id(config: Any, identify: Callable[[Any], Any] = identity) -> str:
    """Identifies a transfer set: everything that the answers depend on. `identify` may remember what `identity` says of
    a node."""
    groups = QUERY_GROUPS + (LEARNER_GROUPS if _adapts(config["attack"]) else ())
    return digest({"schema": IDENTITY_SCHEMA} | {group: identify(config[group]) for group in groups})


def _adapts(attack: Any) -> bool:
    """Whether this attack, or one inside of it, asks what depends on students."""
    if not isinstance(attack, (Mapping, DictConfig)):
        return False
    if "_target_" in attack:
        kind = locate(attack["_target_"], "attack")
        if "adapts" in dir(kind) and kind.adapts:
            return True
    return any(_adapts(attack[name]) for name in attack)


def run_id(config: Any, identify: Callable[[Any], Any] = identity) -> str:
    """Identifies a run: everything that its result depends on."""
    groups = QUERY_GROUPS + STUDENT_GROUPS
    return digest({"schema": IDENTITY_SCHEMA} | {group: identify(config[group]) for group in groups})


OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True)
OmegaConf.register_new_resolver("query_id", lambda *, _root_: query_id(_root_), replace=True)
ConfigStore.instance().store(name="schema", node=Config)


def cache_dir() -> Path:
    """`DISTILL_CACHE`, by default the platform's cache folder."""
    if path := os.environ.get("DISTILL_CACHE"):
        return Path(path).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("distill"))
