"""What came of a job whose worker did not return."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.execution.postmortem import results_of_lost_worker
from sweep.ledger.ledger import Ledger
from sweep.sweepfile.expansion import load
from tests.support import job, trial_row

FILE = """
sweep: small
trial:
  task: {name: bit-xor, bits: 3}
  backbone: {name: gpt2, layers: 1, width: 8, heads: 1}
  pretraining: random
  steps: 20
  batch_size: 4
"""


def sweep_file(folder: Path, rest: str) -> Path:
    file = folder / "small.yaml"
    file.write_text(FILE + rest)
    return file


@pytest.mark.parametrize(
    ("members", "out_of_memory", "cause"),
    [(1, False, "worker"), (2, False, "worker"), (1, True, "memory"), (2, True, "memory")],
)
def test_a_lost_worker_loses_those_who_had_not_ended(
    members: int, out_of_memory: bool, cause: str, tmp_path: Path
) -> None:
    from ray.exceptions import OutOfMemoryError, RayActorError

    ledger = Ledger(tmp_path / "results")
    seeds = list(range(members + 1))
    done, *open_ = load(sweep_file(tmp_path, f"axes: {{seed: {seeds}}}\n")).points
    ledger.commit(trial_row(done))
    points = (done, *open_) if members > 1 else tuple(open_)

    results = results_of_lost_worker(
        job(*points), ledger, OutOfMemoryError("full") if out_of_memory else RayActorError()
    )

    assert [r.trial_id for r in results] == [p.trial_id for p in points]
    assert {r.trial_id: r.cause for r in results if r.status == "failed"} == {
        p.trial_id: cause for p in open_
    }
    assert ledger.failures().num_rows == members


BROKEN_IMPORT = """The actor died unexpectedly before finishing this task.
Worker exit detail: Worker exits unexpectedly. Traceback (most recent call last):
  File "python/ray/_raylet.pyx", line 2198, in ray._raylet.execute_task
RuntimeError: The actor with name ImplicitFunc failed to import on the worker:

Traceback (most recent call last):
  File "/home/ada/sweep/sweepfile/schema.py", line 240, in <module>
    class KeepSpec(Spec):
tokenize.TokenError: ('EOF in multi-line string', (125, 8))

An unexpected internal error occurred while the worker was executing a task.
"""


@pytest.mark.parametrize(
    ("account", "said"),
    [
        (BROKEN_IMPORT, "ended by an error: tokenize.TokenError: ('EOF in multi-line string'"),
        ("Worker exits unexpectedly. ValueError is no reason here.", "killed, or out of"),
    ],
)
def test_an_error_that_ended_a_process_is_not_called_a_kill(
    account: str, said: str, tmp_path: Path
) -> None:
    """Such as a source file that was changed while a worker imported it."""
    from ray.exceptions import RayActorError

    ledger = Ledger(tmp_path / "results")
    (point,) = load(sweep_file(tmp_path, "axes: {seed: [0]}\n")).points

    (result,) = results_of_lost_worker(job(point), ledger, RayActorError(error_msg=account))

    assert result.cause == "worker"
    (failure,) = ledger.failures().to_pylist()
    assert said in failure["message"]
