"""The page: what it says is what the numbers say, and it works in a real browser without a network."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from assets import need
from markupsafe import escape
from test_figures import DEFENSES, HOSTILE, RECOVERIES, leave_benchmark

from distill import figures, page, results, verdict
from distill.errors import DistillError
from distill.results import Comparison

PHONE = 360


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return results.compare([leave_benchmark(tmp_path_factory.mktemp("outputs"))])


@pytest.fixture(scope="module")
def written(made_up: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(made_up.frame.folder.iloc[0]).resolve().parent.parent / "page.html"
    page.write_page(made_up, path)
    return path


class Read(HTMLParser):
    """What a browser without JavaScript finds: links and sources, ids, and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_it_is_one_file_without_addresses(written: Path) -> None:
    text = written.read_text()
    read = Read(text)
    assert not [link for link in read.links if re.match(r"(https?:)?//", link)]
    assert not re.findall(r"url\((?!#|.?data:)|@import", text)
    assert len(read.ids) == len(set(read.ids)), "an id is there once"
    for link in read.links:
        if link.startswith("#"):
            assert link[1:] in read.ids
        elif not link.startswith("data:"):
            assert (written.parent / link).is_file(), f"{link} leads nowhere"
    assert sum(link.endswith("samples.jsonl") for link in read.links) == 27
    assert text.count("<h1") == 1


def test_the_same_runs_give_the_same_bytes(made_up: Comparison, written: Path) -> None:
    again = written.with_name("again.html")
    page.write_page(made_up, again)
    assert again.read_bytes() == written.read_bytes()


def test_text_of_others_is_escaped(written: Path) -> None:
    text = written.read_text()
    assert HOSTILE not in text
    assert "needs &lt;script&gt;alert(&#39;pbayes&#39;)&lt;/script&gt; &amp; a posterior" in text
    assert "<h1>A made-up benchmark &lt;i&gt;of&lt;/i&gt; tests</h1>" in text
    assert Read(text).tags.count("script") == 1, "the page's own"


def test_the_csv_of_a_figure_is_on_the_page(made_up: Comparison, written: Path) -> None:
    found = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)" download="(\w+).csv"', written.read_text())
    csv = {name: pd.read_csv(io.BytesIO(base64.b64decode(code))) for code, name in found}
    assert list(csv) == list(figures.FIGURES)
    _, data = figures.heat_map(made_up)
    assert list(csv["heat_map"]["mean"]) == pytest.approx(list(data["mean"]), rel=1e-3)


def test_every_run_is_there_with_its_config(made_up: Comparison, written: Path) -> None:
    text = written.read_text()
    for run in made_up.frame.run:
        assert f"<code>{run}</code>" in text
    told = page.everything(made_up, made_up, written.parent)
    assert len(told["rows"]) == len(DEFENSES) * len(RECOVERIES) + 1
    for row in told["rows"]:
        for run in row["runs"]:
            config = {**told["base"], **dict(row["config"]), **dict(run["config"])}
            folder = next(f for f, r in zip(made_up.frame.folder, made_up.frame.run, strict=True) if r == run["run"])
            for name, value in results.leaves(made_up.results[folder].config).items():
                assert config.get(name, results.UNKNOWN) == value


def test_the_headline_is_worded_from_the_numbers(made_up: Comparison) -> None:
    def said(comparison: Comparison) -> str:
        return " ".join(verdict.headline(comparison, verdict.judged(comparison)))

    text = said(made_up)
    assert text.startswith("<b>mad 0.5</b> holds best of those that keep their answers right.")
    assert "(top-1) the student’s agreement with the teacher is 0.75" in text
    assert "<b>mad 1.0</b> takes more from the student, and from honest users." in text
    assert "accuracy of the defended answers 0.5000 instead of 0.9500" in text
    assert "<b>mad 1.0</b> would have looked better than it is: 0.50" in text

    nothing = made_up.frame.assign(**{"fidelity/agreement": 0.9 + made_up.frame.seed / 100})
    nothing.loc[nothing.defense == "mad 0.5", "fidelity/agreement"] += 0.02 * (nothing.seed - 1) - 0.001
    assert said(replace(made_up, frame=nothing)).startswith("<b>No defense measurably holds.</b>")
    single = made_up.frame[made_up.frame.seed == 0]
    assert "one seed nobody can tell" in said(replace(made_up, frame=single))
    undefended = made_up.frame[made_up.frame.defense != "none"]
    assert "No run without a defense says what that is worth" in said(replace(made_up, frame=undefended))
    attacks = replace(made_up.judge, per="recovery", over=("defense",), baseline="as returned")
    assert "comes closest" in said(replace(made_up, judge=attacks))


def test_a_name_is_escaped_in_the_headline(made_up: Comparison) -> None:
    name = r"<b onclick=x>mad $\none$"
    frame = made_up.frame.replace({"defense": {"mad 0.5": name}})
    axes = {**made_up.axes, "defense": [name if v == "mad 0.5" else v for v in made_up.axes["defense"]]}
    hostile = replace(made_up, frame=frame, axes=axes)
    assert r"<b>&lt;b onclick=x&gt;mad $\none$</b> holds best" in verdict.headline(hostile, verdict.judged(hostile))[0]
    one = figures.Drawn("pareto", "t", "x", *figures.pareto_scatter(hostile))
    assert str(escape(name)) in (svg := page.shown(one)["svg"])
    assert name not in svg


def test_further_tables_say_what_statistics_say(made_up: Comparison) -> None:
    tables = {table["name"]: table for table in page.further(made_up, made_up)}
    assert list(tables) == ["equal", "budgets", "saved"]
    table = verdict.judged(made_up).set_index("defense")["mean"]
    equal = {row[0]: (row[1][1], row[2]) for row in tables["equal"]["rows"]}
    between = table["none"] + (table["mad 0.5"] - table["none"]) * 0.1 / 0.5
    assert equal["mad"] == (pytest.approx(between, abs=1e-3), "interpolated")
    assert equal["rounding"] == (pytest.approx(table["rounding"], abs=1e-3), "measured")
    area, queries = tables["budgets"]["rows"][0][2:]
    assert tables["budgets"]["rows"][0][:2] == ["none", "as returned"]
    assert area[1] == pytest.approx(0.8 * table["none"], abs=0.01), "a straight line from 0.6 to all of it"
    assert queries[1] == pytest.approx(100 * 2**0.5, rel=0.03), "0.9 of it is half of the way from 0.8 to all"
    assert tables["saved"]["rows"][0][0] == "none"
    assert tables["saved"]["rows"][0][4][0] == "at least 200", "true labels reach 0.71 only"


def test_a_budget_is_narrowed_to_the_largest(made_up: Comparison) -> None:
    small = made_up.frame.assign(queries="50", run="small " + made_up.frame.run)
    small["fidelity/agreement"] /= 2
    frame = pd.concat([small, made_up.frame.assign(queries="200")], ignore_index=True)
    axes = {**made_up.axes, "queries": ["50", "200"]}
    both = replace(made_up, frame=frame, axes=axes, judge=replace(made_up.judge, budget="queries"))
    narrowed, words = figures.narrowed(both)
    assert words == "queries 200"
    assert set(narrowed.frame.run) == set(made_up.frame.run), "controls too"
    assert verdict.headline(narrowed, verdict.judged(narrowed)) == verdict.headline(made_up, verdict.judged(made_up))
    ids = [row["id"] for row in page.everything(both, narrowed, Path("/"))["rows"]]
    assert len([name for name in ids if name]) == len(set(ids) - {""}) == len(DEFENSES) * len(RECOVERIES)


def test_a_missing_package_is_told(made_up: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DistillError, match=r"pip install 'distill-framework\[figures\]'"):
        page.write_page(made_up, tmp_path / "page.html")


def test_what_met_other_attackers_is_not_called_best(made_up: Comparison) -> None:
    frame = made_up.frame[(made_up.frame.defense != "mad 0.5") | (made_up.frame.recovery != "top-1")]
    planned = replace(made_up, frame=frame)
    found = replace(planned, benchmark=False)
    table = verdict.judged(found)
    assert not verdict.headline(found, table)
    assert "holds best" in verdict.headline(planned, table)[0], "a benchmark says what was not run"
    assert page.summary(planned, table)["uneven"]
    assert not page.summary(made_up, verdict.judged(made_up))["uneven"]
    assert verdict.headline(replace(made_up, benchmark=False), verdict.judged(made_up)), "these are even"


def test_a_single_run_has_a_page(made_up: Comparison, tmp_path: Path) -> None:
    page.write_page(results.compare([Path(made_up.frame.folder.iloc[0])]), tmp_path / "one.html")
    text = (tmp_path / "one.html").read_text()
    assert made_up.frame.run.iloc[0] in text
    assert "<svg" in text, "its budget curve"


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    need(chromium and driver, "the page is looked at in Chromium: apt-get install chromium chromium-driver")
    need(importlib.util.find_spec("selenium"), "the page is looked at by selenium: pip install selenium")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage"),
        *("disable-background-networking", "disable-component-update", "disable-sync", "disable-extensions"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_in_a_browser(browser: Any, written: Path) -> None:
    browser.get(written.as_uri())
    ask = browser.execute_script

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    urls = {request["request"]["url"] for request in asked if request["documentURL"] == written.as_uri()}
    assert {url for url in urls if not url.startswith("data:")} == {written.as_uri()}, "no request goes out"

    figures_seen = ask("return [...document.querySelectorAll('figure svg')].map(s => "
                       "[s.getBoundingClientRect().height, s.querySelectorAll('text').length, "
                       "s.querySelector('desc').textContent])")  # fmt: skip
    assert len(figures_seen) == 4
    assert all(height > 150 and texts > 5 and "numbers, from" in told for height, texts, told in figures_seen)

    ask("const all = document.querySelectorAll('#heat_map ~ figure svg a'); all[all.length - 1]"
        ".dispatchEvent(new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    browser.implicitly_wait(1)
    assert browser.find_element("css selector", ":target details[open]")
    assert ask("return document.querySelector(':target').innerText").split()[:2] == ["rounding", "top-1"]
    _sorts(browser, ask)
    _filters(ask)
    _runs_are_linked(ask)

    widths = {"width": PHONE, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", widths)
    assert ask("return [innerWidth, document.documentElement.scrollWidth]") == [PHONE, PHONE]
    ask("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert ask("return document.documentElement.scrollWidth") == PHONE

    colours = "const of = n => getComputedStyle(n); return [of(document.body).backgroundColor, \
of(document.querySelector('svg text')).fill]"
    light = ask(colours)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    dark = ask(colours)
    assert [sum(map(int, re.findall(r"\d+", colour)[:3])) > 380 for colour in light + dark] == [
        True,
        False,
        False,
        True,
    ]

    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def _sorts(browser: Any, ask: Any) -> None:
    """A click on a title, or Enter on it, orders the rows by that column, and a second one the other way round."""
    cells = "return [...document.querySelectorAll('#all tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    state = "return [...document.querySelectorAll('#all th[aria-sort]')].map(h => h.ariaSort)"
    click = "document.querySelectorAll('#all thead th')[arguments[0]].querySelector('button').click()"
    titles = ask("return [...document.querySelectorAll('#all thead th')].map(h => h.textContent)")
    column = titles.index("agreement with the teacher")
    before = ask(cells, column)
    numbers = [float(cell.split()[0]) for cell in before]
    assert numbers != sorted(numbers)
    ask(click, column)
    assert [float(cell.split()[0]) for cell in ask(cells, column)] == sorted(numbers)
    assert ask(state)[column] == "ascending"
    ask(click, column)
    assert [float(cell.split()[0]) for cell in ask(cells, column)] == sorted(numbers, reverse=True)
    assert ask(state) == ["descending" if i == column else "none" for i in range(len(titles))]
    browser.find_element("css selector", "#all thead button").send_keys("\ue007")  # Enter
    names = ask(cells, 0)
    assert names == sorted(names, key=str.lower), "the keyboard does it too"


def _filters(ask: Any) -> None:
    seen = "return [...document.querySelectorAll('#all tbody tr')].filter(r => r.offsetHeight).map(r => r.textContent)"
    use = "const c = document.querySelector(arguments[0]); c.value = arguments[1]; c.dispatchEvent(new Event('input'))"
    everything = len(ask(seen))
    assert everything == len(DEFENSES) * len(RECOVERIES) + 1
    ask(use, ".filters select", "rounding")
    assert len(ask(seen)) == len(RECOVERIES)
    ask(use, ".filters input", "TOP-1")
    assert len(ask(seen)) == 1
    assert ask("return document.querySelector('.filters output').textContent") == f"1 of {everything} arms"
    ask(use, ".filters select", "")
    ask(use, ".filters input", "")
    assert len(ask(seen)) == everything


def _runs_are_linked(ask: Any) -> None:
    links = ask("const d = document.querySelector('#all tbody details'); d.open = true; "
                "return [...d.querySelectorAll('a')].map(a => [a.textContent, a.getClientRects().length])")  # fmt: skip
    assert [name for name, _ in links] == ["result", "samples", "metrics"] * 3
    assert all(shown for _, shown in links)
