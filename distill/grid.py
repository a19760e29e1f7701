"""The cells of a benchmark: every combination of its axes, as the run that it is.

Composing a configuration takes Hydra a tenth of a second, and a grid has thousands of cells. So the base and each value
of each axis are composed once. Values that change different root keys of the configuration are put together by key;
those that change the same one are composed together. Nothing here loads torch but `Grid.check`.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import CONFIG_DIR, QUERY_GROUPS, STUDENT_GROUPS, Config, identity, query_id, run_id
from distill.errors import DistillError, Incompatible, nearest
from distill.launch import options

SEED = "seed"
FEW = 6  # compositions that are not worth another process


@dataclass(frozen=True)
class Composed:
    """A configuration as plain values, by root key, and the option that was chosen of each group.

    `name` is the folder's, and may stand for choices yet. `whole` says that it can't be taken apart, since one part
    refers to another.
    """

    nodes: dict[str, Any]
    choices: dict[str, str]
    name: str
    whole: bool


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        at: Its value on each axis, by the axis' name; a control has only those that it is crossed with.
        control: The control's name, or "".
        overrides: What would make the same run with `python -m distill.train`.
        config: The configuration as plain values; cells share what does not differ.
        choices: The option that was chosen of each group.
        run: Its run id.
        query: The id of its transfer set.
        name: The folder of its kind, such as ``knockoff_random-vs-mad``.
        reason: Why it can't be run, or "".
    """

    at: dict[str, str]
    control: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    choices: dict[str, str]
    run: str
    query: str
    name: str
    reason: str = ""

    @property
    def full_config(self) -> DictConfig:
        """As Hydra would hand it to a task."""
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(self.config))
        assert isinstance(merged, DictConfig)
        return merged


@dataclass
class Grid:
    """A benchmark's cells. Hydra has to be initialised.

    Args:
        benchmark: The name of the benchmark, which each run notes among its choices.
        base: Overrides that all cells share, such as ``["+experiment=modelguard_grid", "budget.queries=2000"]``.
        axes: For each axis its values: a list of options or numbers of the key or group that the axis is called
            (``"glob(*)"`` for all options of a group), or names with an override each or a list of them.
        controls: Names with overrides, as the values of an axis; crossed with `shared` axes only.
        shared: Axes that controls are crossed with.
        baseline: Overrides that controls start from, such as those of no defense.
        skip: Combinations that are left out: axis to values; all have to match.
        folders: Where configs lie, for ``glob(*)``.
    """

    benchmark: str
    base: Sequence[str]
    axes: Mapping[str, Any]
    controls: Mapping[str, Any]
    shared: Sequence[str] = (SEED,)
    baseline: tuple[str, ...] = ()
    skip: Sequence[Mapping[str, Any]] = ()
    folders: Sequence[Path] = (CONFIG_DIR,)

    def __post_init__(self) -> None:
        self._compositions: dict[tuple[str, ...], Composed] = {}
        self._changes: dict[tuple[str, ...], Composed] = {}
        self._identities: dict[int, tuple[Any, Any]] = {}
        if not self.axes:
            raise DistillError("names what is varied, such as {defense: [none, rounding], seed: [0, 1, 2]}", "axes")
        for combination in self.skip:
            for axis, values in combination.items():
                if axis not in self.values:
                    raise DistillError(f"no axis '{axis}'.{nearest(axis, self.values)}", "skip")
                for value in _listed(values):
                    if value not in self.values[axis]:
                        raise DistillError(f"no value '{value}' on {axis}.{nearest(value, self.values[axis])}", "skip")

    @cached_property
    def values(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """For each axis, the overrides of each of its values."""
        return {str(axis): values_of(str(axis), spec, self.folders) for axis, spec in self.axes.items()}

    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination but those that are skipped, then the controls; not yet checked."""
        return [*self._crossed(), *self._controls()]

    def _crossed(self) -> Iterator[Cell]:
        axes = list(self.values)
        for chosen in itertools.product(*self.values.values()):
            at = dict(zip(axes, chosen, strict=True))
            if not any(all(at[a] in _listed(v) for a, v in some.items()) for some in self.skip):
                yield self._cell(at, "", [self.values[axis][value] for axis, value in at.items()])

    def _controls(self) -> Iterator[Cell]:
        shared = [axis for axis in self.values if axis in self.shared]
        for name, overrides in values_of("controls", self.controls, self.folders).items():
            for chosen in itertools.product(*(self.values[axis] for axis in shared)):
                at = dict(zip(shared, chosen, strict=True))
                parts = [self.values[axis][value] for axis, value in at.items()]
                yield self._cell(at, name, [self.baseline, *parts, overrides])

    def _cell(self, at: dict[str, str], control: str, parts: Sequence[tuple[str, ...]]) -> Cell:
        made = self._put_together(parts)
        choices = made.choices | {"benchmark": self.benchmark}
        name = re.sub(r"\$\{hydra:runtime\.choices\.(\w+)\}", lambda found: choices[found[1]], made.name)
        config = made.nodes | {"name": name}
        overrides = tuple(itertools.chain(self.base, *parts))
        run, query = run_id(config, self._identify), query_id(config, self._identify)
        return Cell(at, control, overrides, config, choices, run, query, name)

    def _identify(self, node: Any) -> Any:
        """`identity` of a node that many cells share."""
        if id(node) not in self._identities:
            self._identities[id(node)] = node, identity(node)  # held, so that nothing else gets its id
        return self._identities[id(node)][1]

    # --- composing --------------------------------------------------------------------------------------------------

    def _put_together(self, parts: Sequence[tuple[str, ...]]) -> Composed:
        """The base with these overrides, each of which is the value on one axis."""
        base = self._compose(())
        clusters: list[tuple[set[str], tuple[str, ...]]] = []
        for overrides in parts:
            change = self._change(overrides)
            touched = set(change.nodes) | {f"choice of {group}" for group in change.choices}
            apart = []
            for keys, others in clusters:
                if base.whole or change.whole or keys & touched:
                    touched, overrides = touched | keys, others + overrides
                else:
                    apart.append((keys, others))
            clusters = [*apart, (touched, overrides)]
        changes = [self._change(overrides) for _, overrides in clusters]
        return Composed(
            {**base.nodes, **{key: node for change in changes for key, node in change.nodes.items()}},
            {**base.choices, **{group: option for change in changes for group, option in change.choices.items()}},
            next((change.name for change in changes if change.name != base.name), base.name),
            base.whole,
        )

    def _change(self, overrides: tuple[str, ...]) -> Composed:
        """What these overrides change of the base: whole root keys."""
        if overrides not in self._changes:
            base, other = self._compose(()), self._compose(overrides)
            nodes = {key: node for key, node in other.nodes.items() if node != base.nodes.get(key)}
            choices = {group: option for group, option in other.choices.items() if option != base.choices.get(group)}
            self._changes[overrides] = Composed(nodes, choices, other.name, other.whole)
        return self._changes[overrides]

    def _compose(self, overrides: tuple[str, ...]) -> Composed:
        if overrides not in self._compositions:
            apart = overrides and not self._compose(()).whole
            self._compositions[overrides] = (self._set(overrides) if apart else None) or self._by_hydra(overrides)
        return self._compositions[overrides]

    def _set(self, overrides: tuple[str, ...]) -> Composed | None:
        """The base with plain values set, such as ``seed=1``; None where an option is chosen, which Hydra does."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.override_parser.types import OverrideType

        base = self._compose(())
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        roots = {one.key_or_group.split(".")[0] for one in parsed}
        plain = all(
            one.type is OverrideType.CHANGE and not one.package and not one.is_sweep_override() for one in parsed
        )
        if not plain or not roots <= set(base.nodes) or any(one.key_or_group in base.choices for one in parsed):
            return None
        before = OmegaConf.create({key: base.nodes[key] for key in roots})
        config = OmegaConf.merge(OmegaConf.structured(Config), before)
        OmegaConf.set_struct(config, True)
        try:
            for one in parsed:
                OmegaConf.update(config, one.key_or_group, one.value(), merge=True)
        except OmegaConfBaseException:
            return None  # Hydra words it
        changed = OmegaConf.to_container(config, resolve=True)
        assert isinstance(changed, dict)
        return replace(base, nodes=base.nodes | {key: changed[key] for key in roots})

    @contextmanager
    def _composed_ahead(self) -> Iterator[None]:
        """Compose what will be asked of Hydra in other processes, while this one does something else."""
        base = self._compose(())
        values = {overrides for axis in self.values.values() for overrides in axis.values()} - self._compositions.keys()
        needed = [] if base.whole else [overrides for overrides in values if self._set(overrides) is None]
        if sys.platform != "linux" or len(needed) < FEW:
            yield
            return
        forks = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(len(needed), os.cpu_count() or 1), forks) as pool:
            composed = pool.map(self._by_hydra, needed)
            yield
            self._compositions.update(zip(needed, composed, strict=True))

    def _by_hydra(self, overrides: tuple[str, ...]) -> Composed:
        from hydra import compose

        config = compose("train", overrides=[*self.base, *overrides], return_hydra_config=True)
        known = list(Config.__dataclass_fields__)
        for key in config:
            if key not in known and key != "hydra":
                raise DistillError(f"no such key.{nearest(str(key), known)}", str(key))
        rest = OmegaConf.masked_copy(config, [key for key in known if key in config and key != "name"])
        unresolved = OmegaConf.to_container(rest, resolve=False)
        nodes = OmegaConf.to_container(rest, resolve=True)
        name = OmegaConf.to_container(OmegaConf.masked_copy(config, ["name"]), resolve=False)
        assert isinstance(nodes, dict)
        assert isinstance(name, dict)
        return Composed(
            {str(key): node for key, node in nodes.items()},
            {group: str(option) for group, option in config.hydra.runtime.choices.items()},
            name["name"],
            "${" in json.dumps(unresolved),
        )

    # --- what fits together -----------------------------------------------------------------------------------------

    def checked(self) -> list[Cell]:
        """The cells, each with the reason why its parts do not fit together, if they don't.

        Components are built and the data is loaded; no teacher is trained and nothing is asked.

        Raises:
            DistillError: A cell has a wrong option.
        """
        with self._composed_ahead():
            from distill.experiment import check

        reasons: dict[tuple[Any, ...], str] = {}
        found = []
        for cell in self.cells:
            groups = [group for group in QUERY_GROUPS + STUDENT_GROUPS if group not in (SEED, "budget")]
            limits = (limit is None for limit in cell.config["budget"].values())
            parts = (*(id(cell.config[group]) for group in groups), *limits)
            if parts not in reasons:
                try:
                    check(_Node.of(cell.config), cell.choices)
                    reasons[parts] = ""
                except Incompatible as error:
                    reasons[parts] = str(error)
                except DistillError as error:
                    where = ", ".join(f"{axis} {value}" for axis, value in cell.at.items())
                    raise DistillError(f"{error} (the cell of {cell.control or where})", "axes") from None
            found.append(replace(cell, reason=reasons[parts]))
        return found


class _Node(dict[str, Any]):
    """A configuration of plain values, read as one of Hydra's is; making thousands of those takes long."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> _Node:
        return cls({key: cls(node) if isinstance(node, dict) else node for key, node in config.items()})

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


def values_of(axis: str, spec: Any, folders: Sequence[Path] = (CONFIG_DIR,)) -> dict[str, tuple[str, ...]]:
    """The overrides of each value of an axis."""
    if isinstance(spec, (DictConfig, ListConfig)):
        spec = OmegaConf.to_container(spec, resolve=True)
    if isinstance(spec, str) and (found := re.fullmatch(r"glob\((.+)\)", spec)):
        known = options(axis, list(folders))
        spec = [option for option in known if fnmatch.fnmatch(option, found[1])]
        if not spec:
            raise DistillError(f"no option matches '{found[0]}'.{nearest(found[1], known)}", f"axes.{axis}")
    if isinstance(spec, Mapping):
        return {str(name): tuple(_listed(overrides)) for name, overrides in spec.items()}
    if isinstance(spec, list) and spec:
        return {_text(value): (f"{axis}={_text(value)}",) for value in spec}
    raise DistillError(f"a list of values or names with overrides, not {spec!r}", f"axes.{axis}")


def _listed(values: Any) -> list[str]:
    if isinstance(values, (list, tuple, ListConfig)):
        return [_text(value) for value in values]
    return [] if values is None else [_text(values)]


def _text(value: Any) -> str:
    """As an override spells it."""
    if value is None or isinstance(value, (bool, list, dict)):
        return json.dumps(value)
    return str(value)
