"""The model: input layer, frozen backbone, output layer, for K members (arXiv 2103.05247, sec. 2).

Canonical names of a member's parameters: `input.weight`, `input.bias`, `output.weight`,
`output.bias`, and `backbone.` before the backbone's own. What members hold each for themselves has
the member's number behind it in the module (`output.weight.0`); the rest is shared.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fpt import groups, random_streams
from fpt.backbones import Group, fields, weights
from fpt.config import TrialConfig
from fpt.pack_layers import (
    Dropout,
    MemberEmbedding,
    MemberLayer,
    MemberLinear,
    MemberNorm,
    MemberPosition,
    MemberProduct,
    Members,
    MemberScale,
    MemberTable,
    SharedLinear,
    is_scale,
)
from fpt.packing import pack_key, packs
from fpt.tasks.base import Shape

INPUT_GAIN = 1.41
"""Gain of the input layer's orthogonal initial weights, as in the public code."""

Weights = Mapping[str, Tensor | np.ndarray]
"""Canonical name -> value."""


class Model(nn.Module):
    """K members over one backbone. Made by `build_model`."""

    def __init__(
        self, trials: Sequence[TrialConfig], backbones: Mapping[str, Path] | None = None
    ) -> None:
        """See `build_model`."""
        super().__init__()
        check_packable(trials)
        self.trials = tuple(trials)
        first = trials[0]
        self.shape: Shape = first.task.shape(first.protocol)
        self.members = Members(
            seeds=[t.seed for t in trials],
            dropout=[t.dropout for t in trials],
            rows=[1] * len(trials),
        )
        row = first.backbone.row
        config = weights.config_of(first, backbones or {})
        self.function = fields.deviations(first.backbone.name, config, first.backbone.sizes)
        """The fields of its config by which the backbone is not the plain one."""
        self.backbone = weights.skeleton(first, self.shape.tokens, config)
        own = {name: tuple(p.shape) for name, p in self.backbone.named_parameters()}
        self.groups: dict[str, Group] = groups.assign(
            ["input.weight", "output.weight", "output.bias"]
            + ([] if self.shape.embedded else ["input.bias"])
            + [groups.PREFIX + name for name in own],
            first.backbone,
        )
        self.trained = groups.trained(self.groups, first.train, first.backbone)
        theirs: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        self.buffers_own: tuple[str, ...] = ()
        """Canonical names of the persistent buffers of a class of a user's own."""
        if row.version is not None:
            kept = self.backbone.state_dict()
            buffers = {name: tensor for name, tensor in kept.items() if name not in own}
            self.buffers_own = tuple(groups.PREFIX + name for name in buffers)
            drawn = self.backbone.named_parameters() if first.backbone.init == "theirs" else ()
            theirs = {name: parameter.detach().float() for name, parameter in drawn}
        drawn_by = {
            trial.drawn_from: weights.initial(trial, own, backbones or {}, theirs, buffers)
            for trial in {trial.drawn_from: trial for trial in trials}.values()
        }
        digests = {seed: weights.digest(tensors) for seed, tensors in drawn_by.items()}
        self.backbone_digests = tuple(digests[trial.drawn_from] for trial in trials)
        """SHA-256 of each member's initial backbone; all the same, unless each draws its own."""
        initial = [drawn_by[trial.drawn_from] for trial in trials]
        self._fill(initial[0])
        self.drawn_positions = 0
        self._put_members_in(row.packs, initial)
        self._add_own_layers()
        self._owners = {
            f"{owner}.{name}.{k}": (f"{owner}.{name}", k)
            for owner, module in self.named_modules()
            if isinstance(module, MemberLayer)
            for name, values in module.named_children()
            for k in range(len(values))  # type: ignore[arg-type]
        }
        # Where each draws a backbone, they share nothing.
        whole = {groups.PREFIX + name for name in own} if len(drawn_by) > 1 else set()
        of_members = {own for own, _ in self._owners.values()}
        if len(trials) > 1 and (shared := (self.trained | whole) - of_members):
            raise ValueError(
                f"backbone {first.backbone.name}: {min(shared)} "
                f"{'is drawn by each seed' if whole else 'trains'}, and would be one for all "
                "trials of a pack"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.canonical(name)[0] in self.trained)

    def _fill(self, initial: Mapping[str, Tensor]) -> None:
        """Give the skeleton its tensors; trained ones are copies, since the files are shared."""
        for name, tensor in initial.items():
            owner, _, leaf = name.rpartition(".")
            module = self.backbone.get_submodule(owner)
            value = tensor.clone() if groups.PREFIX + name in self.trained else tensor
            if groups.PREFIX + name in self.buffers_own:
                setattr(module, leaf, tensor.to(getattr(module, leaf).dtype).clone())
                continue
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _put_members_in(self, packs: bool, initial: Sequence[Mapping[str, Tensor]]) -> None:
        """Swap dropout modules for those of `fpt.pack_layers`; where trials can share the backbone,
        norms, positions and products too, by the values that each member begins with.
        """
        sites = itertools.count(1)  # 0 is the dropout behind the input layer
        for name, module in list(self.backbone.named_modules()):
            owner, _, leaf = name.rpartition(".")
            parent = self.backbone.get_submodule(owner)
            replacement: nn.Module | None = None
            if isinstance(module, nn.Dropout):
                replacement = Dropout(self.members, next(sites))
                # transformers reads the probability of an attention's dropout off the module.
                replacement.p = 0.0  # type: ignore[assignment]
                # An attention module is known by its causality; its first dropout is that of the
                # attention weights.
                if hasattr(parent, "is_causal") and not hasattr(parent, "member_dropout"):
                    parent.member_dropout = replacement
            elif packs:
                replacement = self._of_members(name, module, initial)
            elif (
                isinstance(module, nn.Embedding)
                and self._group(name) == "position"
                and len(module.weight) < self.shape.tokens
            ):
                longer = self._positions(module.weight, self.trials[0].seed)
                module.weight = nn.Parameter(longer)
            if replacement is not None:
                setattr(parent, leaf, replacement)
        for module in list(self.backbone.modules()):
            # Some hold the probability of their attention's dropout as a number.
            if hasattr(module, "is_causal") and not hasattr(module, "member_dropout"):
                module.member_dropout = Dropout(self.members, next(sites))

    def _group(self, name: str) -> Group | None:
        """The group of the weights of a module of the backbone; None: it has none."""
        return self.groups.get(f"{groups.PREFIX}{name}.weight")

    def _of_members(
        self, name: str, module: nn.Module, initial: Sequence[Mapping[str, Tensor]]
    ) -> nn.Module | None:
        """What takes the place of a module of the backbone where trials can share it; None: it
        stays, and is one for all.
        """
        members = self.members
        own = {
            leaf: [values.get(f"{name}.{leaf}", parameter.detach()) for values in initial]
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        trains = any(f"{groups.PREFIX}{name}.{leaf}" in self.trained for leaf in own)
        draws = any(values is not initial[0] for values in initial)
        if isinstance(module, Conv1D | nn.Linear):
            numerics = "fp32" if trains else self.trials[0].numerics
            if draws:
                return MemberProduct(members, module, own, numerics)
            return SharedLinear(module, numerics)
        if isinstance(module, nn.Embedding) and self._group(name) == "position":
            tables = zip(own["weight"], self.trials, strict=True)
            return MemberPosition(members, weight=[self._positions(w, t.seed) for w, t in tables])
        if not (trains or draws):
            return None
        if isinstance(module, nn.LayerNorm):
            return MemberNorm(members, module, own)
        if is_scale(module):
            return MemberScale(members, module, own)
        if isinstance(module, nn.Embedding) and not trains:
            # A bias on scores is looked up alike by all rows.
            relative = self._group(name) == "attention"
            return (MemberTable if relative else MemberEmbedding)(members, **own)
        return None

    def _positions(self, table: Tensor, seed: int) -> Tensor:
        """A member's position table: rows beyond the pretrained ones are its own draw."""
        missing = self.shape.tokens - table.shape[0]
        self.drawn_positions = missing * table.shape[1]
        rows = weights.normal(
            seed, random_streams.INITIALISATION, "position", (missing, table.shape[1])
        )
        return torch.cat([table.detach(), rows * weights.DEVIATION])

    def _add_own_layers(self) -> None:
        """Input and output layer of each member, initialised as in the public code."""
        shape, width = self.shape, self.trials[0].backbone.width
        inner = getattr(self.backbone, "input_width", width)
        seeds = [t.seed for t in self.trials]
        if shape.embedded:
            tables = [
                weights.normal(
                    t.seed, random_streams.INITIALISATION, "input.weight", (shape.inputs, inner)
                )
                * t.embedding_deviation
                for t in self.trials
            ]
            self.input: nn.Module = MemberEmbedding(self.members, weight=tables)
        else:
            self.input = MemberLinear(
                self.members,
                weight=[_orthogonal(s, (inner, shape.inputs)) for s in seeds],
                bias=[torch.zeros(inner) for _ in seeds],
            )
        self.input_dropout = nn.Identity() if shape.embedded else Dropout(self.members, 0)
        logits = shape.outputs * shape.numbers
        self.output = MemberLinear(
            self.members,
            weight=[_uniform(s, "output.weight", (logits, width), width) for s in seeds],
            bias=[_uniform(s, "output.bias", (logits,), width) for s in seeds],
        )

    @property
    def backbone_digest(self) -> str:
        """SHA-256 of the initial backbone of the first member."""
        return self.backbone_digests[0]

    def canonical(self, name: str) -> tuple[str, int | None]:
        """(canonical name, member) of a parameter of this module; None: shared."""
        return self._owners.get(name, (name, None))

    def member(self, k: int) -> dict[str, nn.Parameter]:
        """Member k's parameters by canonical name, shared ones included."""
        found = {}
        for name, parameter in self.named_parameters():
            own, owner = self.canonical(name)
            if owner is None or owner == k:
                found[own] = parameter
        return found

    def own_buffers(self) -> dict[str, Tensor]:
        """Return the buffers of a class of a user's own by canonical name; shared by members."""
        names = ((name, name.removeprefix(groups.PREFIX)) for name in self.buffers_own)
        return {name: self.backbone.get_buffer(own) for name, own in names}

    def counts(self) -> dict[str, dict[str, int]]:
        """A member's parameters: group -> tensors, parameters, and how many of them train.

        Position rows count as far as the task uses them, those beyond the pretrained table also as
        `drawn`; token tables are not there at all.
        """
        shapes = {name: tuple(p.shape) for name, p in self.member(0).items()}
        table = groups.counts(self.groups, shapes, self.trained)
        if self.buffers_own:
            sizes = [tensor.numel() for tensor in self.own_buffers().values()]
            table["buffer"] = {"tensors": len(sizes), "parameters": sum(sizes), "trained": 0}
        if "position" in table:
            table["position"]["drawn"] = self.drawn_positions
        return table

    def load(self, k: int, values: Weights) -> None:
        """Set parameters of member k by canonical name; shared ones change for every member.

        Raises:
            ValueError: If a name is unknown or a shape differs.
        """
        own = {**self.member(k), **self.own_buffers()}
        unknown = sorted(set(values) - set(own))
        if unknown:
            raise ValueError(
                f"weights: no parameter named {', '.join(unknown)}; there are {', '.join(own)}"
            )
        with torch.no_grad():
            for name, value in values.items():
                tensor = torch.as_tensor(value)
                if tensor.shape != own[name].shape:
                    raise ValueError(
                        f"weights: {name} is {tuple(tensor.shape)}, wanted {tuple(own[name].shape)}"
                    )
                if own[name].requires_grad:
                    own[name].copy_(tensor)  # it may be part of a larger tensor
                else:
                    # Not a write in place: the old one may be mapped from a file.
                    own[name].data = tensor.to(own[name]).clone()
        for module in self.backbone.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # cuDNN wants them in one piece

    def forward(
        self, inputs: Tensor, lengths: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """Logits.

        Args:
            inputs: (R, T, F) float or (R, T) ids, the members' rows one after another.
            lengths: (R,) real tokens of each row; the rest is masked and the last real token is
                read out. None: all tokens are real.
            hidden: (R, layers, 2, W) hidden and cell states that a recurrent backbone begins with,
                where it draws them anew at every forward pass (lstm-paper). None: drawn, as a pure
                function of seed and step.

        Returns:
            (R, P, C), R = members x batch where all batches are alike.
        """
        with self._whose(inputs):
            return self.head(self.features(inputs, lengths, hidden))

    def features(
        self, inputs: Tensor, lengths: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """(R, read-out tokens, W): what the output layer reads; arguments as in `forward`."""
        with self._whose(inputs):
            return self._features(inputs, lengths, hidden)

    def _whose(self, inputs: Tensor) -> contextlib.AbstractContextManager[None]:
        """Describe a batch that nobody has: as many rows of each member."""
        members = self.members
        if sum(members.rows) == len(inputs):
            return contextlib.nullcontext()
        each, left = divmod(len(inputs), len(members.rows))
        if left:
            raise ValueError(f"{len(inputs)} rows do not divide by {len(members.rows)} members")
        return members.batch(dict.fromkeys(range(len(members.rows)), each))

    def _features(self, inputs: Tensor, lengths: Tensor | None, hidden: Tensor | None) -> Tensor:
        members, shape = self.members, self.shape
        mask = None
        if lengths is not None:
            mask = torch.arange(inputs.shape[1], device=inputs.device) < lengths[:, None]
        members.uses.clear()
        members.tokens = inputs.shape[1]

        def pick(x: Tensor) -> Tensor:
            if lengths is None or shape.readout == shape.tokens:
                return x[:, x.shape[1] - shape.readout :]
            back = torch.arange(shape.readout, 0, -1, device=lengths.device)
            index = lengths[:, None] - back
            return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

        def read_out(x: Tensor) -> Tensor:
            members.read_out = pick
            return pick(x)

        embedded = self.input_dropout(self.input(inputs))
        if not getattr(self.backbone, "reads_out", False):
            states = self.backbone(embedded, mask, *self._initial_hidden(embedded, hidden))
            return pick(states)
        try:
            read: Tensor = self.backbone(embedded, mask, read_out)
        finally:
            members.read_out = None
        return read

    def head(self, read: Tensor) -> Tensor:
        """(R, read-out tokens, W) features to (R, P, C) logits; of loss mse, numbers."""
        logits: Tensor = self.output(read)
        return logits.reshape(len(read), self.shape.positions, self.shape.numbers)

    def _initial_hidden(self, embedded: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
        """What a backbone that draws its hidden states is called with beside its inputs."""
        if not self.draws_hidden:
            return ()
        if given is not None:
            return (given,)
        members = self.members
        # Paper: drawn from one stream, as evaluations come. Ours: by the number of the batch within
        # an evaluation, so that two checkpoints are told apart by themselves.
        numbers = members.steps if self.training else [members.chunk] * len(members.rows)

        def draw(k: int, rows: int) -> np.ndarray:
            return self.drawn_hidden(k, rows, numbers[k], training=self.training)

        draws = [
            members.drawn(k, members.rows[k], functools.partial(draw, k)) for k in members.present
        ]
        return (torch.from_numpy(np.concatenate(draws)).to(embedded.device),)

    @property
    def draws_hidden(self) -> bool:
        """Whether the backbone's hidden states are drawn anew at every forward pass."""
        return bool(getattr(self.backbone, "draws_hidden", False))

    def drawn_hidden(self, k: int, rows: int, number: int, *, training: bool) -> np.ndarray:
        """Return (rows, layers, 2, W) float32: what a backbone that draws its hidden states begins
        with, of member k at a step (training), or in a batch of an evaluation.
        """
        own: Any = self.backbone
        backbone = self.trials[k].backbone
        width = getattr(own, "input_width", backbone.width)
        draws = random_streams.generator(
            self.members.seeds[k], random_streams.HIDDEN, number, site=1 if training else 2
        )
        drawn = draws.standard_normal((rows, backbone.layers, 2, width), dtype=np.float32)
        return drawn * np.float32(own.hidden_deviation(width))


def build_model(
    trials: Sequence[TrialConfig],
    *,
    weights: Weights | Sequence[Weights] | None = None,
    backbones: Mapping[str, Path] | None = None,
) -> Model:
    """The module of trials that can be packed, on the CPU, with its initial values.

    Args:
        trials: One or more trials; see `check_packable`.
        weights: Initial values by canonical name, one mapping for all members or one a member;
            what is not named keeps the value it was drawn or read with.
        backbones: Id of a trial -> safetensors file of the backbone that it trained.

    Raises:
        DataError: If weights are missing.
        ValueError: If the trials cannot be packed, or `weights` does not fit.
    """
    model = Model(trials, backbones)
    if weights is not None:
        values = [weights] * len(trials) if isinstance(weights, Mapping) else weights
        for k, own in enumerate(values):
            model.load(k, own)
    return model


def check_packable(trials: Sequence[TrialConfig]) -> None:
    """Raise unless the trials can share one program.

    Raises:
        ValueError: If there is no trial, if shapes or frozen weights differ, or if several would
            train the shared weights.
    """
    if not trials:
        raise ValueError("no trials")
    if len({pack_key(t) for t in trials}) > 1:
        raise ValueError(
            "trials of one pack share task shape, backbone, pretraining, its draw and what trains; "
            "these do not"
        )
    if len(trials) > 1 and not packs(trials[0]):
        raise ValueError(
            f"trials that train {', '.join(trials[0].train)} of {trials[0].backbone.name} cannot "
            "share a backbone"
        )


def _orthogonal(seed: int, shape: tuple[int, int]) -> Tensor:
    """Orthogonal rows or columns (Saxe et al., arXiv 1312.6120), with the public code's gain."""
    rows, columns = shape
    draws = random_streams.generator(
        seed, random_streams.INITIALISATION, site=weights.site("input.weight")
    )
    flat = draws.standard_normal((max(shape), min(shape)))
    q, r = np.linalg.qr(flat)
    q *= np.sign(np.diag(r))  # makes the draw uniform over orthogonal matrices
    q = q if rows >= columns else q.T
    return torch.from_numpy(np.ascontiguousarray(q * INPUT_GAIN, dtype=np.float32))


def _uniform(seed: int, name: str, shape: tuple[int, ...], fan_in: int) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for a linear layer."""
    draws = random_streams.generator(seed, random_streams.INITIALISATION, site=weights.site(name))
    bound = fan_in**-0.5
    return torch.from_numpy(draws.uniform(-bound, bound, shape).astype(np.float32))
