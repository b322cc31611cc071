"""What holds for every backbone, whatever its weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fpt import random_streams
from fpt.backbones import AUTO, BACKBONES, NOTHING, row
from fpt.backbones.weights import module_class, to_bytes
from fpt.config import BackboneConfig, TrialConfig
from fpt.files import DataError
from fpt.model import Model, build_model
from fpt.trainer import train
from tests.support import PACKED, TABLE, small

LISTOPS = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 16, "test": 8, "validation": 8,
    "max_depth": 2,
}  # fmt: skip


@pytest.fixture
def published(tmp_path: Path, trial: Any) -> Any:
    """A folder with weights of a small backbone that has positions for eight tokens."""

    def make(name: str) -> Path:
        config = BackboneConfig.model_validate(small(name))
        module = module_class(config.row)(config, 8)
        first = config.row.first_position
        rng = np.random.default_rng(0)
        tensors: dict[str, Tensor] = {}
        for key, parameter in module.named_parameters():
            shape = list(parameter.shape)
            if "position_embeddings" in key:
                shape[0] += first
            tensors[key] = torch.from_numpy(rng.normal(0.1, 0.3, shape).astype(np.float32))
        sizes = {"num_hidden_layers": 2, "hidden_size": 32}
        heads = small(name)["heads"]
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": heads}))
        (tmp_path / "model.safetensors").write_bytes(to_bytes(tensors, {}))
        return tmp_path

    return make


def pretrainings(name: str) -> list[str]:
    modality = BACKBONES[name].modality
    read = [modality, "statistics", "layer-statistics"] if modality else []
    scaled = [] if BACKBONES[name].residual_outputs == NOTHING else ["scaled"]
    return ["random", *scaled, *read, "trial"]


def fits(name: str, kind: str, tokens: int) -> bool:
    """Maps along the sequence are made for one length, that of the trial before."""
    return name not in ("linformer", "mixer") or kind != "trial" or tokens == 10


# Of the two tasks, which have more tokens than a table of eight positions, one has vectors for
# inputs and the other ids.
CASES = [
    (name, kind, task)
    for name in TABLE
    for kind in pretrainings(name)
    for task in (["bit-xor", LISTOPS] if kind in ("random", "trial") else [LISTOPS])
]


@pytest.mark.parametrize(("name", "kind", "task"), CASES)
def test_every_backbone_trains_from_every_pretraining(
    name: str, kind: str, task: Any, trial: Any, published: Any, tmp_path: Path
) -> None:
    """Both tasks have more tokens than the eight positions of the published table."""
    backbone: dict[str, Any] = small(name)
    backbones: dict[str, Path] = {}
    pretraining = "random" if kind == "scaled" else kind
    if kind == "scaled":
        backbone["initialiser"] = "scaled"
    elif kind == "trial":
        parent = train([trial(backbone=backbone, train="all", steps=1)])
        list(parent)
        backbones["0123456789ab"] = tmp_path / "parent.safetensors"
        backbones["0123456789ab"].write_bytes(parent.backbone(0))
        pretraining = "trial:0123456789ab"
    elif kind != "random":
        backbone["weights"] = str(published(name))
    one = trial(backbone=backbone, pretraining=pretraining, task=task, steps=2)
    if not fits(name, kind, one.task.shape("sound").tokens):
        with pytest.raises(DataError, match=r"weight is \(1[06], 10\), wanted \(1[26], 12\)"):
            train([one], backbones=backbones)
        return

    training = train([one], backbones=backbones)
    list(training)
    again = train([one], backbones=backbones)
    list(again)

    outcome = training.outcomes[0]
    assert outcome.outcome == "done"
    assert outcome.test_loss == again.outcomes[0].test_loss
    assert outcome.backbone_digest == again.outcomes[0].backbone_digest
    frozen = [g for g, counts in outcome.groups.items() if not counts["trained"]]
    assert {"attention", "feedforward", "recurrent"} & set(frozen)


@pytest.mark.parametrize("name", PACKED)
def test_positions_beyond_the_published_ones_are_drawn_and_counted(
    name: str, trial: Any, published: Any
) -> None:
    if "position" not in BACKBONES[name].trainable:
        pytest.skip(f"{name} has no table of positions")
    backbone = small(name) | {"weights": str(published(name))}
    one = trial(backbone=backbone, pretraining=BACKBONES[name].modality)
    counts = build_model([one]).counts()["position"]

    # ViT's table is its own, as long as the sequence.
    assert counts["drawn"] == (0 if name == "vit" else (10 - 8) * 32)
    assert counts["parameters"] == 10 * 32


@pytest.mark.parametrize("name", TABLE)
def test_everything_trains_where_all_is_asked_for(name: str, trial: Any) -> None:
    counts = build_model([trial(backbone=small(name), train="all")]).counts()
    for group, row_ in counts.items():
        assert row_["trained"] == (0 if group == "token" else row_["parameters"]), group


@pytest.mark.parametrize("name", TABLE)
def test_a_set_that_a_backbone_lacks_is_refused_with_what_it_has(name: str, trial: Any) -> None:
    has = BACKBONES[name].trainable
    for group in {"attention", "recurrent", "position", "feedforward"} - set(has):
        with pytest.raises(
            ValueError, match=f"{name} has no group {group}; it has attention|input"
        ):
            trial(backbone=small(name), train=[group])


@pytest.mark.parametrize("name", TABLE)
def test_the_default_set_is_that_of_an_fpt_as_far_as_the_backbone_has_it(
    name: str, trial: Any
) -> None:
    wanted = {"input", "norm", "output", "position"} & set(BACKBONES[name].trainable)
    assert set(trial(backbone=small(name)).train) == wanted


@pytest.mark.parametrize("name", [n for n in TABLE if BACKBONES[n].causal])
def test_a_causal_backbone_does_not_see_what_comes_after(name: str, trial: Any) -> None:
    model = build_model([trial(backbone=small(name))]).eval()
    x = torch.rand(2, 10, 1)
    changed = x.clone()
    changed[:, 7:] += 1

    with torch.no_grad():
        before, after = (hidden_states(model, given) for given in (x, changed))
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", [n for n in TABLE if not BACKBONES[n].causal])
def test_a_backbone_that_is_not_causal_sees_both_ways(name: str, trial: Any) -> None:
    model = build_model([trial(backbone=small(name))]).eval()
    x = torch.rand(2, 10, 1)
    changed = x.clone()
    changed[:, 9:] += 1

    with torch.no_grad():
        before, after = (hidden_states(model, given) for given in (x, changed))
    assert not torch.equal(before[:, 0], after[:, 0])


def hidden_states(model: Model, x: Tensor) -> Tensor:
    """What the backbone makes of inputs, at every position."""
    kept: list[Tensor] = []

    def look(module: torch.nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        if not kept:  # without what would pick the positions that are read out
            kept.append(torch.empty(0))
            kept.append(module(*given[:2]) if getattr(module, "reads_out", False) else out)

    hook = model.backbone.register_forward_hook(look)
    model(x)
    hook.remove()
    return kept[1]


def test_hidden_states_are_drawn_anew_at_every_step_and_can_be_given(trial: Any) -> None:
    one = trial(backbone=small("lstm-paper"), dropout=0.0, steps=3)
    batches = [
        one.task.splits("sound").train.batch(0, random_streams.TRAINING, s, 4) for s in range(3)
    ]
    hidden = np.random.default_rng(0).normal(size=(4, 2, 2, 32)).astype(np.float32)

    def losses(state: Any) -> list[float]:
        own = [[(b.inputs, b.targets, None, state) for b in batches]]
        return [r.loss for r in train([one], batches=own, log_every=1) if r.split == "train"]

    assert losses(hidden) == losses(hidden) != losses(2 * hidden)
    assert losses(None) == [r.loss for r in train([one], log_every=1) if r.split == "train"]
    model = build_model([one]).train()
    x = torch.rand(4, 10, 1)
    first = model(x)
    assert torch.equal(first, model(x))
    model.members.steps[0] = 1
    assert not torch.equal(first, model(x))


OWN = """
import torch
from torch import nn

class Mean(nn.Module):
    groups = ((r"norm", "norm"), (r"feed", "feedforward"))
    version = 3
    def __init__(self, config, tokens):
        super().__init__()
        self.feed = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(config.width)
    def forward(self, embedded, mask):
        return self.norm(self.drop(self.feed(embedded)) + embedded.mean(1, keepdim=True))

class Bare(nn.Module):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a user's own classes."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_users_own_class_is_a_backbone(own: str, trial: Any) -> None:
    backbone = {"name": f"{own}:Mean", "layers": 1, "width": 16, "heads": 1}
    one: TrialConfig = trial(backbone=backbone, steps=4, dropout=0.3)
    outcomes = []
    for _ in range(2):
        training = train([one])
        list(training)
        outcomes.append(training.outcomes[0])

    assert one.train == ("input", "norm", "output")
    assert (
        outcomes[0].test_loss == outcomes[1].test_loss
    )  # its dropout too is a function of the seed
    assert outcomes[0].groups["feedforward"]["trained"] == 0
    assert one.identity()["backbone"]["version"] == 3
    assert row(f"{own}:Mean").packs is False


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("{own}:Bare", "has no `groups`"),
        ("{own}:Meen", "has no class Meen"),
        ("nowhere_at_all:Mean", r"there is no module nowhere_at_all; put nowhere_at_all\.py"),
        ("a b:Mean", "not of the form module:Class"),
        ("gtp2", "unknown backbone 'gtp2'; known: gpt2, bert"),
    ],
)
def test_a_backbone_that_is_none_is_told(own: str, name: str, what: str, trial: Any) -> None:
    backbone = {"name": name.format(own=own), "layers": 1, "width": 16, "heads": 1}
    with pytest.raises(ValueError, match=what):
        trial(backbone=backbone)


def test_the_table_names_classes_that_are_there() -> None:
    for name, one in BACKBONES.items():
        assert issubclass(module_class(one), torch.nn.Module), name
        assert one.sizes or name == AUTO
