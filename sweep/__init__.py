"""The orchestration: a sweep file goes in, a table comes out.

`import sweep` costs nothing: a name's module is imported when the name is first used, so that
results can be read where neither torch nor Ray is installed.

    >>> import sweep
    >>> sweep.load_trials("results").groupby("cell_id").test_accuracy.mean()   # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweep.analysis.claims import load_claims
    from sweep.analysis.frames import load_curves, load_failures, load_trials
    from sweep.analysis.queries import query
    from sweep.analysis.tables import load_table
    from sweep.execution.driver import run
    from sweep.planning.plan import plan
    from sweep.sweepfile.expansion import load

__all__ = [
    "__version__",
    "load",
    "load_claims",
    "load_curves",
    "load_failures",
    "load_table",
    "load_trials",
    "plan",
    "query",
    "run",
]

_HOME = {
    "load": "sweep.sweepfile.expansion",
    "load_claims": "sweep.analysis.claims",
    "load_curves": "sweep.analysis.frames",
    "load_failures": "sweep.analysis.frames",
    "load_table": "sweep.analysis.tables",
    "load_trials": "sweep.analysis.frames",
    "plan": "sweep.planning.plan",
    "query": "sweep.analysis.queries",
    "run": "sweep.execution.driver",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("fpt-sweep")
    if name not in _HOME:
        allowed = ", ".join(__all__)
        raise AttributeError(f"module 'sweep' has no attribute {name!r}; it has {allowed}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
