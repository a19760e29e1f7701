"""What experiments state of themselves, against what finished runs measured.

In the header of `configs/experiment/<name>.yaml`:

    # reproduced: defense=mad recovery=top1 · accuracy/student 0.784 ± 0.004 (seeds 0, 1, 2; n = 10,000)
    # reported: accuracy/student 0.698 (table 3)

First what is set besides the experiment, if anything; then one of the headline numbers, its value, and the interval
within which the mean over these seeds has to lie; in parentheses what a reader wants to know. Without an interval (as
of numbers that a paper reports of other data) the difference is told and nothing is demanded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distill import statistics
from distill.config import CONFIG_DIR, QUERY_GROUPS, STUDENT_GROUPS
from distill.errors import DistillError, nearest
from distill.records import Result
from distill.results import MANIFEST, MEASURING, UNKNOWN, compare, leaves, load_runs, numbers
from distill.tables import Table, with_interval

OUTSIDE, NOT_RUN = 1, 3  # exit codes; 2 is that of an error
LINE = re.compile(
    r"# (?P<kind>reproduced|reported): (?:(?P<overrides>\S.*?) · )?(?P<metric>\w+/\w+) (?P<value>-?[\d.]+)"
    r"(?: ± (?P<half>[\d.]+))?(?: \((?P<note>.*)\))?"
)


@dataclass(frozen=True)
class Stated:
    """One stated value. `half`: of the interval's width; None where there is none. `seeds`: None for any."""

    experiment: str
    kind: str
    overrides: tuple[str, ...]
    metric: str
    value: float
    half: float | None
    seeds: tuple[int, ...] | None


def stated(path: Path) -> list[Stated]:
    """The values in an experiment's header. Raises `DistillError` for a line that begins like one and can't be read."""
    found = []
    for line in path.read_text().splitlines():
        if not line.startswith(("# reproduced:", "# reported:")):
            continue
        if (parts := LINE.fullmatch(line.rstrip())) is None:
            raise DistillError(
                f"can't read '{line}'; such a line goes '# reproduced: defense=mad · accuracy/student 0.784 ± 0.004 "
                "(seeds 0, 1, 2; n = 10,000)'",
                f"experiment/{path.stem}",
            )
        seeds = re.search(r"seeds? (\d+(?:, \d+)*)", parts["note"] or "")
        found.append(
            Stated(
                *(path.stem, parts["kind"], tuple((parts["overrides"] or "").split()), parts["metric"]),
                value=float(parts["value"]),
                half=None if parts["half"] is None else float(parts["half"]),
                seeds=None if seeds is None else tuple(map(int, seeds[1].split(", "))),
            )
        )
    return found


def check(places: Sequence[Path], experiments: Sequence[str]) -> tuple[Table, int]:
    """Compare all stated values, or those of some experiments, with the runs at these places.

    Returns:
        The table, and the exit code: 0, `OUTSIDE` if a mean is outside of its interval, else `NOT_RUN` if of some value
        there is no run with one of its seeds.

    Raises:
        DistillError: An experiment does not exist or states nothing, or a line can't be read.
    """
    files = {path.stem: path for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml"))}
    for name in experiments:
        if name not in files:
            raise DistillError(f"no experiment '{name}'.{nearest(name, files)}", "report")
    found = [one for name in experiments or files for one in stated(files[name])]
    if not found:
        raise DistillError(f"{', '.join(experiments) or 'no experiment'} states no values", "report")
    results = _finished(places)
    options = [_student(leaves(result.config)) for result in results]
    rows, codes = [], {0}
    for one in found:
        wanted = _student(leaves(_composed(one.experiment, one.overrides)))
        measured = {
            result.seed: _number(one, result)
            for result, own in zip(results, options, strict=True)
            if (one.seeds is None or result.seed in one.seeds) and _same(own, wanted)
        }
        mean, verdict, code = _judged(one, [*measured.values()])
        codes.add(code)
        interval = with_interval(one.value, one.value - one.half, one.value + one.half) if one.half else ""
        what = [one.experiment, " ".join(one.overrides) or "–", one.metric, one.kind, interval or f"{one.value:g}"]
        rows.append([*what, mean, ", ".join(map(str, sorted(measured))) or "–", verdict])
    columns = ["experiment", "with", "metric", "is", "stated", "measured", "seeds", ""]
    code = OUTSIDE if OUTSIDE in codes else max(codes)
    return Table("", columns, rows, 4, ["Measured: the mean over seeds ± half of the 95 % interval"]), code


def _number(one: Stated, result: Result) -> float:
    measured = numbers(result)
    if one.metric not in measured:
        hint = nearest(one.metric, measured)
        raise DistillError(f"{result.run_id} has no '{one.metric}'.{hint}", f"experiment/{one.experiment}")
    return measured[one.metric]


def _judged(one: Stated, values: list[float]) -> tuple[str, str, int]:
    """What was measured, how it compares, and the exit code."""
    if not values:
        return "–", "not run", NOT_RUN if one.half is not None else 0
    reached = statistics.estimate(values)
    text = with_interval(reached.mean, reached.low, reached.high, one.metric)
    if one.half is None:
        return text, f"{reached.mean - one.value:+.3f}", 0
    within = abs(reached.mean - one.value) <= one.half
    return text, "within" if within else "outside", 0 if within else OUTSIDE


def _same(own: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether a run had these options. One that is younger than the run had its default then, or
    `distill.config.IDENTITY_SCHEMA` would have been raised."""
    if any(value != wanted.get(name, UNKNOWN) for name, value in own.items()):
        return False
    return all(name in own or name.rpartition(".")[0] not in own for name in wanted)


def _finished(places: Sequence[Path]) -> list[Result]:
    """Runs, and what benchmarks have published."""
    found = list(load_runs(places).values())
    for place in places:
        for manifest in sorted(place.glob(f"*/{MANIFEST}")):
            found += compare([manifest.parent]).results.values()
    return found


@cache
def _composed(experiment: str, overrides: tuple[str, ...]) -> Any:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=[f"+experiment={experiment}", *overrides])
    return OmegaConf.to_container(OmegaConf.masked_copy(config, [*QUERY_GROUPS, *STUDENT_GROUPS]), resolve=True)


def _student(options: dict[str, str]) -> dict[str, str]:
    """Those options that a student depends on, but the seed."""
    return {name: value for name, value in options.items() if name.partition(".")[0] not in (*MEASURING, "seed")}
