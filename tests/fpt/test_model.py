"""The model against first principles: published counts, plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fpt.model import Model, build_model
from tests.support import PACKED, small

# The paper's own list: what trains in its code with GPT-2 base, without position rows; and the
# tokens of each task.
PUBLISHED = {
    "bit-memory": (154_468, 120),
    "bit-xor": (41_474, 10),
    "listops": (57_610, 512),
    "mnist": (59_146, 49),
    "cifar10": (83_722, 64),
    "cifar10-lra": (47_626, 1024),
    "remote-homology": (984_240, 1024),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_trained_counts_of_gpt2_base_are_the_published_ones(task: str, trial: Any) -> None:
    model = build_model([trial(task=task, protocol="paper", backbone="gpt2")])
    counts = {group: row["trained"] for group, row in model.counts().items()}
    without_positions, tokens = PUBLISHED[task]

    assert counts["input"] + counts["output"] + counts["norm"] == without_positions
    assert counts["position"] == 768 * tokens
    assert counts["attention"] == counts["feedforward"] == 0


def test_frozen_gpt2_base_has_the_parameters_of_gpt2_without_its_token_table(trial: Any) -> None:
    counts = build_model([trial(backbone="gpt2")]).counts()
    frozen = sum(counts[group]["parameters"] for group in ("attention", "feedforward", "norm"))

    # 124,439,808 published, less 50,257 x 768 tokens and 1,024 x 768 positions.
    assert frozen == 124_439_808 - (50_257 + 1_024) * 768


def gpt2_by_hand(model: Model, x: Tensor, heads: int) -> Tensor:
    """GPT-2 in plain torch: input layer, positions, pre-norm blocks, final norm, output layer."""
    p = {name: parameter.detach() for name, parameter in model.member(0).items()}

    def norm(h: Tensor, name: str) -> Tensor:
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, correction=0)
        weight, bias = p[f"backbone.{name}.weight"], p[f"backbone.{name}.bias"]
        return (h - mean) / (variance + 1e-5).sqrt() * weight + bias

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ p[f"backbone.{name}.weight"] + p[f"backbone.{name}.bias"]

    batch, tokens, _ = x.shape
    h = x @ p["input.weight"].T + p["input.bias"] + p["backbone.wpe.weight"]
    width = h.shape[-1]
    past = torch.ones(tokens, tokens).tril() == 0
    for layer in range(model.trials[0].backbone.layers):
        q, k, v = linear(norm(h, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(width, -1)
        q, k, v = (
            t.reshape(batch, tokens, heads, width // heads).transpose(1, 2) for t in (q, k, v)
        )
        scores = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).masked_fill(past, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
        h = h + linear(mixed, f"h.{layer}.attn.c_proj")
        inner = linear(norm(h, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        cubic = (2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)
        h = h + linear(0.5 * inner * (1 + torch.tanh(cubic)), f"h.{layer}.mlp.c_proj")
    read = norm(h, "ln_f")[:, -model.shape.readout :]
    logits = read @ p["output.weight"].T + p["output.bias"]
    return logits.reshape(batch, model.shape.positions, model.shape.classes)


@pytest.mark.parametrize("task", ["bit-xor", {"name": "bit-memory", "bits": 30, "patch": 10}])
def test_gpt2_equals_a_forward_written_by_hand(task: Any, trial: Any) -> None:
    model = build_model([trial(task=task)]).eval()
    x = torch.randn(4, model.shape.tokens, model.shape.inputs)

    with torch.no_grad():
        torch.testing.assert_close(model(x), gpt2_by_hand(model, x, heads=2), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_under_the_mask(trial: Any) -> None:
    task = {"name": "listops", "max_length": 12, "min_length": 3, "train": 8, "test": 4,
            "validation": 4, "max_depth": 2}  # fmt: skip
    model = build_model([trial(task=task, backbone={"name": "bert", "size": "tiny"})]).eval()
    ids = torch.randint(0, model.shape.inputs, (2, model.shape.tokens))
    other = ids.clone()
    other[:, 6:] = 0
    lengths = torch.tensor([6, 6])

    with torch.no_grad():
        torch.testing.assert_close(model(ids, lengths), model(other, lengths))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_what_is_read_out_is_what_the_whole_backbone_gives_there(
    name: str, padded: bool, trial: Any
) -> None:
    # The last layer computes these positions alone; masks of dropout stay those of all positions.
    own = {"name": name, "layers": 3, "width": 32, "heads": small(name)["heads"]}
    model = build_model([trial(backbone=own, dropout=0.3), trial(backbone=own, seed=1)]).train()
    x = torch.randn(4, model.shape.tokens, model.shape.inputs)
    lengths = torch.tensor([5, 9, 7, 10]) if padded else None
    mask = None if lengths is None else torch.arange(x.shape[1]) < lengths[:, None]
    with model.members.batch({0: 2, 1: 2}):
        read = model.features(x, lengths)
        model.members.uses.clear()
        everywhere = model.backbone(model.input_dropout(model.input(x)), mask)
    last = lengths if lengths is not None else torch.full((4,), x.shape[1])
    for row, end in enumerate(last.tolist()):
        here = everywhere[row, end - model.shape.readout : end]
        assert torch.allclose(read[row], here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_members_of_a_pack_are_bitwise_what_they_are_alone(name: str, trial: Any) -> None:
    backbone = small(name)
    trials = [
        trial(backbone=backbone, seed=s, dropout=d) for s, d in ((0, 0.1), (1, 0.0), (2, 0.3))
    ]
    x = torch.randn(12, 10, 1)
    pack = build_model(trials).train()
    together = pack(x)
    together.square().sum().backward()

    for k, one in enumerate(trials):
        alone = build_model([one]).train()
        logits = alone(x[4 * k : 4 * k + 4])
        logits.square().sum().backward()
        assert torch.equal(logits, together[4 * k : 4 * k + 4])
        gradients = {n: p.grad for n, p in pack.member(k).items() if p.requires_grad}
        for parameter, value in alone.member(0).items():
            if value.requires_grad:
                assert torch.equal(gradients[parameter], value.grad), parameter


def test_random_weights_follow_the_named_initialiser(trial: Any) -> None:
    backbone = {"name": "gpt2", "layers": 8, "width": 128, "heads": 4}
    plain = build_model([trial(backbone=backbone)]).member(0)
    scaled = build_model([trial(backbone=backbone | {"initialiser": "scaled"})]).member(0)
    name = "backbone.h.3.mlp.c_proj.weight"

    assert plain[name].std().item() == pytest.approx(0.02, rel=0.02)
    assert scaled[name].std().item() == pytest.approx(0.02 / 16**0.5, rel=0.02)
    assert torch.equal(
        plain["backbone.h.3.mlp.c_fc.weight"], scaled["backbone.h.3.mlp.c_fc.weight"]
    )
    assert plain["backbone.h.3.ln_1.weight"].eq(1).all()
    assert plain["backbone.h.3.mlp.c_fc.bias"].eq(0).all()


def test_statistics_keeps_mean_and_deviation_of_each_tensor_and_nothing_else(trial: Any) -> None:
    tiny = {"name": "gpt2", "size": "tiny"}
    read = build_model([trial(backbone=tiny, pretraining="language")]).member(0)
    redrawn = build_model([trial(backbone=tiny, pretraining="statistics")]).member(0)
    name = "backbone.h.1.mlp.c_fc.weight"

    assert redrawn[name].std().item() == pytest.approx(read[name].std().item(), rel=0.02)
    correlation = torch.corrcoef(torch.stack([read[name].flatten(), redrawn[name].flatten()]))
    assert abs(correlation[0, 1].item()) < 0.02


def test_fewer_layers_are_the_first_layers_of_the_pretrained_backbone(trial: Any) -> None:
    whole = build_model([trial(backbone={"name": "gpt2", "size": "tiny"}, pretraining="language")])
    half = build_model(
        [trial(backbone={"name": "gpt2", "size": "tiny", "layers": 2}, pretraining="language")]
    )

    for name, parameter in half.member(0).items():
        if name.startswith("backbone.h."):
            assert torch.equal(parameter, whole.member(0)[name])


def test_positions_beyond_the_pretrained_table_are_each_members_own_draw(trial: Any) -> None:
    long = {"name": "bit-xor", "bits": 100}  # 200 tokens; the shipped table has 128 rows
    tiny = {"name": "gpt2", "size": "tiny"}
    trials = [trial(task=long, backbone=tiny, pretraining="language", seed=s) for s in (0, 1)]
    pack = build_model(trials)
    tables = [pack.member(k)["backbone.wpe.weight"] for k in (0, 1)]

    assert torch.equal(tables[0][:128], tables[1][:128])
    assert not torch.equal(tables[0][128:], tables[1][128:])
    assert tables[0][128:].std().item() == pytest.approx(0.02, rel=0.05)
    assert pack.counts()["position"]["drawn"] == 72 * 128
    alone = build_model([trials[1]]).member(0)["backbone.wpe.weight"]
    assert torch.equal(alone, tables[1])


def test_input_layer_is_orthogonal_with_the_public_codes_gain(trial: Any) -> None:
    task = {"name": "bit-memory", "bits": 30, "patch": 10}
    weight = build_model([trial(task=task)]).member(0)["input.weight"].detach()

    torch.testing.assert_close(weight.T @ weight, 1.41**2 * torch.eye(10), rtol=0, atol=1e-5)


def test_only_what_trains_requires_a_gradient(trial: Any) -> None:
    model = build_model([trial(train=["output", "attention:last"])])
    trained = {name for name, p in model.member(0).items() if p.requires_grad}

    assert trained == {"output.weight", "output.bias"} | {
        f"backbone.h.1.attn.{layer}.{leaf}"
        for layer in ("c_attn", "c_proj")
        for leaf in ("weight", "bias")
    }


def test_what_cannot_be_packed_is_refused(trial: Any) -> None:
    with pytest.raises(ValueError, match="cannot share a backbone"):
        build_model([trial(train="all", seed=s) for s in (0, 1)])
    own = small("longformer")  # its products see tokens first
    with pytest.raises(ValueError, match="these do not"):
        build_model([trial(seed=s, backbone_seed=None, backbone=own) for s in (0, 1)])
    with pytest.raises(ValueError, match="no trials"):
        build_model([])


def test_weights_of_the_caller_are_checked(trial: Any) -> None:
    with pytest.raises(ValueError, match="no parameter named out"):
        build_model([trial()], weights={"out": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"output.bias is \(3,\), wanted \(2,\)"):
        build_model([trial()], weights={"output.bias": torch.zeros(3)})
