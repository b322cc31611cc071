"""The class bf16: how far it is from fp32, what stays in fp32, and where it is refused."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fpt import exactness, precision
from fpt.checkpoints import State
from fpt.files import DataError
from fpt.model import build_model
from fpt.pack_layers import SharedLinear
from fpt.packing import pack_key
from fpt.trainer import Outcome, Training, train
from tests.support import PACKED, small

U16 = 2.0**-8
"""Half the distance of two numbers of bfloat16, relative to them: the error of one rounding."""
U32 = 2.0**-24
"""The same of float32."""

PRODUCTS = ("attention", "feedforward")
"""The groups with products that are shared."""


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A processor with AMX, by what torch tells of it; products in bfloat16 are right on any."""
    has = {"architecture": "x86_64", "avx2": True, "amx_bf16": True, "l2_cache_size": 1 << 20}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    return has


def finish(training: Training) -> Outcome:
    for _ in training:
        pass
    return training.outcomes[0]


def products(model: nn.Module) -> dict[str, SharedLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, SharedLinear)}


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- how far


def within(x: Tensor, weight: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
    """The most that an element of `x @ weight + bias` may be off, against all of it in float64.

    Both operands are rounded, (1 + u)^2 - 1 of the sum of magnitudes; n terms are added in float32
    in any order, n u32 of it; the sum is rounded once, u of it; then the bias in float32.
    """
    magnitude = x.abs().double() @ weight.abs().double()
    exact = x.double() @ weight.double()
    error = magnitude * (2 * U16 + U16**2) * (1 + U32) ** len(weight)
    error += magnitude * (1 + U16) ** 2 * 2 * len(weight) * U32
    error += U16 * (exact.abs() + error)
    return error if bias is None else error + U32 * (product.abs() + error)


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("rows", [1, 31, 64])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv"])
def test_a_product_and_its_gradient_are_off_by_roundings_and_no_more(
    kind: str, rows: int, device: str
) -> None:
    torch.manual_seed(0)
    wide, narrow = 96, 48
    layer = Conv1D(narrow, wide) if kind == "conv" else nn.Linear(wide, narrow, kind != "no bias")
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer.requires_grad_(requires_grad=False)
    weight = layer.weight if kind == "conv" else layer.weight.t()
    bias = layer.bias
    x = torch.randn(rows, wide)
    upstream = torch.randn(rows, narrow)

    there = x.detach().to(device).requires_grad_()
    out = SharedLinear(copy.deepcopy(layer).to(device), "bf16")(there)
    out.backward(upstream.to(device))

    assert there.grad is not None
    assert out.dtype == there.grad.dtype == torch.float32
    out, grad = out.detach().cpu(), there.grad.cpu()
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    assert ((out - exact).abs() <= within(x, weight, exact, bias)).all()
    back = upstream.double() @ weight.double().t()
    assert ((grad - back).abs() <= within(upstream, weight.t(), back, None)).all()
    # And it is not fp32 in disguise.
    assert gap(out.double(), exact) > 100 * U32


@pytest.mark.parametrize("name", PACKED)
def test_a_model_and_its_gradients_are_off_by_a_rounding_a_product(name: str, trial: Any) -> None:
    """A product is off by less than u, by norms: roundings are 0.4 u on average, and those of both
    operands and of the sum are independent. Forward and backward are chains of products, whose
    errors at worst add up.
    """
    inputs = torch.randn(8, 10, 1, generator=torch.Generator().manual_seed(0)).sign()
    target = torch.arange(8 * 5) % 2
    seen = {}
    for chosen in ("fp32", "bf16"):
        model = build_model([trial(backbone=small(name), numerics=chosen, dropout=0)])
        of = {n: p for n, p in model.member(0).items() if model.groups[n] in PRODUCTS}
        # N(0, 0.18): products of about unit gain, so that they weigh as much as what they add to.
        model.load(0, {n: 9 * p.detach() for n, p in of.items()})
        logits = model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target)
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        features = model.features(inputs).detach()
        seen[chosen] = features, {n: g for n, g in gradients.items() if g is not None}
        # Longformer has products that only global attention would use.
        count = sum(one._rounded._made is not None for one in products(model).values())
    assert 8 <= count <= 14

    (exact, slopes), (rough, rough_slopes) = seen["fp32"], seen["bf16"]

    assert 100 * U32 < gap(rough, exact) < count * U16
    assert slopes.keys() == rough_slopes.keys()
    whole = torch.cat([g.flatten() for g in slopes.values()])
    rough_whole = torch.cat([g.flatten() for g in rough_slopes.values()])
    assert gap(rough_whole, whole) < 2 * count * U16  # forward, and back again


# --- what stays


def test_what_trains_is_in_fp32_and_so_are_its_products(trial: Any) -> None:
    cases = {"norm": (), "attention": (".attn.",), "attention:last": ("h.1.attn.",)}
    for group, in_fp32 in cases.items():
        model = build_model([trial(numerics="bf16", train=[group, "output"])])

        for name, product in products(model).items():
            expected = "fp32" if any(part in f"{name}." for part in in_fp32) else "bf16"
            assert product.numerics == expected, (group, name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_loss_goes_down_and_what_is_saved_is_fp32(trial: Any) -> None:
    one = trial(
        numerics="bf16", task={"name": "bit-xor", "bits": 2}, steps=200, dropout=0,
        learning_rate=1e-2, batch_size=16,
    )  # fmt: skip
    training = train([one], log_every=20)
    losses = [r.loss for r in training if r.split == "train"]
    outcome = training.outcomes[0]

    assert losses[-1] < 0.8 * losses[0]
    assert {t.dtype for t in outcome.state.tensors.values()} == {torch.float32}
    frozen = {n: p for n, p in training.model.named_parameters() if not p.requires_grad}
    start = dict(build_model([one]).named_parameters())
    assert all(torch.equal(p, start[n]) for n, p in frozen.items())


def test_weights_that_are_loaded_later_are_those_that_count(trial: Any) -> None:
    one = trial(numerics="bf16", dropout=0)
    inputs = torch.ones(2, 10, 1)
    model = build_model([one])
    other = build_model([trial(numerics="bf16", dropout=0, seed=1, backbone_seed=1)])
    with torch.no_grad():
        before = model(inputs)
        model.load(0, {n: p.detach() for n, p in other.member(0).items()})
        loaded = model(inputs)
        next(iter(products(model).values())).weight.mul_(2)
        written = model(inputs)

        assert not torch.equal(before, loaded)
        assert torch.equal(loaded, other(inputs))
        assert not torch.equal(loaded, written)


# --- training in it


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_trial_alone_is_the_same_again_and_after_a_resume(dropout: float, trial: Any) -> None:
    one = trial(numerics="bf16", dropout=dropout)
    whole, again = finish(train([one])), finish(train([one]))
    first = train([one], log_every=1)
    for record in first:
        if record.step == 7 and first.settled:
            break
    state = State.from_bytes(first.states()[0].to_bytes())
    resumed = finish(train([one], state=[state]))

    for other in (again, resumed):
        assert other.test_loss == whole.test_loss
        assert other.state.tensors.keys() == whole.state.tensors.keys()
        for name, tensor in whole.state.tensors.items():
            assert torch.equal(tensor, other.state.tensors[name]), name


def test_a_pack_trains_with_members_that_end_at_other_steps(trial: Any) -> None:
    trials = [trial(numerics="bf16", seed=k, steps=10 * (k + 1), dropout=0) for k in range(3)]
    training = train(trials)
    finish(training)

    assert [training.outcomes[k].outcome for k in range(3)] == ["done"] * 3
    for k, one in enumerate(trials):
        alone = finish(train([one]))
        assert training.outcomes[k].test_loss == pytest.approx(alone.test_loss, rel=0.05)


def test_a_pack_is_of_one_class(trial: Any) -> None:
    one, other = trial(), trial(numerics="bf16", seed=1)
    assert pack_key(one) != pack_key(other)
    with pytest.raises(ValueError, match="trials of one pack share"):
        train([one, other])


# --- where it is refused


def test_a_processor_needs_products_in_bfloat16(processor: dict[str, Any], trial: Any) -> None:
    assert precision.refusal("bf16") is None
    for name in ("avx512_bf16", "bf16", "sve_bf16"):
        processor.update(amx_bf16=False)
        assert "one of amx_bf16, avx512_bf16, bf16, sve_bf16" in (precision.refusal("bf16") or "")
        processor[name] = True
        assert precision.refusal("bf16") is None
        del processor[name]
    for nearly in ({"amx_int8": True}, {"avx512_bf16": False}, {"bf16": 1}):
        processor |= nearly
        assert "has none of them" in (precision.refusal("bf16") or "")
    assert precision.refusal("fp32") is None
    with pytest.raises(DataError, match=r"numerics bf16: needs .* amx_bf16.* use numerics fp32"):
        train([trial(numerics="bf16")])
    # To build is to look at it, on whatever machine.
    build_model([trial(numerics="bf16")])


def test_what_cannot_be_told_of_a_processor_is_measured(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that is older
    assert precision.refusal("bf16") is None
    monkeypatch.setattr(exactness, "bfloat16_is_faster", lambda: False)
    with pytest.raises(DataError, match="measured to be no faster than in fp32"):
        train([trial(numerics="bf16")])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_torch_tells_what_linux_does() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    told = subprocess.run(
        [sys.executable, "-c", "from fpt.precision import *; print(*cpu_capabilities())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    both = {"amx_bf16", "avx512_bf16"}
    assert set(told.stdout.split()) & both == flags & both


def ticks(*seconds: float) -> Callable[[], float]:
    """A clock by which fp32 and bf16, in turn, take so long."""
    spans = itertools.cycle(seconds)
    now, begins = 0.0, True

    def clock() -> float:
        nonlocal now, begins
        now += 0 if begins else next(spans)
        begins = not begins
        return now

    return clock


@pytest.mark.parametrize(
    ("seconds", "faster"),
    [((2, 1), True), ((1, 2), False), ((1, 1), False), ((3, 2, 3, 9, 1, 2), False)],
)
def test_the_least_of_several_times_tells_whether_bfloat16_is_faster(
    seconds: tuple[float, ...], faster: bool
) -> None:
    assert exactness.bfloat16_is_faster(ticks(*seconds)) == faster


def test_vectors_of_bfloat16_are_used_where_they_are_faster(
    processor: dict[str, Any], trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.update(amx_bf16=False, avx512_bf16=True)
    monkeypatch.setattr(exactness, "bfloat16_is_faster", lambda: True)
    train([trial(numerics="bf16")])
    monkeypatch.setattr(exactness, "bfloat16_is_faster", lambda: False)
    with pytest.raises(DataError, match="measured to be no faster than in fp32"):
        train([trial(numerics="bf16")])
    train([trial()])


def test_a_gpu_needs_its_compute_capability(processor: dict[str, Any]) -> None:
    processor.clear()  # whatever the processor
    assert precision.refusal("bf16", (8, 0)) is None
    assert precision.refusal("bf16", (10, 0)) is None
    assert "this GPU's is 7.5" in (precision.refusal("bf16", (7, 5)) or "")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"train": "all"}, "gpt2 trains all of its own"),
        ({"train": ["attention", "feedforward"]}, "gpt2 trains all of its own"),
        ({"backbone": small("lstm")}, "lstm has none in that form"),
        ({"backbone": small("linformer")}, "linformer has none in that form"),
        ({"numerics": "tf32"}, "'fp32' or 'bf16'"),
    ],
)
def test_a_trial_without_frozen_products_is_refused(
    fields: dict[str, Any], why: str, trial: Any
) -> None:
    with pytest.raises(ValidationError, match=why):
        trial(**{"numerics": "bf16"} | fields)
