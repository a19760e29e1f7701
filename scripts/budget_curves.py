"""Draw fidelity and accuracy against queries, for every attack and control among some finished runs.

    python scripts/budget_curves.py outputs curves.svg [--track B]

A line is the mean over the seeds of one attack, its band one standard deviation; controls are dashed. The numbers that
were drawn are written beside it, as curves.csv. Needs matplotlib (`pip install -e '.[figures]'`).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from distill.records import Result
from distill.results import asked, load_runs

METRICS = {"fidelity/agreement": "agreement with the teacher", "student/accuracy": "accuracy"}
CONTROLS = ("ground_truth_labels", "weaker_model_labels", "self_taught", "random_labels", "no_teacher")
# Told apart by all kinds of colour-blindness (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "os^Dv<>"


def label(result: Result) -> str:
    """The attack, with its strategy and the attack inside of it."""
    node = result.config["attack"]
    words = [result.choices["attack"]]
    if "strategy" in node:
        words.append(node["strategy"])
    if "attack" in node:
        words.append(f"({node['attack']['_target_'].rpartition('.')[0].rpartition('.')[2]})")
    return " ".join(words)


def points(result: Result, track: str) -> list[dict[str, Any]]:
    """The rows of one run's curve, by queries. An attack without a student of its own has track A's."""
    if track == "B" and result.tracks["B"]["own"]:
        return result.tracks["B"]["curve"]
    return [*result.curve, {"cost/queries": asked(result), **result.tracks["A"]}]


def summary(results: list[Result], track: str) -> list[dict[str, Any]]:
    """One row for each attack and number of queries: mean, standard deviation and n of the seeds, for each metric."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        for point in points(result, track):
            found[label(result), int(point["cost/queries"])][result.seed] = point
    rows = []
    for (attack, queries), seeds in sorted(found.items()):
        row: dict[str, Any] = {"attack": attack, "queries": queries, "seeds": " ".join(map(str, sorted(seeds)))}
        for metric in METRICS:
            values = [point[metric] for point in seeds.values()]
            row[metric] = float(np.mean(values))
            row[f"{metric} sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Both metrics side by side, queries on a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(6 * len(METRICS), 4.5), layout="constrained")
    attacks = sorted({row["attack"] for row in rows}, key=lambda attack: (attack.split()[0] in CONTROLS, attack))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for i, attack in enumerate(attacks):
            of = [row for row in rows if row["attack"] == attack]
            queries, means = [row["queries"] for row in of], np.array([row[metric] for row in of])
            spread = np.array([row[f"{metric} sd"] or 0 for row in of])
            dashed = attack.split()[0] in CONTROLS
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i // len(COLOURS) % len(MARKS)]
            axis.plot(queries, means, "--" if dashed else "-", color=colour, marker=mark, markersize=4, label=attack)
            axis.fill_between(queries, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set(xscale="log", xlabel="queries", ylabel=title)
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path, help="an .svg; the .csv lies beside it")
    parser.add_argument("--track", choices=("A", "B"), default="A")
    arguments = parser.parse_args()
    results = [result for result in load_runs([arguments.folder]).values() if result.tracks]
    if not results:
        parser.error(f"{arguments.folder} holds no finished run with tracks")
    rows = summary(results, arguments.track)
    kinds = sorted({json.dumps([r.choices["data"], r.choices["defense"], r.test_rows]) for r in results})
    if len(kinds) > 1:
        parser.error(f"these runs are of several kinds ({'; '.join(kinds)}); draw one after the other")
    data, defense, n = json.loads(kinds[0])
    draw(
        rows,
        f"{data}, defense: {defense}; track {arguments.track}; n = {n} test rows; seeds and sd: see the csv",
        arguments.picture,
    )
    with arguments.picture.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(results)} runs: {arguments.picture}")


if __name__ == "__main__":
    main()
