"""What a trial costs in floating-point operations, by formula: without torch, data or weights.

Kaplan et al. (arXiv 2001.08361) put a forward pass at two operations a parameter and token, and a
backward pass at twice that. A frozen backbone departs from the rule: nothing goes backward below
the lowest tensor that trains, and a frozen product has one backward product (to what it was given)
in place of two. Hence every product is counted by itself, in the order of the forward pass:

- A product of an (m, k) and a (k, n) matrix is 2 m k n operations. T tokens, width W, a layer:
  queries, keys, values 6 T W^2; scores and their sums over values 4 T^2 W (a causal mask saves
  nothing); what goes out of attention 2 T W^2; the feed-forward layer 16 T W^2. Of the last layer
  the latter two are computed for the P positions alone that are read out (see READ_OUT). A layer of
  an LSTM: 16 T W^2. One of a mixer: 2 T W^2 over tokens, 16 T W^2 over channels. Around them the
  linear input layer, 2 T F W, and the output layer, 2 P W C.
- Where the config.json of weights says so, there are fewer heads of keys and values, heads of
  another width, another inner width, or a gate beside the feed-forward layer's first matrix.
- Of Perceiver's layers each has Q queries of width A and K keys of width B, by way of C channels,
  and D of the values: 2 Q A C + 2 K B (C + D) + 2 Q K (C + D) + 2 Q D A, and behind it a
  feed-forward layer. Queries are the latents, in the decoder a vector for each token.
- Backward, a product costs its forward pass once if what it was given depends on something that
  trains, and once more if its weights train (of scores, both factors depend on it).
- Everything is done for `steps` x `batch_size` sequences of all T tokens, padding included.
  Evaluations have forward passes only.

Not counted, since they are no matrix products: embeddings, norms, activations, dropout, softmax,
Adam. Nor are rows that are added to fill a product up, and what is saved where features are cached
or a plateau ends a trial early.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from fpt.backbones import AUTO, families
from fpt.backbones.families import Widths
from fpt.backbones.sources import HUB, read_config, weight_files
from fpt.config import BackboneConfig, TrialConfig
from fpt.files import DataError

__all__ = ["evaluation_examples", "training_flops"]

LONGFORMER_WINDOW = 512
"""Tokens around a token that Longformer attends to: see `fpt.backbones.huggingface`."""

LINFORMER_KEYS = 16
"""Keys that Linformer's attention sees: see `fpt.backbones.encoder`."""

READ_OUT = ("gpt2", "bert", "t5", "vit")
"""Backbones whose last layer computes only what is read out, behind its attention."""

BITS = 10_000
"""Bits of a fixed set of a bit task that is not told how many examples it has."""

_DECODER_CHANNELS = 256
"""Of the queries and keys of Perceiver's decoder, in transformers."""

_PERCEIVER: dict[str, Any] = {
    "num_latents": 256, "d_latents": 1280, "num_blocks": 1, "qk_channels": None,
    "v_channels": None, "cross_attention_shape_for_attention": "kv",
    "cross_attention_widening_factor": 1, "self_attention_widening_factor": 1,
}  # fmt: skip
"""What a config.json of Perceiver means where it is silent: transformers' own defaults."""


class _Read(NamedTuple):
    """Vectors that ask, or are asked."""

    number: int
    width: int


_PUBLISHED_SIZES = {
    "mnist": (0, 10_000),
    "digits": (0, 497),
    "cifar10": (0, 10_000),
    "cifar10-lra": (0, 10_000),
    "remote-homology": (736, 718),
}
# Examples of validation and test split, where these are published and no parameter says them.


@dataclass(frozen=True)
class _Product:
    """A matrix product of the forward pass of one sequence."""

    flops: float
    group: str | None
    """The group of its weights; None: both factors are activations."""
    layer: int
    """The backbone's layer; -1: the input layer; the number of layers: the output layer, and what
    of the backbone is in no layer."""
    above_norm: bool = True
    """Whether a norm stands somewhere below it."""
    given: frozenset[str] | None = None
    """The groups that what it was given comes from, where that is not all that stands below."""


def training_flops(trial: TrialConfig) -> float:
    """Floating-point operations of a trial's matrix products, evaluation included.

    The evaluation sets of a task whose sizes are not known without its data (a user's own, `text`,
    a folder of ListOps) are left out.
    """
    forward, backward = _passes(trial)
    trained = trial.steps * trial.batch_size * (forward + backward)
    return trained + evaluation_examples(trial) * forward


def evaluation_examples(trial: TrialConfig) -> int:
    """Examples that a trial's evaluations read, all together, as far as that is known."""
    rule = trial.evaluation
    times = -(-trial.steps // rule.every)
    if trial.protocol == "paper":
        # Remote homology is evaluated in batches four times as large.
        size = trial.batch_size * (4 if trial.task.name == "remote-homology" else 1)
        return times * rule.batches * size + rule.training_set
    validation, test = _set_sizes(trial)
    return times * validation + test + rule.training_set


def _set_sizes(trial: TrialConfig) -> tuple[int, int]:
    # Examples of the validation and of the test split, protocol sound; 0: not known.
    name = trial.task.name
    fields = trial.task.model_dump()
    if name in ("bit-memory", "bit-xor"):
        bits = trial.task.shape("sound").positions
        size = fields["examples"] or -(-BITS // bits)
        return size, size
    known = _PUBLISHED_SIZES.get(name, (0, 0)) if fields.get("folder") is None else (0, 0)
    return fields.get("validation", known[0]), fields.get("test", known[1])


def _passes(trial: TrialConfig) -> tuple[float, float]:
    """Operations of the forward pass and of the backward pass of one sequence."""
    trains = set(trial.train)
    last = trial.backbone.layers - 1
    # Whether the activations at hand depend on something that trains.
    live = False
    forward = backward = 0.0
    for product in _products(trial):
        # An embedding is no product; positions are added behind it.
        live = live or (product.layer >= 0 and not trains.isdisjoint({"input", "position"}))
        live = live or (product.above_norm and "norm" in trains)
        before = live if product.given is None else not trains.isdisjoint(product.given)
        weights = product.group in trains or (
            product.layer == last and f"{product.group}:last" in trains
        )
        forward += product.flops
        if product.group is None:
            backward += 2 * product.flops * live
        else:
            backward += product.flops * (weights + before)
        live = live or weights
    return forward, backward


def _products(trial: TrialConfig) -> Iterator[_Product]:
    shape, backbone = trial.task.shape(trial.protocol), trial.backbone
    if not shape.embedded:
        flops = 2.0 * shape.tokens * shape.inputs * backbone.width
        yield _Product(flops, "input", -1, above_norm=False)
    if backbone.name == AUTO and backbone.row.latents:
        yield from _perceiver(_config_of(backbone), backbone, shape.tokens)
    else:
        own = _widths(backbone)
        for layer in range(backbone.layers):
            last = layer == backbone.layers - 1 and backbone.name in READ_OUT
            read = shape.readout if last else None
            yield from _layer(backbone, own, layer, shape.tokens, read)
    logits = shape.outputs * shape.numbers
    yield _Product(2.0 * shape.readout * backbone.width * logits, "output", backbone.layers)


def _widths(backbone: BackboneConfig) -> Widths:
    """Return how wide matrices are: as config.json of the weights says, or as is usual."""
    return families.widths(_config_of(backbone), width=backbone.width, heads=backbone.heads)


def _config_of(backbone: BackboneConfig) -> Mapping[str, Any]:
    """Return the config.json of a backbone's weights; empty where there is none here."""
    weights = backbone.weights
    if weights is not None and not weights.startswith(HUB):
        with contextlib.suppress(DataError):  # What is missing is told where it is needed.
            return _config(weights)
    return {}


@functools.lru_cache(maxsize=256)
def _config(weights: str) -> Mapping[str, Any]:
    return read_config(weight_files(weights)[0])


def _layer(
    backbone: BackboneConfig, own: Widths, layer: int, tokens: int, read: int | None
) -> Iterator[_Product]:
    width = float(backbone.width)
    if backbone.name.startswith("lstm"):
        # From below, and from the token before. The residual one's norm stands before a layer, the
        # sound one's behind it, the paper's between these two.
        before = layer > 0 or backbone.name == "lstm-residual"
        between = before or backbone.name == "lstm-paper"
        yield _Product(8 * tokens * width**2, "recurrent", layer, before)
        yield _Product(8 * tokens * width**2, "recurrent", layer, between)
        return
    if backbone.name == "mixer":
        for inner in (width // 2, 4 * width):
            for _ in range(2):
                yield _Product(2 * tokens * width * inner, "feedforward", layer)
        return
    if backbone.name == "linformer":
        keys = min(LINFORMER_KEYS, tokens)
        yield _Product(2 * tokens * keys * width, "attention", layer)
        yield _Product(2 * (tokens + 2 * keys) * width**2, "attention", layer)
        scores = 4 * tokens * keys * width
    elif backbone.name == "longformer":
        window = min(LONGFORMER_WINDOW, 2 * tokens)
        tokens += -tokens % window  # It pads to whole windows.
        yield _Product(6 * tokens * width**2, "attention", layer)
        scores = _sliding(tokens, window // 2) * width
    else:
        inside = own.queries + 2 * own.keys
        yield _Product(2 * tokens * width * inside, "attention", layer)
        scores = 4 * tokens**2 * own.queries
    yield _Product(scores, None, layer)
    behind = tokens if read is None else read
    yield _Product(2 * behind * own.queries * width, "attention", layer)
    yield _Product(2 * behind * width * own.inner * own.entrances, "feedforward", layer)
    yield _Product(2 * behind * own.inner * width, "feedforward", layer)


def _perceiver(
    config: Mapping[str, Any], backbone: BackboneConfig, tokens: int
) -> Iterator[_Product]:
    said = _PERCEIVER | {name: value for name, value in config.items() if value is not None}
    latents = _Read(said["num_latents"], said["d_latents"])
    places = _Read(tokens, backbone.width)
    by_keys = said["cross_attention_shape_for_attention"] == "kv"
    outside = backbone.layers

    def channels(usual: int) -> tuple[int, int]:
        own = said["qk_channels"] or usual
        return own, said["v_channels"] or own

    first = channels(places.width if by_keys else latents.width)
    wide = said["cross_attention_widening_factor"]
    yield from _reading(latents, places, first, wide, outside, {"attention", "norm"})
    wide = said["self_attention_widening_factor"]
    for _ in range(said["num_blocks"]):
        for layer in range(backbone.layers):
            yield from _reading(latents, latents, channels(latents.width), wide, layer)
    decoder = _DECODER_CHANNELS, places.width
    yield from _reading(places, latents, decoder, 1, outside, {"position", "norm"})


def _reading(
    queries: _Read,
    keys: _Read,
    channels: tuple[int, int],
    widening: int,
    layer: int,
    asks: Set[str] | None = None,
) -> Iterator[_Product]:
    # `asks` are the groups that queries come from which are a table.
    inside, values = channels
    given = None if asks is None else frozenset(asks)
    asking = 2 * queries.number * queries.width * inside
    yield _Product(asking, "attention", layer, given=given)
    yield _Product(2 * keys.number * keys.width * (inside + values), "attention", layer)
    yield _Product(2 * queries.number * keys.number * (inside + values), None, layer)
    yield _Product(2 * queries.number * values * queries.width, "attention", layer)
    for _ in range(2):
        yield _Product(2 * queries.number * queries.width**2 * widening, "feedforward", layer)


def _sliding(tokens: int, half: int) -> float:
    # transformers cuts the sequence into overlapping chunks of two half windows for the scores, and
    # sums over the values of three.
    return 2 * (tokens / half - 1) * (2 * half) ** 2 + 6 * tokens * half
