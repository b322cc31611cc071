from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fpt import published
from fpt.backbones import BACKBONES
from fpt.config import TrialConfig
from fpt.published import Figure, differences, references, setting
from fpt.tasks import TASKS

COUNTS = {
    "T1": 21, "T2": 28, "T3": 21, "T6": 14, "T7": 9, "T8": 15, "T9": 21, "T10": 4, "T11": 6,
    "T12": 6, "T13": 28, "T14": 3, "T15": 28, "T16": 4, "T17": 8, "T21": 20, "R1": 16,
}  # fmt: skip


def figure(table: str, row: str, column: str) -> Figure:
    return references()[table].figures[row, column]


def config(task: str = "bit-xor", steps: int = 1_000_000, **fields: Any) -> TrialConfig:
    fields = {"protocol": "paper", "seed": 0} | fields
    return TrialConfig.model_validate({"task": task, "steps": steps, **fields})


def test_every_line_of_the_file_is_read_once() -> None:
    file = Path(published.__file__).with_name("published.csv")
    with file.open(newline="") as lines:
        expected = Counter(row["table"] for row in csv.DictReader(lines))

    read = {name: len(table.figures) for name, table in references().items()}

    assert read == COUNTS == expected


def test_figures_are_numbers_with_known_units_and_trust() -> None:
    figures = [one for table in references().values() for one in table.figures.values()]

    assert len(figures) == 252
    assert {one.unit for one in figures} == {
        "accuracy_percent", "gradient_steps", "layers", "parameters"
    }  # fmt: skip
    assert {one.trust for one in figures} == {"reported", "unverified"}
    assert all(0 <= one.number <= 100 for one in figures if one.unit == "accuracy_percent")
    assert figure("T2", "random", "bit-memory").value == "75.8"
    assert figure("T2", "image", "cifar10").number == 72.5
    assert not figure("T3", "lstm", "mnist").verified


@pytest.mark.parametrize("table", COUNTS)
def test_each_figure_has_a_setting_that_a_trial_could_have(table: str) -> None:
    for one in references()[table].figures.values():
        theirs = setting(one)
        assert theirs.task is None or theirs.task in (*TASKS, "cifar10", "cifar10-lra")
        assert theirs.task is not None or one.column not in TASKS
        assert theirs.pretraining in ("language", "random", "statistics", "image", "trial")
        assert "output" in theirs.train


def papers_own(one: Figure) -> TrialConfig:
    """A trial as the paper, or Rothermel et al., would have set it up."""
    theirs = setting(one)
    row = BACKBONES[theirs.backbone]
    sizes = [size for size in row.sizes.values() if theirs.width in (None, size.width)]
    size = next(size for size in sizes if size.layers >= (theirs.layers or 1))
    parent = "trial:" + "0" * 12
    return config(
        task=theirs.task or "bit-xor",
        backbone={
            "name": theirs.backbone, "layers": theirs.layers or size.layers,
            "width": size.width, "heads": size.heads, "weights": size.weights,
        },
        pretraining=parent if theirs.pretraining == "trial" else theirs.pretraining or "language",
        train=sorted({part for part in theirs.train if part.split(":")[0] in row.trainable}),
        learning_rate=theirs.learning_rate or 1e-3,
        protocol=theirs.protocol,
        dropout=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("table", COUNTS)
def test_each_figure_can_be_compared_with_a_rerun_of_its_own_setting(table: str) -> None:
    for one in references()[table].figures.values():
        found = differences(one, papers_own(one))

        if one.note.startswith("quoted") or one.row in ("vanilla-transformer", "linformer"):
            assert found == ("figure of another model and code",)
        elif one.unit == "parameters":
            assert len(found) == 1
            assert found[0].startswith("counted otherwise there")
        else:
            assert found == (), (one, found)


def test_a_set_that_trains_is_what_the_backbone_has_of_it() -> None:
    lstm = setting(figure("T3", "lstm-12-residual-positions", "mnist"))
    assert (lstm.backbone, lstm.layers, lstm.learning_rate) == ("lstm-residual", 12, 3e-4)
    assert setting(figure("T3", "lstm", "mnist")).backbone == "lstm-paper"
    t5 = figure("T17", "t5-encoder", "listops")
    ours = config(task="listops", backbone={"name": "t5", "size": "base"})

    assert "position" in setting(t5).train
    assert "position" not in ours.train
    assert differences(t5, ours) == ()
    assert differences(t5, ours.model_copy(update={"train": ("norm", "output")})) == (
        "other parameters trained (norm + output)",
    )


def test_a_count_depends_on_the_model_and_not_on_how_it_is_trained() -> None:
    fast = config(task="cifar10", learning_rate=0.5, steps=1, dropout=0.0, protocol="sound")

    assert differences(figure("T8", "base", "layers"), fast) == ()
    assert differences(figure("T8", "medium", "layers"), fast) == (
        "another backbone size (12 layers of width 768, not 24 of width 1024)",
    )


def test_a_pinned_revision_is_no_other_model() -> None:
    backbone = {"name": "gpt2", "weights": f"hub:openai-community/gpt2@{'0' * 40}"}

    assert differences(figure("T2", "language", "bit-xor"), config(backbone=backbone)) == ()


def test_settings_follow_the_names_of_rows_and_columns() -> None:
    assert setting(figure("T15", "output+norm+input", "mnist")).train == {"output", "norm", "input"}
    assert setting(figure("T14", "fpt+feedforward+last-attention", "cifar10")).train == {
        "input", "output", "norm", "position", "feedforward", "attention:last"
    }  # fmt: skip
    assert setting(figure("T11", "6-layers", "random")).layers == 6
    assert setting(figure("T11", "6-layers", "random")).pretraining == "random"
    assert setting(figure("T1", "fpt", "cifar10")).width == 1280
    assert setting(figure("T1", "fpt", "mnist")).width == 768
    assert setting(figure("T16", "language", "norm-frozen")).train == {
        "input",
        "output",
        "position",
    }
    assert setting(figure("T21", "output+norm", "bit-xor")).pretraining == "random"
    assert setting(figure("R1", "full-random", "mnist")).protocol == "sound"
    assert setting(figure("T2", "language", "remote-homology")).learning_rate == 1e-4


def test_the_papers_own_setting_differs_in_nothing() -> None:
    assert differences(figure("T2", "language", "bit-xor"), config()) == ()
    assert differences(figure("T2", "random", "bit-xor"), config(pretraining="random")) == ()
    parent = config(pretraining="trial:" + "0" * 12)
    assert differences(figure("T2", "bit-memory", "bit-xor"), parent) == ()
    everything = config(train="all", pretraining="random")
    assert differences(figure("T1", "full", "bit-xor"), everything) == ()
    depth = config(
        task="listops", backbone={"name": "gpt2", "size": "base", "layers": 6},
        train=["output", "norm"],
    )  # fmt: skip
    assert differences(figure("T11", "6-layers", "language"), depth) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "bit-memory"}, "another task (bit-memory, not bit-xor)"),
        ({"task": {"name": "bit-xor", "bits": 7}}, "another task size (bits 7)"),
        ({"backbone": "bert"}, "another backbone (bert, not gpt2)"),
        (
            {"backbone": {"name": "gpt2", "size": "medium"}},
            "another backbone size (24 layers of width 1024, not 12 of width 768)",
        ),
        ({"pretraining": "random"}, "another pretraining (random, not language)"),
        ({"train": ["output", "norm"]}, "other parameters trained (norm + output)"),
        ({"protocol": "sound"}, "another protocol (sound, not paper)"),
        ({"learning_rate": 0.005}, "another learning rate (0.005, not 0.001)"),
        ({"dropout": 0.0}, "another optimizer or dropout"),
        ({"optimizer": {"warmup": 10}}, "another optimizer or dropout"),
        ({"steps": 499}, "fewer steps than the paper's trials took to converge (T6)"),
    ],
)
def test_each_departure_is_named(change: dict[str, Any], reason: str) -> None:
    found = differences(figure("T2", "language", "bit-xor"), config(**change))

    assert found == (reason,)


def test_the_budget_is_held_against_the_nearer_backbone() -> None:
    # T6: 500 steps with the language backbone, 20,000 with the random one.
    random = config(pretraining="random", steps=500)

    assert differences(figure("T2", "language", "bit-xor"), config(steps=500)) == ()
    assert differences(figure("T2", "random", "bit-xor"), random) == (
        "fewer steps than the paper's trials took to converge (T6)",
    )
    # Steps are what T6 is about: fewer are a result there, no difference.
    assert differences(figure("T6", "random", "bit-xor"), random) == ()


def test_figures_of_other_models_are_never_compared() -> None:
    everything = config(task="listops", train="all")

    quoted = differences(figure("T1", "full", "listops"), everything)

    assert quoted == ("figure of another model and code",)
    assert differences(figure("T7", "linformer", "test"), everything) == quoted


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 512}, "another batch size (512, not 2 to 16)"),
        ({"evaluation": {"batches": 1}}, "another evaluation (1 batches)"),
        ({"backbone": {"name": "gpt2", "layers": 12, "width": 768, "heads": 8,
                       "weights": "hub:some/other"}}, "another number of heads (8, not 12)"),
        ({"backbone": {"name": "gpt2", "weights": "hub:some/other"}},
         "other pretrained weights (hub:some/other)"),
    ],
)  # fmt: skip
def test_what_is_no_rerun_of_the_paper_is_told(fields: dict[str, Any], told: str) -> None:
    theirs = figure("T2", "language", "bit-xor")

    assert differences(theirs, config()) == ()
    assert told in differences(theirs, config(**fields))
