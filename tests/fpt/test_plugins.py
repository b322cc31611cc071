import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fpt import plugins

# Each test has a process of its own: what a process has imported stays imported.

TASK = """
import numpy as np
import fpt

class Coin(fpt.Task):
    def shape(self, protocol):
        return fpt.Shape(tokens=4, inputs=1, embedded=False, classes=2)
    def splits(self, protocol):
        def draw(rng, size):
            x = rng.integers(0, 2, (size, 4, 1))
            return fpt.Batch(x.astype(np.float32), x[:, -1])
        validation, test = (fpt.Stored(draw(np.random.default_rng(n), 64)) for n in (1, 2))
        return fpt.Splits(train=fpt.Generated(draw), validation=validation, test=test)
    def baseline(self, protocol):
        return fpt.Baseline(0.5, "guess")
"""

SWEEP = """
sweep: own
trial:
  backbone: {name: transformer, size: tiny}
  pretraining: random
  steps: 2
  evaluation: {every: 2}
axes: {task: ["NAME"], seed: [0]}
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def sweep(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sweep", *words],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def python(folder: Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def named(name: str) -> str:
    return SWEEP.replace("NAME", name)


@pytest.mark.parametrize(
    "file", ["statistics.py", "tokenizers.py", "torch/__init__.py", "sitecustomize.py", "_ast.py"]
)
def test_a_file_that_shadows_a_module_is_refused_by_name(file: str, tmp_path: Path) -> None:
    write(tmp_path, {file: ""})

    with pytest.raises(ValueError, match="rename") as refused:
        plugins.check_names(tmp_path)

    assert str(refused.value).startswith(str(tmp_path / file.removesuffix("/__init__.py")))


def test_names_that_nothing_installed_has_are_allowed(tmp_path: Path) -> None:
    write(tmp_path, {"waves.py": "", "test_it.py": "", "my-notes.py": "", "torch/notes.txt": ""})

    plugins.check_names(tmp_path)


def test_a_file_that_shadows_is_refused_before_anything_starts(tmp_path: Path) -> None:
    files = {"own.yaml": named("coins:Coin"), "coins.py": TASK, "statistics.py": "1 / 0"}
    write(tmp_path, files)

    done = sweep(tmp_path, "run", "own.yaml")

    assert done.returncode == 2
    assert f"{tmp_path / 'statistics.py'}: the standard library has a module" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_files_beside_a_sweep_that_names_no_code_are_never_imported(tmp_path: Path) -> None:
    traps = ("statistics.py", "sitecustomize.py", "tokenizers.py", "fpt.py", "json.py")
    write(tmp_path, {"own.yaml": named("bit-xor"), **dict.fromkeys(traps, "raise SystemExit(9)")})

    done = sweep(tmp_path, "validate", "own.yaml")

    assert (done.returncode, done.stderr) == (0, "")


def test_an_installed_module_is_not_taken_for_one_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "site", {"waves.py": TASK})
    write(
        tmp_path / "work",
        {"own.yaml": named("waves:Coin"), "waves.py": "raise ImportError('mine')"},
    )

    done = sweep(tmp_path / "work", "validate", "own.yaml", PYTHONPATH=str(tmp_path / "site"))

    assert done.returncode == 2
    assert f"{tmp_path / 'work' / 'waves.py'}: {tmp_path / 'site'} has a module waves too" in (
        done.stderr
    )


def test_what_an_import_prints_does_not_reach_json(tmp_path: Path) -> None:
    write(tmp_path, {"own.yaml": named("coins:Coin"), "coins.py": "print('hello')\n" + TASK})

    done = sweep(tmp_path, "plan", "own.yaml", "--json")

    assert json.loads(done.stdout)["counts"]["missing"] == 1
    assert "hello" in done.stderr


MISTAKES = [
    ("import nothing_of_that_name", "No module named 'nothing_of_that_name' (coins0.py:1)"),
    ("x = {}['k']", "KeyError: 'k' (coins1.py:1)"),
    ("def f(:\n  pass", "SyntaxError: invalid syntax (coins2.py:1)"),
    ("import sys\nsys.exit(3)", "ends the process when it is imported (coins3.py:2)"),
    ("from statistics import mode_of", "cannot import name 'mode_of'"),
    ("Coins = 1", "module coins5 has no class Coin"),
    ("Coin = 3", "module coins6 has no class Coin"),
    ("class Coin: pass", "coins7:Coin is not a subclass of fpt.Task"),
    ("", "module coins8 has no class Coin"),
]


def test_a_module_that_cannot_be_taken_is_told_in_a_line(tmp_path: Path) -> None:
    for number, (text, _) in enumerate(MISTAKES):
        write(tmp_path, {f"{number}.yaml": named(f"coins{number}:Coin"), f"coins{number}.py": text})
    write(tmp_path, {"9.yaml": named("coins9:Coin")})

    out = python(
        tmp_path,
        """
        import sweep
        for number in range(10):
            try:
                sweep.load(f"{number}.yaml")
            except Exception as error:
                print(*error.problems)
        """,
    )

    wanted = [message for _, message in MISTAKES]
    wanted.append("there is no module coins9; put coins9.py beside the sweep file")
    for number, (told, message) in enumerate(zip(out.splitlines(), wanted, strict=True)):
        assert told.startswith(f"{number}.yaml:8: axes.task[0]: "), told
        assert message in told


def test_two_files_of_one_name_in_a_process_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", {"own.yaml": named("coins:Coin"), "coins.py": TASK})
    write(tmp_path / "b", {"own.yaml": named("coins:Coin"), "coins.py": TASK + "#"})
    write(tmp_path / "copy", {"own.yaml": named("coins:Coin"), "coins.py": TASK})

    out = python(
        tmp_path,
        """
        import sweep
        sweep.load("a/own.yaml"), sweep.load("copy/own.yaml")
        try:
            sweep.load("b/own.yaml")
        except Exception as error:
            print(error)
        """,
    )

    assert f"{tmp_path / 'b' / 'coins'}.py: this process has read another module coins from" in out


def test_the_digests_are_of_all_that_a_class_imports_from_its_folder(tmp_path: Path) -> None:
    files = {
        "own.yaml": named("coins.task:Coin"),
        "coins/__init__.py": "",
        "coins/task.py": "from . import noise\nimport helpers as h\nimport numpy, json\n" + TASK,
        "coins/noise.py": "from .deep.inner import x\n",
        "coins/deep/__init__.py": "",
        "coins/deep/inner.py": "x = 1\n",
        "helpers.py": "try:\n    import far\nexcept ImportError:\n    pass\n",
        "far.py": "",
        "apart.py": "",
    }
    write(tmp_path, files)

    out = python(
        tmp_path,
        """
        import hashlib, json, pathlib, sweep
        from fpt import plugins
        sweep.load("own.yaml")
        print(json.dumps(plugins.digests(["coins.task:Coin"])))
        """,
    )

    taken = files.keys() - {"own.yaml", "apart.py"}
    assert json.loads(out) == {
        name: hashlib.sha256(files[name].encode()).hexdigest() for name in taken
    }


def test_an_installed_package_gives_tasks_and_backbones_by_name(tmp_path: Path) -> None:
    files = {
        "coins.py": TASK,
        "coins-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: coins\nVersion: 1.0\n",
        "coins-1.0.dist-info/entry_points.txt": "[fpt_sweep.tasks]\ncoin = coins:Coin\n",
    }
    write(tmp_path / "site", files)
    write(tmp_path / "work", {"own.yaml": named("coin"), "other.yaml": named("coim")})
    path = str(tmp_path / "site")

    done = sweep(tmp_path / "work", "validate", "own.yaml", PYTHONPATH=path)
    wrong = sweep(tmp_path / "work", "validate", "other.yaml", PYTHONPATH=path)

    assert done.returncode == 0, done.stderr
    assert wrong.returncode == 2
    assert "no task is called 'coim'" in wrong.stderr
    assert wrong.stderr.splitlines()[0].endswith(", coin")


WRONG = TASK.replace("x[:, -1])", "x[:, -1] + 1)")


def test_code_is_tried_out_where_that_is_asked_for(tmp_path: Path) -> None:
    # The order of a set of text is another one in each process.
    unordered = TASK.replace(
        "x = rng.integers(0, 2, (size, 4, 1))",
        "x = rng.integers(0, 2, (size, 4, 1)) + list({'a', 'b', 'c', 'd', 'e'}).index('a')",
    ).replace("x[:, -1])", "x[:, -1] * 0)")
    write(tmp_path, {"coins.py": TASK, "wrong.py": WRONG, "unordered.py": unordered})
    text = named("coins:Coin").replace('"coins:Coin"', '"wrong:Coin", "unordered:Coin"')
    write(tmp_path, {"own.yaml": named("coins:Coin"), "bad.yaml": text})

    done = sweep(tmp_path, "validate", "own.yaml", "bad.yaml", "--code", PYTHONHASHSEED="7")
    debug = sweep(tmp_path, "debug", "bad.yaml", "--only", "*wrong*")

    assert done.returncode == 2
    wrong, order = (line for line in done.stderr.splitlines() if line.startswith("bad.yaml"))
    assert "wrong.py:5: task wrong:Coin: split train: targets have the value 2" in wrong
    assert "unordered.py:5: task unordered:Coin: split" in order
    assert "differ in another process" in order
    assert debug.returncode == 2
    assert "targets have the value 2" in debug.stderr
    assert "Traceback" not in done.stderr + debug.stderr


@pytest.mark.ray
def test_workers_import_as_the_driver_does_and_try_code_out_before_they_train(
    tmp_path: Path,
) -> None:
    # statistics.py and calendar.py would be imported by any worker whose path begins here.
    trap = "raise SystemExit('a worker took this for its own')"
    write(tmp_path, {"statistics.py": trap, "calendar.py": trap, "sitecustomize.py": trap})
    helper = "import os\nplace = os.environ.get('NOWHERE', __file__)\n"
    text = named("coins:Coin").replace('"coins:Coin"', '"coins:Coin", "wrong:Coin"')
    write(tmp_path / "files", {"own.yaml": text, "helper.py": helper, "wrong.py": WRONG})
    write(tmp_path / "files", {"coins.py": "from helper import place\n" + TASK})

    done = sweep(tmp_path, "run", "files/own.yaml")
    plan = sweep(tmp_path, "plan", "files/own.yaml", "--json")

    assert done.returncode == 1, done.stderr
    assert "wrong.py:5: task wrong:Coin: split train: targets have the value 2" in done.stderr
    good, wrong = json.loads(plan.stdout)["trials"]
    assert (good["status"], wrong["status"]) == ("done", "failed")
    assert wrong["why"].startswith("code: ContractError: wrong.py:5")
