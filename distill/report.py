"""Tables, pages and checks of finished runs, read from their files.

python -m distill.report                                  every run under outputs/
python -m distill.report outputs/*-vs-mad seed=0,1        these folders, and of the runs there those with these seeds
python -m distill.report defense.beta=0.9 --markdown      an option; as Markdown, on standard output
python -m distill.report results/NAME --html page.html    a benchmark, as a page
python -m distill.report --check quickstart               against the values that its experiment states
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from itertools import takewhile
from pathlib import Path

import pandas as pd
from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table

from distill import tables
from distill.errors import DistillError, nearest
from distill.launch import SWEEP_FILE, one_line_errors, write_atomically
from distill.records import Result, TransferSet
from distill.results import Comparison, compare, curves, numbers

log = logging.getLogger(__name__)

OUTPUTS, RESULTS = Path("outputs"), Path("results")

# What a defense costs honest users: title and name in `Result.utility`.
COSTS = {
    "accuracy lost": "accuracy_lost",
    "L1 mean": "l1_mean",
    "max": "l1_max",
    "KL": "kl",
    "ECE": "ece",
    "NLL": "nll",
    "OOD AUROC": "ood_auroc",
}


# --- on the terminal ------------------------------------------------------------------------------------------------


def show(comparison: Comparison, single: bool = False) -> None:
    """Print the tables of a comparison, and what to be wary of."""
    console = _console()
    for table in _tables(comparison, single):
        console.print(*table.rich(console.width))
    for sentence in _headline(comparison):
        console.print(sentence.striptags(), soft_wrap=True)
    for warning in _warnings(comparison):
        console.print(f"note: {warning}", soft_wrap=True)


def _tables(comparison: Comparison, single: bool) -> list[tables.Table]:
    """A benchmark is judged; of other runs nobody has said what is compared with what."""
    if single or not comparison.benchmark:
        return [tables.runs(comparison, single)]
    from distill.figures import narrowed
    from distill.page import further

    found = tables.judged(comparison)
    for table in further(comparison, narrowed(comparison)[0]):  # cells are names, or numbers as text and as value
        rows = [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in table["rows"]]
        labels = len([*takewhile(lambda cell: isinstance(cell, str), table["rows"][0])])
        found.append(tables.Table(table["title"], table["columns"], rows, labels, [table["text"]]))
    return found


def _headline(comparison: Comparison) -> list[Markup]:
    """What a benchmark comes to, in a few sentences."""
    if not comparison.benchmark:
        return []
    from distill.figures import narrowed
    from distill.verdict import headline, judged

    at_last = narrowed(comparison)[0]
    return headline(at_last, judged(at_last))


def _warnings(comparison: Comparison) -> list[str]:
    """What to be wary of in a judged table."""
    if not comparison.benchmark:
        return []
    from distill.checks import warnings

    return [str(one) for one in warnings(comparison.frame, comparison.judge, curves(comparison))]


def show_runs(places: list[Path]) -> None:
    """Print the comparing table of the finished runs at or below these folders, one row a run."""
    show(compare(places), single=True)


def show_result(run_dir: Path) -> None:
    """Print the small table at the end of a run, where it lies and what to try next."""
    result = Result.load(run_dir / "result.json")
    measured = numbers(result)
    title = f"{result.choices['attack']} vs {result.choices['defense']} on {result.choices['data']}"
    if SWEEP_FILE in os.environ:  # a sweep ends with one table for all
        agreement = tables.plain(measured.get("fidelity/agreement"), "fidelity/agreement")
        log.info("%s: agreement %s (%s)", title, agreement, _short(run_dir))
        return
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, column in tables.NUMBERS.items():
        if column in measured:
            table.add_row(name, tables.plain(measured[column], column))
    table.add_row("teacher forwards", f"{result.cost['teacher_forwards']:,}")
    for who, size in result.sizes.items():
        if size["parameters"] is not None:
            table.add_row(f"{who} parameters", f"{size['parameters']:,}")
    table.add_row("seconds", f"{result.cost['seconds']:.1f}")
    console = _console()
    console.print(f"\n{title}")
    console.print(table)
    if result.utility.get("l1_max"):
        costs = [f"{title} {result.utility[name]:.4f}" for title, name in COSTS.items() if name in result.utility]
        if "latency_s" in result.utility:
            costs.append(f"{1000 * result.utility['latency_s']:.3f} ms later")
        console.print(f"honest users get: {', '.join(costs)}", soft_wrap=True)
    for flag in result.flags:
        console.print(f"note: {flag}", soft_wrap=True)
    console.print(f"n = {result.test_rows} test rows, seed {result.seed}; run: {_short(run_dir)}", soft_wrap=True)
    if (experiment := result.choices.get("experiment", "None")) != "None":
        others = "defense=none,rounding,gaussian_noise,label_only"
        if not result.classes:
            others = "budget.queries=250,1000,4000"
        console.print(f"next: python -m distill.train +experiment={experiment} -m {others}", soft_wrap=True)


def show_query(folder: Path, transfer_set: TransferSet, cost: dict[str, float]) -> None:
    """Print what a query stage left and what it cost."""
    _console().print(
        f"{len(transfer_set):,} answers (reveals: {transfer_set.profile}) for {cost['usd']:.2f} usd, "
        f"{cost['teacher_forwards']:,} teacher forwards: {_short(folder / 'transfer_set')}",
        soft_wrap=True,
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _console() -> Console:
    """Piped into a file or a notebook, whatever these say of colours, a table is plain and not folded to 80 columns."""
    terminal = sys.stdout.isatty()
    width = None if terminal else 240
    return Console(
        highlight=False, markup=False, emoji=False, force_terminal=terminal, no_color=not terminal, width=width
    )


# --- into files -----------------------------------------------------------------------------------------------------


def _file(name: str) -> Path:
    """Raises `DistillError` where no file of that name can be."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise DistillError(f"{path} is no place for a file; a FILTER goes before the options", "report")
    return path


def _write(text: str, name: str) -> None:
    """To a file, or with "-" to standard output."""
    if name == "-":
        sys.stdout.write(text)
    else:
        write_atomically(_file(name), text)


def markdown(comparison: Comparison, single: bool = False) -> str:
    """All tables, and the warnings as a list."""
    parts = [f"# {comparison.title}", *_sentences(comparison)]
    parts += [table.markdown() for table in _tables(comparison, single)]
    if warnings := _warnings(comparison):
        parts.append("\n".join(f"- {warning}" for warning in warnings))
    return "\n\n".join([*parts, made(comparison)]) + "\n"


def _sentences(comparison: Comparison) -> list[str]:
    """The headline in Markdown."""
    return [sentence.replace("<b>", "**").replace("</b>", "**") for sentence in map(str, _headline(comparison))]


def latex(comparison: Comparison, single: bool = False) -> str:
    """All tables as floats; they need ``\\usepackage{booktabs}``."""
    return "\n\n".join(table.latex() for table in _tables(comparison, single)) + "\n"


def made(comparison: Comparison) -> str:
    """One line on where the numbers are from."""
    of = comparison.made
    commit = ", ".join(f"`{name[:12]}`" for name in of["commit"].split(", "))
    dirty = " with uncommitted changes" if of["dirty"] else ""
    return f"<sub>commit {commit}{dirty} · {of['hardware']} · {of['date']}</sub>"


def tidy(comparison: Comparison) -> pd.DataFrame:
    """The frame for other programs: one row a run, one value a cell."""
    frame = comparison.frame
    return frame.assign(flags=frame["flags"].map("; ".join))


MARKERS = re.compile(r"(<!-- benchmark: (\S+)(?: (\S+))? -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def update_readme(path: Path) -> list[str]:
    """Make what stands between ``<!-- benchmark: NAME [FIGURE] -->`` and ``<!-- /benchmark -->`` anew from
    results/NAME beside it: what it comes to, the figure (drawn into that folder), the table, and where all is from.

    Returns:
        The names of the benchmarks.

    Raises:
        DistillError: There are no such marks, no such benchmark, or no such figure.
    """
    from distill import figures

    def block(found: re.Match[str]) -> str:
        start, name, wanted, end = found.groups()
        folder = path.parent / RESULTS / name
        comparison = compare([folder])
        drawn = [file.stem for file in figures.export(comparison, folder) if file.suffix == ".svg"]
        if wanted and wanted not in drawn:
            raise DistillError(f"{name} has no figure '{wanted}'.{nearest(wanted, drawn)}", "report")
        parts = _sentences(comparison)
        for figure in [wanted] if wanted else drawn[:1]:
            parts.append(f"![{comparison.title}]({(RESULTS / name).as_posix()}/{figure}.svg)")
        parts += [tables.headline(comparison).markdown(), made(comparison)]
        return start + "\n" + "\n\n".join(parts) + "\n\n" + end

    text = path.read_text()
    names = [name for _, name, _, _ in MARKERS.findall(text)]
    if not names:
        raise DistillError(f"{path} has no <!-- benchmark: NAME --> … <!-- /benchmark -->", "report")
    write_atomically(path, MARKERS.sub(block, text))
    return names


# --- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m distill.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("filters", nargs="*", metavar="FILTER", help="a folder (outputs/ by default), or key=value[,value] to keep: an "
        "axis, a group's choice, seed, or an option such as defense.beta")  # fmt: skip
    add("--runs", action="store_true", help="one row a run, in place of one for all seeds of an arm")
    add("--markdown", nargs="?", const="-", metavar="PATH", help="the tables in Markdown")
    add("--latex", nargs="?", const="-", metavar="PATH", help="the tables in LaTeX (booktabs)")
    add("--csv", metavar="PATH", help="one line a run, all numbers")
    add("--parquet", metavar="PATH", help="the same, typed")
    add("--html", metavar="PATH", help="one self-contained page: tables and figures")
    add("--readme", nargs="?", const="README.md", metavar="PATH", help="renew the tables between the benchmark marks")
    add("--check", nargs="*", metavar="EXPERIMENT", help="compare with the values that experiments state: exits with "
        "1 if one is outside of its interval, else with 3 if one was not run")  # fmt: skip
    add("--tracker", metavar="NAME", help="send finished runs and their summary to a tracker")
    add("--wandb", action="store_const", const="wandb", dest="tracker", help="the same as --tracker wandb")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with one_line_errors():
        sys.exit(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    console, (places, where) = _console(), _filters(arguments.filters)
    if where and (arguments.readme or arguments.check is not None):
        raise DistillError(f"--readme and --check compare what they name; leave out {' '.join(where)}", "report")
    if arguments.readme:
        names = update_readme(_file(arguments.readme))
        console.print(f"{arguments.readme}: {', '.join(names)}")
        return 0
    if arguments.check is not None:
        from distill.stated import check

        table, code = check(places or [OUTPUTS, RESULTS], arguments.check)
        console.print(*table.rich(console.width))
        return code
    comparison, single = compare(places or [OUTPUTS], where), arguments.runs
    if arguments.markdown:
        _write(markdown(comparison, single), arguments.markdown)
    if arguments.latex:
        _write(latex(comparison, single), arguments.latex)
    if arguments.csv:
        _write(tidy(comparison).to_csv(index=False), arguments.csv)
    if arguments.parquet:
        tidy(comparison).to_parquet(_file(arguments.parquet), index=False)
    if arguments.html:
        from distill.page import write_page

        write_page(comparison, _file(arguments.html))
    if arguments.tracker:
        from distill.trackers.push import push

        pushed = push(comparison, tracker=arguments.tracker)
        console.print(str(pushed), soft_wrap=True)
        if pushed.failed:
            return 1
    if not any(vars(arguments)[name] for name in ("markdown", "latex", "csv", "parquet", "html", "tracker")):
        show(comparison, single)
    return 0


def _filters(words: list[str]) -> tuple[list[Path], dict[str, list[str]]]:
    """Folders, and what the runs there have to match."""
    places, where = [], {}
    for word in words:
        key, equals, values = word.partition("=")
        if equals and not Path(word).exists():
            where[key] = values.split(",")
        else:
            places.append(Path(word))
    return places, where


if __name__ == "__main__":
    main()
