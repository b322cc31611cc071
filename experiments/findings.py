"""Write results/published/README.md: what the tables that have ended say of the papers' claims.

Sentences come from results/published/findings.yaml, figures from the published tables. Of files
that are not published it says that they were not run.

    python experiments/findings.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results/published"

COLUMNS = {
    "claim of the papers": ":--",
    "here": ":--",
    "verdict": ":--",
    "difference": "--:",
    "seeds": "--:",
    "tuned": ":--",
    "core-minutes": "--:",
    "file": ":--",
    "what this scale cannot say": ":--",
}


def main() -> None:
    """Write the page."""
    (PUBLISHED / "README.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page."""
    told = YAML(typ="safe").load((PUBLISHED / "findings.yaml").read_text(encoding="utf-8"))
    lines = [
        line_of(COLUMNS),
        line_of(COLUMNS.values()),
        *(line for finding in told["findings"] for line in rows(finding, told["cpu"])),
    ]
    seen = [
        f"Also run: [{one['file']}](laptop/{one['file']}/table.md), {one['what']}.\n"
        for one in told["seen"]
        if one["file"] in published()
    ]
    return "\n".join((told["head"], *lines, "", *seen, cost(), not_run()))


def line_of(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rows(finding: dict[str, Any], cpu: dict[str, float]) -> Iterator[str]:
    """The lines of a finding: one a place of its claim; none of a file that is not published."""
    folder = PUBLISHED / "laptop" / finding["file"]
    if not folder.is_dir():
        return
    with (folder / "claims.csv").open(encoding="utf-8", newline="") as file:
        contrasts = [row for row in csv.DictReader(file) if row["claim"] == finding["claim"]]
    if not contrasts:
        raise SystemExit(f"findings.yaml: {finding['file']} has no claim {finding['claim']!r}")
    for one in contrasts:
        place = ", ".join(one[name] for name in one if name.startswith("place."))
        cells = (
            finding["says"],
            f"`{one['claim']}`" + (f" on {place}" if place else ""),
            one["verdict"],
            difference(one),
            one["pairs"],
            tuned(one["notes"]),
            minutes(folder, cpu),
            f"[{folder.name}](laptop/{folder.name}/table.md)",
            finding["not"],
        )
        yield line_of(cells)


def tuned(notes: str) -> str:
    """What was tuned among what, and which arms chose the edge of it; from a contrast's notes."""
    found = re.search(r"(?:^|; )([\w. ]*)chosen for each cell, of (.*?)[,;] by ", notes)
    told = f"{found[1]}{found[2]}" if found else "nothing"
    edges = re.findall(r"(?:^|; )([^;:]+): its [^;]*a better one may lie beyond", notes)
    return told + (f"; {' and '.join(edges)} chose the edge" if edges else "")


def difference(contrast: dict[str, str]) -> str:
    """+1.96 (-2.4 to +6.3), in points; of a test without an interval the difference alone."""
    told = f"{float(contrast['difference']):+.1f}"
    if contrast["low_family"]:
        low, high = float(contrast["low_family"]), float(contrast["high_family"])
        told += f" ({low:+.1f} to {high:+.1f})"
    return told


def minutes(folder: Path, cpu: dict[str, float]) -> str:
    """CPU time where it was measured, else the wall time of all rows."""
    if folder.name in cpu:
        return f"{cpu[folder.name]:.0f}"
    seconds = pq.read_table(folder / "trials.parquet", columns=["seconds"])["seconds"]
    return f"{sum(seconds.to_pylist()) / 60:.0f} [w]"


def published() -> list[str]:
    """The laptop files that are published."""
    return sorted(rows.parent.name for rows in (PUBLISHED / "laptop").glob("*/trials.parquet"))


def cost() -> str:
    """What core-minutes are, and how many rows there are."""
    counts = [
        pq.read_metadata(PUBLISHED / "laptop" / name / "trials.parquet").num_rows
        for name in published()
    ]
    return (
        f"{sum(counts)} rows of {len(counts)} files are published, trials that files share counted "
        "in each. "
        "Core-minutes are those of a whole file, tuning included: CPU time of all processes of the "
        "run; [w]: wall time of the rows, beside much other work on the same two cores, which is "
        "several times the CPU time.\n"
    )


def not_run() -> str:
    """Which files have no row here yet."""
    files = sorted(file.stem for file in (ROOT / "experiments/laptop").glob("*.yaml"))
    missing = [name for name in files if name not in published()]
    if not missing:
        return ""
    return (
        "Not run to their end yet, so that nothing is said of them: " + ", ".join(missing) + ".\n"
    )


if __name__ == "__main__":
    main()
