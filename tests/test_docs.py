"""The pages of docs/: they build, their links lead somewhere, and their map is true."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from ruamel.yaml import YAML

from tests.browser import barriers

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "importlinter"
]["contracts"]


def test_the_picture_of_the_tower_is_that_of_the_contracts() -> None:
    (tower,) = (one for one in CONTRACTS if one.get("containers") == ["sweep"])
    match = re.search(r"<!-- tower -->\n```text\n(.*?)\n-+\nfpt\n```", ARCHITECTURE, re.DOTALL)
    assert match is not None

    assert match[1].splitlines() == tower["layers"]


def test_every_package_of_the_tower_is_described() -> None:
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "sweep").glob("*/*.py")}

    assert set(re.findall(r"^\| `(\S+?)` \|", ARCHITECTURE, re.MULTILINE)) == folders | {"fpt"}


def test_every_file_that_the_map_names_is_there() -> None:
    named = re.findall(r"`((?:fpt|sweep)/[a-z_./]*)`", ARCHITECTURE)

    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_change_goes_into_one_file() -> None:
    rows = re.findall(r"^\| [^`|]+ \| (.+) \| .+ \|$", ARCHITECTURE, re.MULTILINE)
    changes = [row for row in rows if row.startswith("`")]

    assert len(changes) >= 10
    assert [row for row in changes if not re.fullmatch(r"`[a-z_/]+\.py`", row)] == []


def test_a_contract_orders_the_files_of_every_package() -> None:
    ordered = {one["containers"][0] for one in CONTRACTS if one["type"] == "layers"}
    packages = {f"sweep.{p.parent.name}" for p in (ROOT / "sweep").glob("*/*.py")}

    # Commands stand beside one another; mirrors holds one mirror.
    assert packages - ordered <= {"sweep.cli", "sweep.mirrors"}


def test_sweep_itself_holds_packages_alone() -> None:
    files = {p.name for p in (ROOT / "sweep").iterdir() if p.is_file()}

    assert files == {"__init__.py", "__main__.py", "py.typed"}


def test_the_workflow_calls_targets_that_there_are() -> None:
    workflow = YAML(typ="safe").load(ROOT / ".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {step["run"] for step in steps if "run" in step}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert called == {"bash .ci/run", "make test", "make docs"}
    for target in ("test", "docs", "slow"):
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable, "-m", "mkdocs", "build", "--strict", "--no-directory-urls",
            "--site-dir", str(folder),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_sites_reference_is_whole_and_asks_the_network_for_nothing(site: Path) -> None:
    names = (site / "reference/python.html").read_text(encoding="utf-8")
    assert 'id="sweep.load_trials"' in names
    assert 'id="fpt.train"' in names
    fields = (site / "reference/sweep-file.html").read_text(encoding="utf-8")
    assert "paired_by" in fields
    pages = " ".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    assert re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="https?://', pages) == []


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (768, "light"), (1280, "dark")])
def test_everybody_can_read_the_site(
    chromium: Browser, site: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    found = {
        page.name: there
        for page in pages
        if (there := barriers(chromium, page.as_uri(), width, scheme))
    }
    assert len(pages) > 20
    assert found == {}
