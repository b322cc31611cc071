"""The promises of the project's papers: README, CHANGELOG, packaging, imports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sweep.ledger.ledger import Ledger, new_attempt
from sweep.ledger.provenance import TRAINING
from sweep.sweepfile.expansion import load
from tests.support import trial_row

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "\n".join(
    page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "ray", "mlflow", "transformers")

TINY = """\
sweep: tiny
trial:
  backbone: {name: gpt2, layers: 1, width: 16, heads: 2}
  batch_size: 4
  steps: 4
  evaluation: {every: 2}
axes:
  pretraining: [random, {label: faster, pretraining: random, learning_rate: 0.01}]
  task: [{name: bit-xor, bits: 2}]
  seed: [0, 1]
table: {rows: pretraining, columns: task}
claims: [{that: faster > random, axis: pretraining, per: task}]
"""


def blocks(language: str) -> list[str]:
    """The code blocks of README and of the pages in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES, flags=re.MULTILINE | re.DOTALL)


def shell_lines(first: str) -> list[str]:
    """The lines of their shell blocks that begin with a word, without comments, each once."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    own = [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith(f"{first} ")]
    return list(dict.fromkeys(own))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the pages' commands work, with a quickstart of seconds."""
    (tmp_path / "experiments/laptop").mkdir(parents=True)
    (tmp_path / "experiments/quickstart.yaml").write_text(TINY)
    shutil.copy(ROOT / "experiments/laptop/tuned-two-fields.yaml", tmp_path / "experiments/laptop")
    (tmp_path / "results/states").mkdir(parents=True)
    (tmp_path / "results/states/000000000000.safetensors").touch()  # a trial has begun
    return tmp_path


def loaded_by(codes: Sequence[str], folder: Path) -> list[set[str]]:
    """The heavy packages that are in a fresh process after each of some pieces of code, in turn."""
    check = (
        f"import json, sys\nloaded = []\nfor code in json.loads({json.dumps(json.dumps(codes))}):\n"
        f"    exec(code, {{'__name__': '__main__'}})\n"
        f"    loaded.append(sorted({set(HEAVY)!r} & set(sys.modules)))\n"
        "print('\\nloaded:', json.dumps(loaded))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=folder, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    return [set(one) for one in json.loads(done.stdout.rsplit("loaded:", 1)[1])]


def test_what_plans_and_tabulates_loads_nothing_heavy(clone: Path) -> None:
    file = "experiments/quickstart.yaml"
    words = [["validate", file], ["plan", file], ["status", file], ["table", file]]
    codes = [
        "import sweep, fpt, sweep.cli",
        "import fpt; fpt.TrialConfig",
        "import sweep; sweep.load_trials('results')",
        "import sweep; sweep.load_curves('results')",
        f"import sweep; sweep.plan({file!r})",
        f"import sweep; sweep.load_table({file!r}).to_markdown()",
        *(
            f"from typer.testing import CliRunner; from sweep.cli import app\n"
            f"result = CliRunner().invoke(app, {argv!r})\n"
            f"assert result.exit_code == 0, result.output"
            for argv in (*words, ["status"], ["schema"])
        ),
    ]

    loaded = loaded_by(codes, clone)

    assert dict(zip(codes, loaded, strict=True)) == {code: set() for code in codes}


def test_import_sweep_alone_loads_nothing_but_the_package() -> None:
    """It is to be there in less than a tenth of a second, whatever is installed."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport sweep\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert set(done.stdout.split()) - sys.stdlib_module_names == {"sweep"}


LIGHT = """\
validate FILE
plan FILE
plan FILE --json
status FILE
table FILE
claims FILE
figures FILE -o figures
report FILE
columns
schema
show TRIAL
trace FILE random bit-xor
query "SELECT count(*) FROM trials JOIN curves USING (trial_id)"
export FILE -o bundle.zip
merge bundle.zip --into merged
diff results merged FILE
upgrade merged --into upgraded
compact
table FILE
"""


def test_what_plans_and_reads_does_without_what_trains(clone: Path) -> None:
    """All in one process, in which what trains is as if not installed."""
    ledger = Ledger(clone / "results", write=True)
    for point in load(clone / "experiments/quickstart.yaml").points[:-1]:
        ledger.commit(trial_row(point))
        row = {"step": 4, "split": "train", "loss": 1.0, "accuracy": 0.5}
        rows = [row | {"seconds": 1.0, "examples": 16}]
        ledger.append_curve(point.trial_id, new_attempt(), 0, rows)
    absent = TRAINING
    lines = LIGHT.replace("FILE", "experiments/quickstart.yaml").splitlines()
    lines = [line.replace("TRIAL", min(ledger.done())) for line in lines]
    code = f"""
import shlex, sys
sys.modules.update(dict.fromkeys({absent!r}))
from sweep import cli
for line in {lines!r}:
    sys.argv = ["sweep", *shlex.split(line)]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
import sweep
print(len(sweep.load_trials("results")), len(sweep.load_curves("results")))
"""

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 3"


@pytest.mark.parametrize("command", ["run FILE", "debug FILE --only *bit-xor*", "weights FILE"])
def test_what_trains_says_what_to_install_where_torch_is_missing(command: str, clone: Path) -> None:
    """A `None` among the modules is what Python takes for one that is not installed."""
    words = command.replace("FILE", "experiments/quickstart.yaml").split()
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        f"sys.argv = ['sweep', *{words!r}]\nfrom sweep import cli\ncli.main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install 'fpt-sweep[train]'" in done.stderr
    assert not list(clone.glob("results/trials/*"))


def test_a_job_is_made_where_torch_and_mlflow_are_missing(clone: Path) -> None:
    """All up to the cluster, which is not there: Ray's client alone is needed."""
    words = ["submit", "experiments/quickstart.yaml", "--results", "/shared/results"]
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, mlflow=None)\n"
        f"sys.argv = ['sweep', *{words!r}, '--address', 'http://127.0.0.1:1']\n"
        "from sweep import cli\ncli.main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "install" not in done.stderr


def test_public_names_are_there() -> None:
    # In a process of its own: torch and Ray stay out of the one that runs the other tests.
    code = (
        "import fpt, sweep\n"
        "for module in (fpt, sweep):\n"
        "    assert sorted(dir(module)) == sorted(module.__all__)\n"
        "    for name in module.__all__:\n"
        "        assert getattr(module, name).__doc__, name\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_says_which_there_are() -> None:
    import sweep

    with pytest.raises(AttributeError, match="load_trials"):
        _ = sweep.load_trails


def test_one_version_everywhere() -> None:
    import sweep

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[([^]]+)\]", changelog, flags=re.MULTILINE)

    assert newest is not None
    assert newest[1] == PYPROJECT["project"]["version"]
    assert version("fpt-sweep") == PYPROJECT["project"]["version"]
    assert sweep.__version__ == PYPROJECT["project"]["version"]


def test_constraints_are_public_releases_of_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    wanted = PYPROJECT["project"]["dependencies"] + [
        one for extra in PYPROJECT["project"]["optional-dependencies"].values() for one in extra
    ]
    names = {canonicalize_name(Requirement(one).name) for one in wanted}

    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", pin)] == []
    assert names <= {pin.split("==")[0] for pin in pins}


def test_what_trains_comes_with_an_extra() -> None:
    project = PYPROJECT["project"]
    light = {Requirement(one).name for one in project["dependencies"]}
    train = {Requirement(one).name for one in project["optional-dependencies"]["train"]}
    assert train == set(TRAINING)
    assert not light & train
    assert "'.[train," in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("command", ["mirror FILE", "ui", "run FILE"])
def test_what_is_of_an_extra_is_named_where_it_is_missing(command: str, clone: Path) -> None:
    (clone / "results").mkdir(exist_ok=True)
    Ledger(clone / "results", write=True)
    (clone / "results/mlflow.db").touch()
    words = command.replace("FILE", "experiments/quickstart.yaml").split()
    code = (
        f"import sys; sys.modules.update(ray=None, mlflow=None)\n"
        f"sys.argv = ['sweep', *{words!r}]\nfrom sweep import cli\ncli.main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install 'fpt-sweep[train]'" in done.stderr


def test_the_wheel_works_outside_a_clone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    # From a copy: the build must not depend on git, nor leave anything in the working tree.
    copy = shutil.copytree(
        ROOT,
        tmp_path / "copy",
        ignore=shutil.ignore_patterns(".venv", ".git", "results", "__pycache__", ".*_cache"),
    )
    subprocess.run([*build, "--directory", str(tmp_path)], cwd=copy, check=True)
    (wheel,) = tmp_path.glob("*.whl")

    inside = set(zipfile.ZipFile(wheel).namelist())

    data = [
        path.relative_to(ROOT).as_posix()
        for package in ("fpt", "sweep")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert {name for name in inside if name.split("/")[0] in ("fpt", "sweep")} == set(data)
    assert {"fpt/py.typed", "sweep/py.typed"} <= inside
    assert any(name.startswith("fpt/shipped/") and name.endswith(".safetensors") for name in inside)
    assert "fpt/published.csv" in inside


@pytest.mark.slow
def test_what_would_be_uploaded_installs_anywhere_and_trains(tmp_path: Path) -> None:
    """The release, as a stranger gets it: no clone, no constraints, an environment of its own."""
    copy = shutil.copytree(
        ROOT, tmp_path / "copy",
        ignore=shutil.ignore_patterns(".*", "results", "__pycache__", "site"),
    )  # fmt: skip
    shutil.copytree(ROOT / "results/published", copy / "results/published")
    dist = tmp_path / "dist"
    module = [sys.executable, "-m"]
    subprocess.run(
        [*module, "build", "--no-isolation", "--outdir", str(dist)], cwd=copy, check=True
    )
    packed = sorted(str(path) for path in dist.iterdir())
    subprocess.run([*module, "twine", "check", "--strict", *packed], check=True)
    (wheel,) = dist.glob("*.whl")

    home = tmp_path / "environment"
    subprocess.run([*module, "venv", str(home)], check=True)
    pip = [str(home / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    asked = subprocess.run(
        [*pip, "install", str(wheel)], capture_output=True, text=True, check=False
    )
    if asked.returncode and "No matching distribution" in asked.stderr:
        pytest.skip("no package index can be reached")
    assert asked.returncode == 0, asked.stderr

    def sweep(*argv: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [str(home / "bin/sweep"), *argv],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert sweep("init", "quickstart").returncode == 0
    assert "37 missing, 12 blocked" in sweep("plan", "quickstart.yaml").stdout
    light = sweep("run", "quickstart.yaml")
    assert light.returncode == 2
    assert "pip install 'fpt-sweep[train]'" in light.stderr
    subprocess.run([*pip, "install", f"{wheel}[train]"], check=True)
    done = sweep("run", "quickstart.yaml", "--quiet", "--only", "random/bit-xor/0")
    assert done.returncode == 0, done.stderr
    assert "1 done" in done.stderr
    assert len(pd.read_parquet(tmp_path / "results/trials")) == 1


def test_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 150
    paragraphs = [one for one in README.split("\n\n") if not one.startswith(("|", "```", "<!--"))]
    assert [one for one in paragraphs if len(one.split()) > 80] == []


def test_every_target_that_readme_names_is_in_the_makefile() -> None:
    targets = [line.split()[1] for line in shell_lines("make")]

    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_tests_run_on_each_python_that_answers(tmp_path: Path) -> None:
    """A shim of pyenv's is there for each Python that it knows, chosen or not."""
    says = {
        "python3.11": "exit 0",
        "python3.12": 'echo "pyenv: python3.12: command not found" >&2; exit 127',
    }
    for name, line in says.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("sh", "head"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)

    done = subprocess.run(
        [shutil.which("make") or "make", "test-all", "MAKE=echo make"],
        cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == "make test PYTHON=python3.11 VENV=.venv-3.11"
    assert second == "python3.12: not installed, it says: pyenv: python3.12: command not found"
    assert re.fullmatch("python3.13: not installed, it says: .*not found", third)


def test_the_sweep_files_of_the_pages_are_valid(tmp_path: Path) -> None:
    from sweep.sweepfile.expansion import load

    for code in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / named[1]).write_text(code)
    for data in ("waves.csv", "series.txt"):  # part of the ids; what is in them, their pages' tests
        (tmp_path / data).touch()
    whole = [one for one in blocks("yaml") if re.search(r"^sweep:", one, re.MULTILINE)]
    file = tmp_path / "page.yaml"

    assert len(whole) >= 3
    for block in whole:
        file.write_text(block)
        assert load(file).points
    (shown,) = (one for one in whole if one.startswith("# Does language help"))
    file.write_text(shown)
    assert len(load(file).points) == 3 * 2 * 3 - 3
    assert len(load(file).pretrainings) == 1
    # What the page of tuning shows is tried by its own test.
    tune, *_ = (one for one in blocks("yaml") if one.startswith("tune:"))
    file.write_text(shown.replace("  learning_rate: [1e-3]\n", "") + tune)
    assert len(load(file).studies) == 3 * 2 - 1


def test_readmes_commands_for_clusters_are_commands() -> None:
    # The slow tests of sweep.cluster.submission run them.
    from typer.main import get_command

    from sweep.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    texts = [line for block in blocks("text") for line in block.splitlines()]
    lines = [line.split()[1:] for line in texts if line.startswith("sweep ")]
    assert {words[0] for words in lines} == {"run", "submit", "logs", "stop"}
    for name, *words in lines:
        commands[name].make_context(name, words)


IN_TURN = """
import shlex, sys, traceback
from sweep.cli import main

for line in sys.stdin.read().splitlines():
    print(f"$ {line}", file=sys.stderr, flush=True)
    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(ended.code)
"""
"""Runs commands in one process: most of a command's time is its imports."""


@pytest.mark.ray
def test_readmes_commands_run_and_its_own_task_and_backbone_train(clone: Path) -> None:
    (code,) = (one for one in blocks("python") if one.startswith("# mine.py"))
    (file,) = (one for one in blocks("yaml") if one.startswith("# own.yaml"))
    (clone / "mine.py").write_text(code)
    (clone / "own.yaml").write_text(file)
    # What the page of claims shows of files of its own is tried by its own test.
    lines = [line for line in shell_lines("sweep") if not re.search(r"(looks|cut)\.yaml", line)]

    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        cwd=clone,
        input="\n".join(["sweep run own.yaml --results own", *lines]),
        capture_output=True,
        text=True,
        env=os.environ | {"RAY_DISABLE_IMPORT_WARNING": "1"},
        check=False,
    )

    assert len(lines) >= 9
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert [one[2:] for one in done.stderr.splitlines() if one[:2] == "$ "][1:] == lines
    assert "Traceback" not in done.stderr, done.stderr
    assert len((code + file).splitlines()) < 45
    rows = Ledger(clone / "own").trials(columns=["task", "outcome"]).to_pylist()
    assert [row["outcome"] for row in rows] == ["done", "done"]


def test_readmes_snippets_run_and_load_what_they_need(clone: Path) -> None:
    for point in load(clone / "experiments/quickstart.yaml").points:
        Ledger(clone / "results").commit(trial_row(point))

    # Modules of a user's own are tried by their page's tests, and above.
    snippets = [one for one in blocks("python") if not re.match(r"# \w+\.py\n", one)]
    training = [one for one in snippets if "fpt.train" in one]
    others = [one for one in snippets if one not in training]
    assert loaded_by(others, clone) == [set() for _ in others]
    assert loaded_by(training, clone) == [{"torch", "transformers"} for _ in training]


def test_every_command_is_on_a_page() -> None:
    from sweep.cli import app

    names = {command.callback.__name__ for command in app.registered_commands}

    assert {name for name in names if f"sweep {name}" not in PAGES} == set()


def test_shipped_sweep_files_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    from sweep.sweepfile.expansion import load

    # Data of a file's own is named by its digest: to plan, it need not be there.
    monkeypatch.setenv("FPT_SWEEP_DATA", "/nowhere")

    files = sorted((ROOT / "experiments").rglob("*.yaml"))

    assert {"quickstart.yaml", "english-backbone.yaml"} <= {file.name for file in files}
    for file in files:
        assert load(file).all, file
