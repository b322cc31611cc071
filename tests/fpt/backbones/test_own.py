"""Backbones of a user's own: their initialisation and their buffers."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fpt.checkpoints import State
from fpt.config import BackboneConfig, TrialConfig
from fpt.model import build_model
from fpt.trainer import Training, train


class Odd(nn.Module):
    groups: ClassVar[Any] = (("norm", "norm"), ("", "feedforward"))

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((config.width,), 0.9))
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(config.width, config.width)
        nn.init.orthogonal_(self.linear.weight)
        self.register_buffer("mix", torch.randn(config.width, config.width))
        self.register_buffer("numpys", torch.from_numpy(np.random.rand(3)))
        self.register_buffer("cache", torch.randn(2), persistent=False)
        self.batch = nn.BatchNorm1d(config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        mixed = torch.tanh(embedded @ self.mix * self.decay) + self.gate * self.linear(embedded)
        out: Tensor = self.norm(self.batch(mixed.mT).mT)
        return out


def trial(**fields: Any) -> TrialConfig:
    backbone = {"name": f"{__name__}:Odd", "layers": 1, "width": 8, "heads": 1}
    return TrialConfig.model_validate(
        {
            "task": "bit-xor",
            "backbone": backbone | fields.pop("backbone", {}),
            "pretraining": "random",
            "steps": 6,
            "evaluation": {"every": 2},
            "train": ["input", "norm", "output"],
            "seed": 0,
        }
        | fields
    )


def tensors(**fields: Any) -> dict[str, Tensor]:
    model = build_model([trial(**fields)])
    return {**model.member(0), **model.own_buffers()}


def test_an_own_backbone_keeps_its_own_initialisation() -> None:
    torch.manual_seed(3)
    own = tensors()

    assert torch.equal(own["backbone.decay"], torch.full((8,), 0.9))
    assert own["backbone.gate"] == 0.5
    square = own["backbone.linear.weight"].detach()
    assert torch.allclose(square @ square.T, torch.eye(8), atol=1e-5)


def test_its_draw_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state()
    one = tensors()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    np.random.seed(4)
    same, other, fixed = tensors(), tensors(seed=1), tensors(seed=1, backbone_seed=0)

    drawn = {name for name in one if name.startswith("backbone.")}
    differs = {name for name in drawn if not torch.equal(one[name], other[name])}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], fixed[name]) for name in drawn)
    assert differs == {
        f"backbone.{name}" for name in ("linear.weight", "linear.bias", "mix", "numpys")
    }


def test_init_gpt2_draws_as_ours_are() -> None:
    own = tensors(backbone={"init": "gpt2"})

    assert torch.equal(own["backbone.decay"], torch.zeros(8))
    assert 0.01 < own["backbone.linear.weight"].std() < 0.03
    assert trial().identity() != trial(backbone={"init": "gpt2"}).identity()
    assert "init" not in trial(backbone={"init": "gpt2"}).identity()["backbone"]
    with pytest.raises(ValueError, match="init: gpt2 is not a class of your own"):
        trial(backbone={"name": "gpt2", "init": "gpt2"})


def end(**options: Any) -> Training:
    training = train([trial()], **options)
    for _ in training:
        pass
    return training


def test_buffers_are_saved_gone_on_from_and_loaded() -> None:
    whole = end().outcomes[0]
    training = train([trial()])
    for record in training:
        if record.step == 2 and training.settled:
            break
    state = State.from_bytes(training.states()[0].to_bytes())
    assert state.part("now")["backbone.batch.num_batches_tracked"] == 2

    resumed = end(state=[state]).outcomes[0]

    assert (resumed.test_loss, resumed.best_step) == (whole.test_loss, whole.best_step)
    assert resumed.state.tensors.keys() == whole.state.tensors.keys()
    for name, tensor in whole.state.tensors.items():
        assert torch.equal(tensor, resumed.state.tensors[name]), name
    model = build_model([trial()], weights=whole.state.checkpoint()).eval()
    tracked = model.own_buffers()["backbone.batch.num_batches_tracked"]
    assert tracked == whole.best_step
    assert "backbone.cache" not in model.own_buffers()


def test_buffers_come_along_with_a_transferred_backbone_and_are_counted(tmp_path: Path) -> None:
    training = end()
    file = tmp_path / "a.safetensors"
    file.write_bytes(training.backbone(0))

    taken = build_model(
        [trial(pretraining="trial:0123456789ab", seed=7)], backbones={"0123456789ab": file}
    )

    trained = training.outcomes[0].state.checkpoint()
    for name, tensor in taken.own_buffers().items():
        assert torch.equal(tensor, trained[name]), name
    assert taken.counts()["buffer"] == {"tensors": 5, "parameters": 84, "trained": 0}
    assert taken.counts()["norm"]["trained"] == 16


def test_weights_of_ones_own_may_be_called_by_any_word(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(end().backbone(0))
    (tmp_path / "config.json").write_text("{}")

    own = trial(pretraining="my corpus", backbone={"weights": str(tmp_path)}, seed=5)

    built = build_model([own])
    theirs = end().outcomes[0].state.checkpoint()
    assert torch.equal(built.own_buffers()["backbone.mix"], theirs["backbone.mix"])
    assert own.identity()["pretraining"] == "my corpus"
    assert "init" not in own.identity()["backbone"]
    with pytest.raises(ValueError, match="unknown pretraining 'my corpus'"):
        trial(pretraining="my corpus")


def test_own_weights_need_no_config_and_have_a_word_of_their_own(tmp_path: Path) -> None:
    drawn = build_model([trial(seed=5)]).backbone.state_dict()
    whole = {name: value.contiguous() for name, value in drawn.items()}
    save_file(whole, tmp_path / "model.safetensors")
    own = trial(backbone={"weights": str(tmp_path)}, pretraining="physics")

    model = build_model([own]).backbone

    for name, value in model.state_dict().items():
        assert torch.equal(value, drawn[name]), name
    assert own.identity()["pretraining"] == "physics"
