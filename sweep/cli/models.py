"""Commands that look into trained models and their backbones; the ones that need torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as Grid

from sweep.cli.common import (
    AsJson,
    File,
    Results,
    SafeConsole,
    UserError,
    app,
    count,
    echo,
    say,
    show_json,
    writing,
)

if TYPE_CHECKING:
    from fpt.config import TrialConfig
    from sweep.ledger.ledger import Ledger
    from sweep.sweepfile.trials import Point


Folder = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="A folder for what is drawn.")
]
Part = Annotated[str | None, typer.Option("--only", metavar="PATTERN", help="A label, glob or id.")]


@app.command(epilog="Example: sweep attention experiments/quickstart.yaml -o figures")
def attention(file: File, output: Folder, only: Part = None, results: Results = "results") -> None:
    """Draw the attention maps of finished trials on the bit tasks, and what each head comes to.

    Writes the maps of each trial (PDF, SVG, PNG), heads.parquet with the kind of fixed point of
    each head, and a figure of these kinds by layer.
    """
    import pandas as pd

    from fpt.checkpoints import load_model
    from fpt.files import DataError
    from sweep.analysis.figures import draw_attention, heads_of, save, undrawable
    from sweep.analysis.figures.similarity import heads

    folder, points, ledger = _kept(file, results, only)
    drawable, lacking, never = _drawable(points, ledger, file, undrawable)
    frames: list[pd.DataFrame] = []
    for point in drawable:
        try:
            model = load_model(point.trial_id, folder)
            with writing(output):
                files = draw_attention(point, model, output)
            frames.append(heads_of(point, model))
        except DataError as error:
            lacking.append(f"{point.label}: {error}")
        except ValueError as error:
            never[str(error)] += 1
        else:
            echo("\n".join(map(str, files)))
    if frames:
        found = pd.concat(frames, ignore_index=True)
        with writing(output):
            found.to_parquet(output / "heads.parquet", index=False)
            files = save(heads(found).figure, output / "heads")
        echo("\n".join(map(str, (output / "heads.parquet", *files))))
    _finish(file, never, lacking, bool(frames))


@app.command(epilog="Example: sweep representations experiments/quickstart.yaml -o figures")
def representations(
    file: File,
    output: Folder,
    only: Part = None,
    examples: Annotated[
        int, typer.Option(min=4, max=4096, help="Of each task's test set, at most.")
    ] = 256,
    results: Results = "results",
) -> None:
    """Compare what layers and arms hold: linear CKA on test inputs, before training and after it.

    Writes representations.parquet, a row for each pair of layers, and two figures a task: layers
    within each arm, and arms beside one another.
    """
    import pandas as pd

    from fpt.files import DataError
    from sweep.analysis.figures import save
    from sweep.analysis.figures.similarity import between, within
    from sweep.analysis.representations import compare, groups

    folder, points, ledger = _kept(file, results, only)
    ready, lacking, never = _drawable(points, ledger, file, lambda _: "")
    frames: list[pd.DataFrame] = []
    for group in groups(ready):
        try:
            frames += compare(group, folder, examples)
        except DataError as error:
            lacking.append(f"{group[0][1].label}: {error}")
        except ValueError as error:
            never[str(error)] += len(group)
    if frames:
        found = pd.concat(frames, ignore_index=True)
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            found.to_parquet(output / "representations.parquet", index=False)
            files = [output / "representations.parquet"]
            for task, rows in found.groupby("task", sort=False):
                files += save(within(rows).figure, output / f"layers-{task}")
                if (chart := between(rows)) is not None:
                    files += save(chart.figure, output / f"arms-{task}")
        echo("\n".join(map(str, files)))
    _finish(file, never, lacking, bool(frames))


def _kept(file: Path, results: str, only: str | None) -> tuple[Path, Sequence[Point], Ledger]:
    """Return the ledger's folder, the asked trials of a sweep file, and the ledger."""
    from sweep.ledger.ledger import Ledger
    from sweep.planning.tuning import resolve
    from sweep.sweepfile.expansion import load

    ledger = Ledger(results)
    sweep = resolve(load(file), ledger)
    if ledger.local is None:
        raise UserError(
            f"{ledger.uri}: trained tensors are read from a folder; copy trials/, states/ and "
            "backbones/ to one, and name it with --results"
        )
    return ledger.local, sweep.matching(only) if only else sweep.all, ledger


def _finish(file: Path, never: Counter[str], lacking: Sequence[str], drawn: bool) -> None:
    """Say what was left out; exit 1 if something is missing, 2 if nothing was drawn."""
    for text in (*(f"{count(n, 'trial')}: {why}" for why, n in never.items()), *lacking):
        say(f"not drawn: {text}")
    if not drawn:
        raise UserError(f"{file}: no trial could be drawn")
    if lacking:
        raise typer.Exit(1)


def _drawable(
    points: Iterable[Point], ledger: Ledger, file: Path, refused: Callable[[TrialConfig], str]
) -> tuple[list[Point], list[str], Counter[str]]:
    """Return the trials whose tensors are there, what others miss, and why some never can be.

    Args:
        points: The trials.
        ledger: Where they are.
        file: The sweep file, for the messages.
        refused: Why a config can never be drawn; empty if it can.
    """
    done, kept = ledger.done(), ledger.states()
    drawable: list[Point] = []
    lacking: list[str] = []
    never: Counter[str] = Counter()
    for point in points:
        name = point.trial_id
        if why := refused(point.config):
            never[why] += 1
        elif name not in done:
            lacking.append(f"{point.label}: trial {name} is not finished; sweep run {file}")
        elif name not in kept:
            lacking.append(
                f"{point.label}: the trained tensors of {name} were not kept; write `keep: "
                f"{{trained: true}}` into {file}, delete {ledger.uri}/trials/{name}.parquet, and "
                f"train it again: sweep run {file}"
            )
        else:
            drawable.append(point)
    return drawable, lacking, never


@app.command(epilog="Example: sweep weights experiments/quickstart.yaml")
def weights(file: File, results: Results = "results", as_json: AsJson = False) -> None:
    """Say what the backbones of a sweep are before training: statistics by layer, counts by group.

    A drawn backbone is the draw of the first trial that has it.
    """
    from fpt.files import DataError
    from sweep.ledger.ledger import Ledger, LedgerError
    from sweep.sweepfile.expansion import load

    ledger = Ledger(results)
    backbones: dict[object, list[Point]] = {}
    for point in load(file).all:
        config = point.config
        backbones.setdefault((config.backbone, config.pretraining), []).append(point)
    told: list[dict[str, Any]] = []
    absent = 0
    for points in backbones.values():
        try:
            told.append(_weights_of(points, ledger))
        except (DataError, LedgerError) as error:
            say(f"{points[0].label}: {error}")
            absent += 1
    if as_json:
        show_json(told)
    else:
        for one in told:
            _show_weights(one)
    if absent:
        raise typer.Exit(1 if told else 2)


@app.command(epilog="Example: sweep groups shipped:english")
def groups(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS", help="A directory, package:MODULE/FOLDER or shipped:NAME."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Say what is inside weights, group by group, and what of it would train by default.

    Read from the headers of their safetensors files; nothing is loaded, and no code of theirs run.
    """
    from dataclasses import asdict

    from fpt.backbones import AUTO
    from fpt.backbones.headers import inventory
    from fpt.config import FPT
    from fpt.files import DataError

    try:
        found = inventory(weights)
    except DataError as error:
        raise UserError(str(error)) from error
    if as_json:
        show_json(asdict(found))
    else:
        console = SafeConsole(width=max(SafeConsole().width, 110))
        console.print(f"{found.family}, {found.sees}", style="bold", markup=False, highlight=False)
        grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("group")
        for column in ("tensors", "parameters"):
            grid.add_column(column, justify="right")
        for name, own in sorted(found.groups.items()):
            grid.add_row(name, f"{own.tensors:,}", f"{own.parameters:,}")
        for what, own in sorted(found.left_out.items()):
            grid.add_row(f"left out: {what}", f"{own.tensors:,}", f"{own.parameters:,}")
        console.print(grid)
        of_file = sorted(set(FPT) & found.groups.keys())
        say(
            f"name: {AUTO} trains {', '.join(of_file)} of these by default, beside input and output"
        )
    if found.unknown:
        raise UserError(
            f"{weights}: no rule for {', '.join(found.unknown)}; write backbone.groups, as "
            "{regular expression: group}, for all parameters"
        )


def _weights_of(points: Sequence[Point], ledger: Ledger) -> dict[str, Any]:
    """Return what `weights` says of the trials of one backbone."""
    from dataclasses import asdict

    from fpt.backbones.statistics import statistics
    from fpt.groups import PREFIX, counts, trained
    from fpt.model import build_model

    point = points[0]
    config, parent = point.config, point.parent
    files = {} if parent is None else {parent: ledger.backbone_file(parent)}
    model = build_model([config], backbones=files)
    parameters = model.member(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    own = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in parameters.items()
        if name.startswith(PREFIX)
    }
    groups = {name: model.groups[PREFIX + name] for name in own}
    rows = statistics(own, groups, config.backbone.row.layer)
    sets = dict.fromkeys(one.config.train for one in points)
    return {
        "backbone": config.backbone.model_dump(mode="json"),
        "pretraining": config.pretraining,
        "trial": point.trial_id,
        "label": point.label,
        "trials": len(points),
        "digest": model.backbone_digest,
        "statistics": [asdict(row) for row in rows],
        "parameters": [
            {
                "train": list(train),
                "groups": counts(
                    model.groups, shapes, trained(model.groups, train, config.backbone)
                )
                | {name: row for name, row in model.counts().items() if name == "buffer"},
            }
            for train in sets
        ],
    }


def _show_weights(told: Mapping[str, Any]) -> None:
    # A terminal that is narrower breaks the lines; a figure that is cut says nothing.
    console = SafeConsole(width=max(SafeConsole().width, 110))
    backbone = told["backbone"]
    layers, heads = count(backbone["layers"], "layer"), count(backbone["heads"], "head")
    size = f"{layers} of {backbone['width']}, {heads}"
    same = f", as in {count(told['trials'], 'trial')}" if told["trials"] > 1 else ""
    title = f"{backbone['name']} ({size}), {told['pretraining']}: trial {told['trial']}{same}"
    console.print(title, style="bold", markup=False, highlight=False)
    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("layer", "group", "kind"):
        grid.add_column(column)
    for column in ("tensors", "number", "mean", "deviation", "minimum", "maximum"):
        grid.add_column(column, justify="right")
    for row in told["statistics"]:
        figures = (row[name] for name in ("mean", "deviation", "minimum", "maximum"))
        grid.add_row(
            "" if row["layer"] is None else str(row["layer"] + 1),
            row["group"],
            row["kind"],
            str(row["tensors"]),
            f"{row['number']:,}",
            *(f"{figure:.4g}" for figure in figures),
        )
    console.print(grid)
    for one in told["parameters"]:
        trained = sum(group["trained"] for group in one["groups"].values())
        total = sum(group["parameters"] for group in one["groups"].values())
        part = f"{trained:,} of {total:,} parameters train ({trained / total:.3%})"
        console.print(f"\n{' + '.join(one['train'])}: {part}", markup=False, highlight=False)
        grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("group")
        for column in ("tensors", "parameters", "trained", "frozen"):
            grid.add_column(column, justify="right")
        for name, group in one["groups"].items():
            frozen = group["parameters"] - group["trained"]
            numbers = (group["tensors"], group["parameters"], group["trained"], frozen)
            grid.add_row(name, *(f"{number:,}" for number in numbers))
        console.print(grid)
    console.print()
