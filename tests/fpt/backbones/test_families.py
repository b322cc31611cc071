"""What holds for every family that `auto` knows, against transformers' own models of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fpt.attention_maps import attention_maps
from fpt.backbones import AUTO, families
from fpt.backbones.families import FAMILIES, Family
from fpt.backbones.headers import Count, inventory
from fpt.config import TrialConfig
from fpt.files import DataError
from fpt.model import Model, build_model
from fpt.representations import hidden_states
from fpt.tasks.base import Batch
from fpt.trainer import train
from tests.fpt.backbones import tiny

ROWS, TOKENS = 3, 10
FEW = {"name": "bit-xor", "examples": 8}
SHORT = {
    "name": "listops", "max_length": 12, "min_length": 3, "train": 16, "test": 8, "validation": 8,
    "max_depth": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' own model, its directory) of a family, each made once."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(kind: str) -> tuple[Any, Path]:
        return tiny.save(kind, root / kind), root / kind

    return make


def config(trial: Any, folder: Path, kind: str, **changes: Any) -> TrialConfig:
    given = {
        "backbone": {"name": "auto", "weights": str(folder)},
        "pretraining": FAMILIES[kind].modality,
        "task": FEW,
    }
    made: TrialConfig = trial(**given | changes)
    return made


KNOWN_TO_BE = {
    "speech": ("wav2vec2", "hubert", "whisper"),
    "protein": ("esm",),
    "image": ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip",
              "clip_vision_model", "siglip", "siglip_vision_model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mamba", *sum(KNOWN_TO_BE.values(), ())])
def test_what_weights_were_pretrained_on_is_told_rightly(kind: str, saved: Any, trial: Any) -> None:
    _, folder = saved(kind)
    own = next((word for word, kinds in KNOWN_TO_BE.items() if kind in kinds), None)

    for word in ("language", "image", "speech", "protein"):
        if own in (None, word):  # A language model's architecture is used for any sequences.
            assert config(trial, folder, kind, pretraining=word).pretraining == word
        else:
            with pytest.raises(ValueError, match=f"pretraining {word}: auto was pretrained on"):
                config(trial, folder, kind, pretraining=word)


class _Given(nn.Module):
    # Stands in for a front end: whatever it is called with, it gives the embedded tokens.

    def __init__(self, embedded: Tensor) -> None:
        super().__init__()
        self.embedded = embedded
        patches = nn.Module()
        patches.projection = nn.Linear(1, 1)
        patches.weight = nn.Parameter(torch.zeros(1))
        self.patch_embeddings = patches

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.embedded


class _Unturned(nn.Module):
    # Stands in for the angles of patches in two dimensions: turns nothing.

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(TOKENS, 8), torch.zeros(TOKENS, 8)


def theirs(kind: str, own: Any, embedded: Tensor, mask: Tensor | None) -> Tensor:
    """The last hidden states of transformers' own model, called with embedded tokens."""
    family = FAMILIES[kind]
    if family.sub is not None:
        own = own.vision_model
    mask4 = None
    if mask is not None:
        mask4 = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        mask4 = mask4[:, None, None].expand(-1, 1, TOKENS, -1)
    if kind == "whisper":
        hidden = embedded + own.encoder.embed_positions.weight[:TOKENS]
        for layer in own.encoder.layers:
            hidden = layer(hidden, mask4)
        normed: Tensor = own.encoder.layer_norm(hidden)
        return normed
    given: dict[str, Any] = {}
    if kind == "perceiver":
        reads = own.perceiver
        reads.input_preprocessor.embeddings = nn.Identity()
        decoded: Tensor = reads(embedded, mask).logits  # of all positions that there are
        return decoded[:, :TOKENS]
    if family.tower is None:
        called = own.get_submodule(family.part)
        given[family.argument] = embedded.clone()
        if mask is not None and kind != "fnet":
            given["attention_mask"] = mask if family.part == "encoder" else mask.long()
    else:
        called, front = own, own.embeddings
        own.embeddings = _Given(embedded)
        given["pixel_values"] = torch.zeros(ROWS, 3, 8, 8)
        if mask is not None:
            # What builds its masks itself takes the tokens; the others the scores to be added.
            builds = "clip" not in kind and "siglip" not in kind and kind != "dinov3_vit"
            given["attention_mask"] = mask if builds else mask4
        if kind == "dinov3_vit":
            own.rope_embeddings = _Unturned()
        layers = own.get_submodule(family.tower[1])
        for layer in layers:
            if hasattr(layer, "relative_position_bias"):
                layer.relative_position_bias = None  # over patches in two dimensions
    try:
        out: Tensor = called(**given).last_hidden_state
    finally:
        if family.tower is not None:
            own.embeddings = front
    return out


def ours(model: Model, embedded: Tensor, mask: Tensor | None) -> Tensor:
    model.members.rows = [len(embedded)]
    model.members.tokens = embedded.shape[1]
    model.members.uses.clear()
    hidden: Tensor = model.backbone(embedded, mask)
    return hidden


def width_in(model: Model) -> int:
    return int(getattr(model.backbone, "input_width", 32))


def padding() -> Tensor:
    return torch.arange(TOKENS) < torch.tensor([TOKENS, 6, 3])[:, None]


def test_there_are_thirty_families_and_each_is_tried() -> None:
    assert len({family.title for family in FAMILIES.values()}) >= 30
    assert FAMILIES.keys() == tiny.CONFIGS.keys()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_forward_pass_is_transformers_own(kind: str, saved: Any, trial: Any) -> None:
    own, folder = saved(kind)
    own = type(own).from_pretrained(folder, attn_implementation="eager").eval()
    model = build_model([config(trial, folder, kind)]).eval()
    embedded = torch.randn(ROWS, TOKENS, width_in(model), generator=torch.manual_seed(1))
    mask = padding()

    with torch.no_grad():
        expected = theirs(kind, own, embedded, None)
        torch.testing.assert_close(ours(model, embedded, None), expected, rtol=1e-5, atol=1e-5)
        found = ours(model, embedded, mask)
        if kind == "fnet":
            # It takes no mask: each row is compared with itself, cut to its real tokens.
            for row, length in zip(range(ROWS), mask.sum(1).tolist(), strict=True):
                cut = own(inputs_embeds=embedded[row : row + 1, :length]).last_hidden_state
                torch.testing.assert_close(found[row, :length], cut[0], rtol=1e-5, atol=1e-5)
            return
        expected = theirs(kind, own, embedded, mask)
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_changes_nothing(kind: str, saved: Any, trial: Any) -> None:
    model = build_model([config(trial, saved(kind)[1], kind)]).eval()
    embedded = torch.randn(ROWS, TOKENS, width_in(model), generator=torch.manual_seed(1))
    mask = padding()
    other = torch.where(mask[..., None], embedded, torch.full_like(embedded, 3.0))

    with torch.no_grad():
        expected, found = ours(model, embedded, mask), ours(model, other, mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_is_in_one_group_or_left_out_by_name(
    kind: str, saved: Any, trial: Any
) -> None:
    own, folder = saved(kind)
    family = FAMILIES[kind]
    model = build_model([config(trial, folder, kind)])
    built = {n.removeprefix("backbone."): p for n, p in model.member(0).items()}
    tower = own if family.sub is None else own.vision_model

    total, used = 0, 0
    for name, parameter in tower.named_parameters():
        group, left_out = families.sort(family, name)
        assert (group is None) != (left_out is None), name
        total += parameter.numel()
        if name in built and group != "position":
            used += parameter.numel()
            assert torch.equal(built[name], parameter), name
            assert model.groups[f"backbone.{name}"] == group
        elif group is not None:
            assert group in ("token", "position"), name
    counts = model.counts()
    trained_apart = ("input", "output", "position")
    assert used == sum(row["parameters"] for g, row in counts.items() if g not in trained_apart)
    assert total == sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_frozen_stays_and_a_resumed_trial_ends_the_same(
    kind: str, saved: Any, trial: Any
) -> None:
    one = config(trial, saved(kind)[1], kind, steps=4, evaluation={"every": 2}, batch_size=2)
    before = {n: p.detach().clone() for n, p in build_model([one]).member(0).items()}
    whole = train([one])
    halfway = None
    for _ in whole:
        if whole.settled and (states := whole.states()) and states[0].step == 2:
            halfway = halfway or states[0].to_bytes()
    after = whole.model.member(0)

    assert halfway is not None
    for name, parameter in after.items():
        moved = not torch.equal(parameter, before[name])
        # A gradient may be nothing: of a bias behind a softmax, or of an unused row.
        assert not moved or name in whole.model.trained, name
    norms = [n for n, g in whole.model.groups.items() if g == "norm"]
    assert any(not torch.equal(after[n], before[n]) for n in norms)
    resumed = train([one], state=[type(whole.outcomes[0].state).from_bytes(halfway)])
    list(resumed)
    for name, parameter in resumed.model.member(0).items():
        assert torch.equal(parameter, after[name]), name
    assert resumed.outcomes[0].test_loss == whole.outcomes[0].test_loss


PACKING = [kind for kind, family in FAMILIES.items() if family.alone is None]


@pytest.mark.parametrize("kind", PACKING)
def test_a_pack_has_the_bits_of_its_members_alone(kind: str, saved: Any, trial: Any) -> None:
    given: dict[str, Any] = {"steps": 2, "evaluation": {"every": 2}, "batch_size": 2, "task": SHORT}
    trials = [
        config(trial, saved(kind)[1], kind, seed=seed, dropout=dropout, **given)
        for seed, dropout in ((0, 0.1), (1, 0.0), (2, 0.1))
    ]
    pack = train(trials)
    list(pack)

    for number, one in enumerate(trials):
        alone = train([one])
        list(alone)
        mine, own = pack.model.member(number), alone.model.member(0)
        for name in alone.model.trained:
            assert torch.equal(mine[name], own[name]), name
        assert pack.outcomes[number].test_loss == alone.outcomes[0].test_loss


TWINS = ("gemma2", "dinov2", "mamba", "mamba2", "wav2vec2", "albert", "perceiver")
"""Those whose random backbones begin with constants, whose layers share their weights, or whose
position tables are two."""


@pytest.mark.parametrize(
    "kind", [k if k in TWINS else pytest.param(k, marks=pytest.mark.slow) for k in FAMILIES]
)
def test_a_random_twin_and_a_statistics_twin_train(kind: str, saved: Any, trial: Any) -> None:
    for pretraining in ("random", "statistics"):
        one = config(trial, saved(kind)[1], kind, pretraining=pretraining, steps=1, batch_size=2)
        training = train([one])
        list(training)
        assert training.outcomes[0].outcome == "done"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_causal_family_sees_nothing_of_what_comes_after(
    kind: str, saved: Any, trial: Any
) -> None:
    model = build_model([config(trial, saved(kind)[1], kind)]).eval()
    embedded = torch.randn(ROWS, TOKENS, width_in(model), generator=torch.manual_seed(1))
    changed = embedded.clone()
    changed[:, 7:] = changed[:, 7:].flip(-1)

    with torch.no_grad():
        before, after = ours(model, embedded, None)[:, :7], ours(model, changed, None)[:, :7]
    assert torch.allclose(before, after, atol=1e-6) == FAMILIES[kind].causal


@pytest.mark.parametrize(
    "kind", [k if k in TWINS else pytest.param(k, marks=pytest.mark.slow) for k in FAMILIES]
)
def test_a_trained_backbone_is_saved_and_read_back(
    kind: str, saved: Any, trial: Any, tmp_path: Path
) -> None:
    one = config(trial, saved(kind)[1], kind, train=["input", "norm", "output"], steps=1)
    parent = train([one])
    list(parent)
    file = tmp_path / "parent.safetensors"
    file.write_bytes(parent.backbone(0))
    child = config(trial, saved(kind)[1], kind, pretraining="trial:0123456789ab")
    model = build_model([child], backbones={"0123456789ab": file})

    trained = parent.model.member(0)
    for name, parameter in model.member(0).items():
        if name.startswith("backbone."):
            assert torch.equal(parameter, trained[name]), name


def test_perceivers_layers_hold_no_tokens_which_is_said(saved: Any, trial: Any) -> None:
    model = build_model([config(trial, saved("perceiver")[1], "perceiver")])
    batch = Batch(np.zeros((4, TOKENS, 1), np.float32), np.zeros((4, 5), np.int64))

    with pytest.raises(ValueError, match="holds latents between its layers, not tokens"):
        hidden_states(model, batch)
    with pytest.raises(ValueError, match="by way of latents, not from token to token"):
        attention_maps(model, batch)


@pytest.mark.parametrize("kind", ["PerceiverModel", "PerceiverForImageClassificationLearned"])
def test_a_perceiver_whose_decoder_has_no_query_a_token_is_refused(
    kind: str, trial: Any, tmp_path: Path
) -> None:
    tiny.save("perceiver", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [kind]}))

    with pytest.raises(ValueError, match=rf"architectures: \['{kind}'\], and Perceiver IO can on"):
        config(trial, tmp_path, "perceiver")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "kind", ["perceiver", "qwen2", "gemma2", "modernbert", "gpt_neo", "bart", "dinov2"]
)
def test_fewer_layers_are_the_first_ones(kind: str, layers: int, saved: Any, trial: Any) -> None:
    own, folder = saved(kind)
    backbone = {"name": "auto", "weights": str(folder), "layers": layers, "width": 32, "heads": 4}
    model = build_model([config(trial, folder, kind, backbone=backbone)])

    numbers = {
        found.group(1)
        for name in model.groups
        if (found := families.re.search(FAMILIES[kind].layer, name.removeprefix("backbone.")))
    }
    assert numbers == {str(n) for n in range(layers)}
    assert own is not None


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"model_type": "xlnet"}, "config.json: model_type: no rules for 'xlnet'; known: albert"),
        ({"model_type": None}, "names no model_type"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}},
            r"the code that comes with these weights \(auto_map\) is never run",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
        ({"max_position_embeddings": 4}, "task bit-xor has 10 tokens, and .* positions for 4"),
        ({"hidden_size": "wide"}, "does not say how many layers, heads and how wide"),
    ],
)
def test_what_auto_cannot_run_is_refused_before_anything_starts(
    said: dict[str, Any], what: str, trial: Any, tmp_path: Path
) -> None:
    tiny.save("llama", tmp_path)
    (tmp_path / "modeling.py").write_text("raise SystemExit('the code ran')\n")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))

    with pytest.raises((ValueError, DataError), match=what):
        config(trial, tmp_path, "llama")


def test_a_hub_id_and_a_missing_directory_are_refused(trial: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"auto: set backbone\.weights to a directory"):
        config(trial, Path("hub:some"), "llama", backbone={
            "name": AUTO, "weights": "hub:some/model", "layers": 1, "width": 8, "heads": 1
        })  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        trial(
            backbone={"name": AUTO, "weights": str(tmp_path), "layers": 1, "width": 8, "heads": 1}
        )


def test_a_family_without_positions_has_no_such_group(saved: Any, trial: Any) -> None:
    one = config(trial, saved("llama")[1], "llama")

    assert one.train == ("input", "norm", "output")
    with pytest.raises(ValueError, match="train: auto has no group position"):
        config(trial, saved("llama")[1], "llama", train=["position"])
    assert "scale" in config(trial, saved("dinov2")[1], "dinov2", train="all").train


def test_rules_are_regular_expressions_and_groups_are_known() -> None:
    known = {"norm", "position", "attention", "feedforward", "recurrent", "scale", "token"}
    for family in FAMILIES.values():
        assert isinstance(family, Family)
        assert {group for _, group in family.groups} <= known
        for rule, _ in (*family.groups, *family.left_out, *family.renames):
            families.re.compile(rule)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_inventory_counts_what_transformers_own_model_has(kind: str, saved: Any) -> None:
    own, folder = saved(kind)
    found = inventory(str(folder))

    total = sum(count.parameters for count in (*found.groups.values(), *found.left_out.values()))
    constants = found.left_out.get("constants", Count()).parameters
    assert found.unknown == []
    assert total - constants == sum(p.numel() for p in own.parameters())


@pytest.mark.parametrize("before", ["student.", "_forward_module.net."])
def test_an_inventory_is_the_same_behind_any_word(before: str, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    plain = inventory(str(tmp_path)).groups
    file = tmp_path / "model.safetensors"
    save_file({before + name: tensor for name, tensor in load_file(file).items()}, file)
    inventory.cache_clear()

    found = inventory(str(tmp_path))
    assert found.groups == plain
    assert found.unknown == []


def test_a_parameter_without_a_rule_is_named_with_what_to_do(trial: Any, tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"layers.0.router.gate": torch.ones(2)}, file)

    with pytest.raises(
        ValueError, match=r"no rule for layers\.0\.router\.gate; write backbone\.gr"
    ):
        config(trial, tmp_path, "llama")
