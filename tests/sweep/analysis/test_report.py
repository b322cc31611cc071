"""The report: valid, self-contained, safe, and true to the ledger."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree.ElementTree import Element

import html5lib
import pytest

from sweep.analysis import report
from sweep.analysis.report import duration, render, write
from sweep.ledger.ledger import Ledger
from sweep.planning import estimates
from sweep.planning.plan import plan
from sweep.sweepfile.expansion import load
from sweep.sweepfile.trials import Point
from tests.browser import barriers
from tests.support import failure_row, trial_row

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = "<script>alert('x')</script> & \"'"
TEXT = """\
sweep: pages
description: >-
  <script>alert('x')</script> & "'
trial: {backbone: {name: gpt2, size: tiny}, steps: 40}
axes:
  pretraining: [language, random]
  task: [bit-xor, {label: "<script>alert('x')</script> & \\"'", name: bit-memory}]
  learning_rate: [0.001]
  seed: [0, 1, 2]
table: {rows: pretraining, columns: task, title: "<b>bold</b>"}
claims:
  - {that: language > random, axis: pretraining, per: task}
"""


def accuracy(point: Point) -> float:
    better = 0.2 if point.config.pretraining == "language" else 0.0
    return 0.6 + better + 0.01 * point.config.seed + 0.003 * (point.config.task.name == "bit-xor")


def fill(folder: Path, text: str = TEXT) -> tuple[Path, Path]:
    """A sweep with its ledger: all trials but two done, one of them failed."""
    file, results = folder / "pages.yaml", folder / "results"
    file.write_text(text)
    points = load(file).points
    ledger = Ledger(results, write=True)
    planned = plan(file, ledger)
    estimates.keep(estimates.quote(planned, ledger), planned, ledger)
    for point in points[:-2]:
        records = [
            {
                "step": step,
                "split": "validation",
                "loss": 1.0,
                "accuracy": accuracy(point) * step / 40,
                "seconds": 1.0,
                "examples": step,
            }
            for step in range(0, 41, 5)
        ]
        ledger.append_curve(point.trial_id, "a1", 0, records)
        ledger.commit(trial_row(point, test_accuracy=accuracy(point), git_commit="c" * 40))
    ledger.fail(failure_row(points[-1], message=EVIL))
    return file, results


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A sweep file, its results, and the page on them."""
    file, results = fill(tmp_path_factory.mktemp("report"))
    return file, results, render(load(file), Ledger(results))


def parsed(page: str) -> Element:
    """The page as the HTML standard reads it; a mistake in it is an error."""
    parser = html5lib.HTMLParser(namespaceHTMLElements=False)
    tree: Element = parser.parse(page)
    assert parser.errors == []
    return tree


def texts(element: Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def tags(tree: Element, *names: str) -> Iterator[Element]:
    """The elements of these names, in order, SVG's too."""
    return (one for one in tree.iter() if str(one.tag).rpartition("}")[2] in names)


def by_id(tree: Element) -> dict[str, Element]:
    found = [one for one in tree.iter() if one.get("id") is not None]
    ids = {str(one.get("id")): one for one in found}
    assert len(ids) == len(found), "an id is given twice"
    return ids


def test_the_page_needs_nothing_from_anywhere(made: tuple[Path, Path, str]) -> None:
    tree = parsed(made[2])
    linked = {
        value
        for one in tree.iter()
        for name, value in one.items()
        if str(name).rpartition("}")[2] in ("src", "href", "data", "action", "srcset", "poster")
    }
    styled = [value for one in tree.iter() for name, value in one.items() if "url(" in value]
    css = "".join(one.text or "" for one in tags(tree, "style"))

    assert linked
    assert {link[0] for link in linked} == {"#"}
    assert list(tags(tree, "script", "link", "iframe", "object", "embed", "img", "base")) == []
    assert all(re.fullmatch(r"url\(#[\w-]+\)", value) for value in styled)
    assert "@import" not in css
    assert "url(" not in css


def test_every_link_leads_somewhere(made: tuple[Path, Path, str]) -> None:
    tree = parsed(made[2])
    ids = by_id(tree)
    hrefs = [value for one in tree.iter() for n, value in one.items() if str(n).endswith("href")]
    used = re.findall(r"url\(#([\w-]+)\)", made[2])

    assert {href[1:] for href in hrefs} <= ids.keys()
    assert set(used) <= ids.keys()


def test_each_number_of_the_table_is_a_link_to_the_trials_that_it_is_the_mean_of(
    made: tuple[Path, Path, str],
) -> None:
    tree = parsed(made[2])
    points = load(made[0]).points
    table = next(tags(by_id(tree)["table"], "table"))
    groups = {head.get("id"): body for body in tags(tree, "tbody") for head in tags(body, "th")}

    lines = [row for row in tags(table, "tr") if row.get("class") == "ours"]
    assert [texts(next(tags(line, "th"))) for line in lines] == ["language", "random"]
    for line, pretraining in zip(lines, ("language", "random"), strict=True):
        for cell, task in zip(tags(line, "td"), ("bit-xor", "bit-memory"), strict=True):
            (link,) = tags(cell, "a")
            rows = [row for row in tags(groups[str(link.get("href"))[1:]], "tr") if row.get("id")]
            expected = [
                point
                for point in points
                if (point.config.pretraining, point.config.task.name) == (pretraining, task)
            ]
            assert [row.get("id") for row in rows] == [f"trial-{p.trial_id}" for p in expected]
            listed = [texts(list(tags(row, "td"))[2]) for row in rows]
            done = [float(value) for value in listed if value]
            assert done == [round(100 * accuracy(p), 2) for p in expected[: len(done)]]
            assert texts(link).startswith(f"{statistics.fmean(done):.1f}")


def test_claims_lead_to_their_pairs(made: tuple[Path, Path, str]) -> None:
    tree = parsed(made[2])
    links = list(tags(by_id(tree)["claims"], "a"))
    behind = texts(by_id(tree)["claim-1"])
    pairs = [
        (one.trial_id, other.trial_id)
        for one, other in zip(load(made[0]).points[:3], load(made[0]).points[6:9], strict=True)
    ]

    assert "#claim-1" in [link.get("href") for link in links]
    assert "supported" in texts(by_id(tree)["claims"])
    assert all(f"{one} against {other}" in behind for one, other in pairs)


def test_what_anybody_wrote_is_text(made: tuple[Path, Path, str]) -> None:
    tree = parsed(made[2])
    ids = by_id(tree)

    assert "<script" not in made[2]
    assert texts(next(tags(tree, "header"))).count(EVIL) == 1
    assert EVIL in texts(ids["asked"])
    assert EVIL in texts(ids["table"])
    assert EVIL in texts(ids["failures"])
    assert EVIL in texts(ids["figure-curves"])
    assert list(tags(ids["table"], "b")) == []


def test_it_reads_well_without_eyes(made: tuple[Path, Path, str]) -> None:
    tree = parsed(made[2])
    levels = [int(str(one.tag)[1]) for one in tags(tree, "h1", "h2", "h3", "h4")]
    drawings = list(tags(tree, "svg"))

    assert tree.get("lang") == "en"
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    assert all(one.get("scope") in ("col", "row", "rowgroup") for one in tags(tree, "th"))
    assert all(any(True for _ in tags(table, "caption")) for table in tags(tree, "table"))
    assert len(drawings) >= 2
    for drawing in drawings:
        assert drawing.get("role") == "img"
        named = [by_id(tree)[name] for name in str(drawing.get("aria-labelledby")).split()]
        assert all(texts(one) for one in named)
    for region in tree.iter():
        if region.get("tabindex") is not None:
            assert region.get("role") == "region"
            assert region.get("aria-label")


def test_the_same_ledger_gives_the_same_bytes(
    made: tuple[Path, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made[1], tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["elsewhere"])

    assert render(load(made[0]), Ledger(tmp_path / "results")) == made[2]


def test_it_tells_failures_cost_and_provenance(made: tuple[Path, Path, str]) -> None:
    ids = by_id(parsed(made[2]))

    assert "code OverflowError 1 1 1" in texts(ids["failures"])
    assert "of 10 trials" in texts(ids["cost"])
    assert "1 of them failed" in texts(ids["cost"])
    # A row of `tests.support` took 1.5 s.
    assert re.search(
        r"quoted and true \S+ \S+, 15 s core time of the 10 trials", texts(ids["cost"])
    )
    assert "still to come, estimated" in texts(ids["cost"])
    assert f"commit {'c' * 40} (10)" in texts(ids["provenance"])
    assert "10 of 12 trials have ended" in made[2]


def test_an_empty_ledger_has_a_report(tmp_path: Path) -> None:
    file = tmp_path / "pages.yaml"
    file.write_text(TEXT)
    tree = parsed(render(load(file), Ledger(tmp_path / "results")))

    assert "0 of 12 trials have ended" in texts(tree)
    assert "No trial has ended yet" in texts(by_id(tree)["provenance"])
    assert "No attempt has failed" in texts(by_id(tree)["failures"])
    assert list(tags(tree, "svg")) == []


def test_a_sweep_without_table_and_claims_has_a_report(tmp_path: Path) -> None:
    text = (
        "sweep: plain\ntrial: {task: bit-xor, pretraining: random, steps: 5}\naxes: {seed: [0]}\n"
    )
    file, results = tmp_path / "plain.yaml", tmp_path / "results"
    file.write_text(text)
    (point,) = load(file).points
    Ledger(results, write=True).commit(trial_row(point, outcome="diverged", test_accuracy=None))
    tree = parsed(render(load(file), Ledger(results)))

    assert "asks for no table" in texts(tree)
    assert f"trial-{point.trial_id}" in by_id(tree)
    assert "1 diverged" in texts(tree)


def test_what_is_too_much_for_a_page_is_counted(
    made: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LISTED", 4)
    monkeypatch.setattr(report, "LINES", 1)
    monkeypatch.setattr(report, "GROUPS", 3)
    tree = parsed(render(load(made[0]), Ledger(made[1])))
    ids = by_id(tree)
    hrefs = [value for one in tree.iter() for n, value in one.items() if str(n).endswith("href")]

    assert sum(name.startswith("trial-") for name in ids) == 4
    assert "8 of 12 trials are not listed here" in texts(ids["trials"])
    assert "more lines are left out" in texts(ids["table"])
    assert {href[1:] for href in hrefs} <= ids.keys()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (5400, "1.5 h"), (3.6e6, "1,000.0 h")],
)
def test_times_are_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_commands_write_page_and_figures_and_load_nothing_heavy(
    made: tuple[Path, Path, str], tmp_path: Path
) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom sweep.cli import app\n"
        "file, results, place = sys.argv[1:]\n"
        "run = lambda *argv: CliRunner().invoke(app, [*argv, '--results', results])\n"
        "page = run('report', file, '-o', place + '/page.html')\n"
        "assert page.exit_code == 0, page.output\n"
        "drawn = run('figures', file, '-o', place, '--only', 'curves', '--only', 'depth')\n"
        "assert drawn.exit_code == 0, drawn.output\n"
        "assert 'not drawn: depth: no two cells differ' in drawn.stderr, drawn.stderr\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made[0]), str(made[1]), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "page.html", "pages-curves.pdf", "pages-curves.png", "pages-curves.svg"
    ]  # fmt: skip
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"sweep run {made[0]} --results {made[1]}<" in page
    parsed(page)


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a wide table, long words and a long id."""
    folder = tmp_path_factory.mktemp("wide")
    bits = ", ".join(
        f"{{label: xor-{n}, task: {{name: bit-xor, bits: {n}}}}}" for n in range(2, 14)
    )
    text = re.sub(r"  task: .*", f"  task: [{bits}]", TEXT).replace(
        "seed: [0, 1, 2]", "seed: [0, 1]"
    )
    text = text.replace("  <script>", f"  {'a-very-long-word-' * 12} <script>")
    file, results = fill(folder, text)
    write(file, results, folder / "page.html")
    return folder / "page.html"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_but_a_box_of_its_own_scrolls_sideways(
    chromium: Browser, wide_page: Path, width: int
) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto(wide_page.as_uri())

    whole, inner, scrolled = page.evaluate(
        "[document.documentElement.scrollWidth, innerWidth,"
        " [...document.querySelectorAll('.scroll')].filter("
        "e => e.scrollWidth > e.clientWidth).length]"
    )

    assert inner == whole == width
    assert scrolled or width > 1000, "the wide table was to scroll in its box"
    page.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_everybody_can_read_the_report(
    chromium: Browser, wide_page: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    assert barriers(chromium, wide_page.as_uri(), width, scheme) == []


@pytest.mark.slow
@pytest.mark.browser
def test_it_prints(chromium: Browser, wide_page: Path) -> None:
    page = chromium.new_page()
    page.goto(wide_page.as_uri())

    assert page.pdf().startswith(b"%PDF")
    page.close()


@pytest.mark.slow
@pytest.mark.browser
def test_it_asks_the_network_for_nothing(chromium: Browser, wide_page: Path) -> None:
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(wide_page.as_uri(), wait_until="networkidle")

    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [wide_page.as_uri()]
    page.close()


def test_code_in_a_note_is_code_on_the_page() -> None:
    assert report._coded("set `a<b` in <it>") == "set <code>a&lt;b</code> in &lt;it&gt;"
