"""Any family of transformers' models, by the config.json of a directory: its own forward, with our
layers in place of dropout, norms, products and positions.

Nothing that lies beside the weights is run: the config's class is looked up by its model_type.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
)

from fpt.backbones import families, perceiver
from fpt.backbones.families import Family
from fpt.backbones.huggingface import ATTENTION, seen_by
from fpt.backbones.sources import read_config, weight_files
from fpt.files import DataError

if TYPE_CHECKING:
    from fpt.config import BackboneConfig

_NEGATING = (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderStableLayerNorm,
    HubertEncoder,
    HubertEncoderStableLayerNorm,
)
_DROPS = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_rate")
"""In the names of fields that are probabilities of dropping something: a trial has its own."""


class Auto(nn.Module):
    """A model of transformers that is called with embedded tokens, without what they do not pass.

    Raises:
        DataError: If transformers refuses the config.
        ValueError: If its positions are fewer than `tokens`.
    """

    def __init__(self, config: BackboneConfig, tokens: int) -> None:
        super().__init__()
        self.folder = weight_files(config.weights or "")[0].parent
        said = read_config(self.folder / "config.json")
        known = said.get("max_position_embeddings", tokens)
        if config.groups and isinstance(known, int) and known < tokens:
            raise ValueError(
                f"backbone auto: {self.folder} has {known} positions, and the task {tokens} tokens"
            )
        # With rules of the user's own, a model is called as a whole.
        self.family = None if config.groups else families.family_of(said)
        try:
            if self.family is None:
                model = self._any(said, config)
            else:
                model = self._known(self.family, said, config, tokens)
        # It is not known what transformers' constructors raise over a value that makes no sense.
        except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
            what = " ".join(str(error).split())
            raise DataError(f"backbone auto: {self.folder}/config.json: {what}") from error
        # The parts are shared and the model is not one of them, so that names are those of the
        # files, and a part that is swapped here is swapped there.
        self.__dict__.update(whole=model, _modules=model._modules, _parameters=model._parameters)

    def _any(self, said: Mapping[str, Any], config: BackboneConfig) -> Any:
        """A model that no family describes, as a whole."""
        read = _transformers_config(said, config.layers)
        for name in ("attention_dropout", "attention_probs_dropout_prob"):
            if hasattr(read, name):
                setattr(read, name, 0.0)
        model: Any = AutoModel.from_config(read)  # type: ignore[no-untyped-call]
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        model.set_input_embeddings(nn.Identity())
        _attend(model)
        return model

    def _known(
        self, family: Family, said: Mapping[str, Any], config: BackboneConfig, tokens: int
    ) -> Any:
        read = _transformers_config(families.inner(said), config.layers)
        for name, value in list(vars(read).items()):
            if isinstance(value, float) and any(word in name for word in _DROPS):
                setattr(read, name, 0.0)
        for name in _LEFT_OUT:
            if hasattr(read, name):
                setattr(read, name, False)
        model: Any = getattr(transformers, family.model)(read)
        if family.queries is None:
            _attend(model)
        width = getattr(read, family.input_width or "", config.width)
        _strip(model, family)
        for path, _ in list(model.named_modules()):
            if re.search(family.undropped, path):
                owner, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Identity())
        if family.table is not None and (table := _submodule(model, family.table)) is not None:
            owner, _, leaf = family.table.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Embedding(tokens, table.embedding_dim))
        elif family.tower is not None:
            model.positions = nn.Embedding(tokens, config.width)
        if family.tower is not None:
            model.dropout = nn.Dropout(0.0)
        if family.queries is not None:
            perceiver.prepare(model, family.queries, tokens)
        self.__dict__["input_width"] = width
        self.__dict__["fourier"] = _Fourier()
        for module in model.modules():
            if hasattr(module, "fourier_transform"):
                module.fourier_transform = self.fourier
        return model

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """(R, T, width of the input layer) and (R, T) mask to (R, T, W)."""
        whole: Any = self.whole
        family: Family | None = self.family
        if family is not None and family.tower is not None:
            return self._tower(family, family.tower, embedded, mask)
        if family is not None and family.queries is not None:
            return perceiver.forward(whole.get_submodule(family.part), embedded, mask)
        given = {"inputs_embeds": embedded, "attention_mask": mask}
        called = whole
        if family is not None:
            fourier: Any = self.fourier
            fourier.mask = mask
            called = whole.get_submodule(family.part)
            # Some write into what they are given.
            given = {family.argument: embedded.clone(), **_mask_of(called, mask)}
        hidden: Tensor = called(**given).last_hidden_state
        return hidden

    def _tower(
        self, family: Family, tower: tuple[str, str, str], embedded: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The layers of a model whose own front end is left out."""
        whole: Any = self.whole
        before, layers, after = tower
        table = whole.get_submodule(family.table or "positions")
        hidden: Tensor = embedded + table(torch.arange(embedded.shape[1], device=embedded.device))
        hidden = whole.dropout(hidden)
        if before:
            hidden = whole.get_submodule(before)(hidden)
        seen = seen_by(embedded, mask)
        given: dict[str, Any] = {}
        if hasattr(whole, "rope_embeddings"):
            # Angles of no patch at all: every token is one of those that are not rotated.
            none = embedded.new_zeros(
                0, whole.config.hidden_size // whole.config.num_attention_heads
            )
            given["position_embeddings"] = none, none
        for layer in whole.get_submodule(layers):
            hidden = layer(hidden, attention_mask=seen, **given)
        if after:
            hidden = whole.get_submodule(after)(hidden)
        return hidden


_LEFT_OUT = (
    "use_relative_position_bias", "use_shared_relative_position_bias",
    "use_tpu_fourier_optimizations", "use_cache",
)  # fmt: skip
"""Fields that are switched off: tables over patches in two dimensions, and what is only a matter of
speed."""


class _Fourier:
    """FNet's mixing (Lee-Thorp et al., arXiv 2105.03824): a Fourier transform along tokens and
    width, of which the real part is kept. Of a padded row only the real tokens are transformed, as
    if the row were as short as they are.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        """(R, T) real tokens of the forward pass at hand."""

    def __call__(self, x: Tensor) -> Tensor:
        """(R, T, W) to (R, T, W)."""
        if self.mask is None:
            whole: Tensor = torch.fft.fftn(x, dim=(1, 2)).real
            return whole
        inner = torch.fft.fft(x, dim=2)
        lengths = self.mask.sum(1)
        steps = torch.arange(x.shape[1], device=x.device)
        turns = (steps[:, None] * steps) % lengths[:, None, None] / lengths[:, None, None]
        real = self.mask[:, None] & self.mask[:, :, None]
        angles = 2 * torch.pi * turns
        cosines, sines = angles.cos() * real, angles.sin() * real
        mixed: Tensor = cosines @ inner.real + sines @ inner.imag
        return mixed


def _mask_of(called: Any, mask: Tensor | None) -> dict[str, Tensor]:
    """The mask, as a model's argument; FNet has none."""
    takes = "attention_mask" in inspect.signature(called.forward).parameters
    if mask is None or not takes:
        return {}
    # Wav2Vec2 negates it, and others calculate with it.
    return {"attention_mask": mask if isinstance(called, _NEGATING) else mask.long()}


def _transformers_config(said: Mapping[str, Any], layers: int) -> PreTrainedConfig:
    """Read transformers' config off a config.json, of its first layers."""
    kind = said.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: {kind!r} is no model of transformers {transformers.__version__}"
        )
    known = {name: value for name, value in said.items() if name not in _IDLE}
    read: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(known)
    whole = next(getattr(read, name) for name in _LAYERS if hasattr(read, name))
    if layers != whole:
        for name in ("layer_types", "attention_layers", "mlp_layer_types", "no_rope_layers"):
            if isinstance(own := getattr(read, name, None), list):
                setattr(read, name, own[:layers])
        for name in _LAYERS:
            if getattr(read, name, None) == whole:
                setattr(read, name, layers)
    return read


_IDLE = ("quantization_config", "auto_map", "dtype", "torch_dtype", "_attn_implementation")
_LAYERS = ("num_hidden_layers", "encoder_layers", "num_self_attends_per_block")


def _attend(model: Any) -> None:
    try:
        model.set_attn_implementation(ATTENTION)
    except ValueError:  # its own attention, then, without dropout
        model.set_attn_implementation("eager")


def _submodule(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _strip(model: Any, family: Family) -> None:
    """Take out what is left out, and the token table, so that no value of them is wanted."""
    idle = {
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if families.sort(family, name)[0] is None and families.sort(family, name)[1] is not None
    }
    for path, module in list(model.named_modules(remove_duplicate=False)):
        inside = {f"{path}.{name}" for name, _ in module.named_parameters()}
        token = isinstance(module, nn.Embedding) and "token_type" not in path
        token = token and families.sort(family, f"{path}.weight")[0] == "token"
        if path and (token or (inside and inside <= idle)):
            owner, _, leaf = path.rpartition(".")
            if (parent := _submodule(model, owner)) is not None:
                parent._modules[leaf] = None
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if name in idle:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = None
