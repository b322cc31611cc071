"""The families of transformers' models that `auto` knows, one row of data each, by the model_type
of a config.json. No torch here: `sweep groups` and the planner read the rows too.

Rules are over the names of transformers' own base model, which are those of its files as well, but
for `renames`. Every parameter of a file has a group or is left out by name; a test builds each
family and holds its rules against it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Rules = tuple[tuple[str, Any], ...]
"""(regular expression over a parameter's name, group or word): the first match wins."""


@dataclass(frozen=True)
class Family:
    """How a family's models are built, called and sorted into groups."""

    title: str
    """As people call it."""
    model: str
    """transformers' class."""
    groups: Rules
    """(regular expression, group)."""
    left_out: Rules = ()
    """(regular expression, what it is): parameters that are not built, since a trial's tokens do
    not pass them. They come before the groups."""
    layer: str = r"(?:^|\.)layers\.(\d+)\."
    """A layer's parameters: the first group is the layer's number."""
    causal: bool = False
    modality: Literal["language", "image", "speech", "protein"] = "language"
    """What its published weights were trained on. Those of a language model's architecture may have
    been trained on any sequences: see `fpt.backbones.Backbone.modality`."""
    sub: str | None = None
    """The config inside the config that is meant, of a model with several parts."""
    part: str = ""
    """The module that is called with embedded tokens; empty: the whole model."""
    argument: str = "inputs_embeds"
    """What that calls them."""
    tower: tuple[str, str, str] | None = None
    """Of a model whose front end makes the tokens: its norm before the layers, its layers, its norm
    after them, which are called one by one. Positions are then a table of the trial's own."""
    table: str | None = None
    """The table of learned positions, cut to the tokens of a task."""
    queries: str | None = None
    """Of a model whose tokens are read by latents: the table of its decoder's queries, a learned
    one for each position, cut alike. Its layers then hold latents in place of tokens."""
    biased: str | None = None
    """The field that says whether that table is added at all."""
    first_position: int | Literal["pad"] = 0
    """The row of that table that belongs to the first token; pad: the one after the padding's."""
    positions: str | None = "max_position_embeddings"
    """The field that says how many tokens a model can have; None: any number."""
    input_width: str | None = None
    """The field that says how wide embedded tokens are, where that is not the model's width."""
    gated: str | bool = False
    """Whether the feed-forward layer has two matrices in, one of them a gate's; or the field of its
    config that says so."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement): from names in files to those of transformers' model."""
    initial: tuple[tuple[str, float | None], ...] = ()
    """(regular expression, value): parameters that a random backbone begins with a constant in;
    None: the logarithms of 1, 2, ... along the last axis (Mamba's states)."""
    undropped: str = r"(?!)"
    """Modules of dropout, by path, that act on what all sequences share and so cannot be a
    member's: they drop nothing."""
    refused: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """(field, the values that can be honoured)."""
    alone: str | None = None
    """Why its trials cannot share frozen weights; None: they can."""

    @property
    def words(self) -> str:
        """What a token sees, in words."""
        return "causal" if self.causal else "bidirectional"


def _with(family: Family, **changes: Any) -> Family:
    return dataclasses.replace(family, **changes)


WRAPPER = re.compile(
    r"(module|_orig_mod|base_model\.model|backbone|model|transformer|bert|longformer|vit|"
    r"(distil|mega|mobile|camem)?bert|roberta|electra|albert|mpnet|deberta|esm|fnet|gpt_neox|deit|"
    r"beit|dinov2|dinov2_with_registers|clip|vision_model|wav2vec2|hubert|language_model)\."
)
"""What wrappers (DistributedDataParallel, torch.compile, PEFT, a model with a head, a file of this
package) put before a backbone's own names, once or several times."""

_OWN_WORDS = frozenset(
    {"encoder", "decoder", "text_model", "layers", "layer", "h", "block", "blocks"}
)
"""What may stand before all names of a file and be of their own: a decoder is no encoder."""

_HEADS: Rules = (
    (r"inv_freq$|(^|\.)position_ids$|\.(attn|attention)\.(masked_)?bias$", "constants"),
    (r"^(lm_head|embed_out|score|classifier|cls|predictions|discriminator_predictions)\b", "head"),
    (r"^(vocab_\w+|qa_outputs|pre_classifier|projector|decoder_head|head)\b", "head"),
    (r"^(lm_predictions|mask_predictions|final_logits_bias|proj_out|fc_norm)\b", "head"),
)
"""Heads beside the base model, which no rule of a family needs to repeat."""

_POOLER = ((r"^pooler\.", "pooler"),)

_LLAMA = Family(
    title="Llama",
    model="LlamaModel",
    causal=True,
    gated=True,
    groups=(
        (r"norm\.weight$", "norm"),
        (r"\.self_attn\.", "attention"),
        (r"\.mlp\.", "feedforward"),
        (r"^embed_tokens\.", "token"),
    ),
)

_GEMMA = _with(_LLAMA, initial=((r"norm\.weight$", 0.0),))
# Gemma's norms multiply by 1 + their gain.

_BERT = Family(
    title="BERT",
    model="BertModel",
    layer=r"^encoder\.layer\.(\d+)\.",
    left_out=_POOLER,
    groups=(
        (r"LayerNorm\.", "norm"),
        (r"\.attention\.|\.relative_attention_bias\.", "attention"),
        (r"\.(intermediate|output)\.dense\.", "feedforward"),
        (r"(^|\.)position_embeddings\.", "position"),
        (r"(^|\.)(word|token_type)_embeddings\.", "token"),
    ),
    table="embeddings.position_embeddings",
    refused=(
        ("is_decoder", (False,)),
        ("add_cross_attention", (False,)),
        ("position_embedding_type", ("absolute",)),
    ),
)

_ROBERTA = _with(_BERT, title="RoBERTa", model="RobertaModel", first_position="pad")

_VISION_RENAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.query_proj\.", ".attention.q_proj."),
    (r"\.attention\.key_proj\.", ".attention.k_proj."),
    (r"\.attention\.value_proj\.", ".attention.v_proj."),
)

_VIT = Family(
    title="ViT",
    model="ViTModel",
    modality="image",
    left_out=(
        (r"^embeddings\.(cls|distillation|mask|register)_tokens?$", "class and mask tokens"),
        (r"^embeddings\.position_embeddings", "positions of patches"),
        (r"^embeddings\.patch_embeddings\.", "convolution of patches"),
        *_POOLER,
    ),
    groups=(
        (r"(^|\.)(layernorm(_before|_after)?|norm\d?)\.", "norm"),
        (r"\.attention\.", "attention"),
        (r"\.mlp\.", "feedforward"),
        (r"\.(lambda_[12]|layer_scale[12]\.lambda1)$", "scale"),
        (r"^positions\.", "position"),
    ),
    layer=r"(?:^|\.)layers?\.(\d+)\.",
    tower=("", "layers", "layernorm"),
    positions=None,
    renames=_VISION_RENAMES,
    initial=((r"lambda", 1.0), (r"^positions\.", 0.0)),
)

_CLIP = Family(
    title="CLIP's vision tower",
    model="CLIPVisionModel",
    modality="image",
    sub="vision_config",
    left_out=(
        (r"^embeddings\.class_embedding$", "class token"),
        (r"^embeddings\.position_embedding\.", "positions of patches"),
        (r"^embeddings\.patch_embedding\.", "convolution of patches"),
        (r"^post_layernorm\.", "norm of the class token"),
        (r"^(text_model|visual_projection|text_projection|logit_\w+)\b", "text tower and heads"),
    ),
    groups=(
        (r"(^|\.)(layer_norm[12]|pre_layrnorm|post_layernorm)\.", "norm"),
        (r"\.self_attn\.", "attention"),
        (r"\.mlp\.", "feedforward"),
        (r"^positions\.", "position"),
    ),
    tower=("pre_layrnorm", "encoder.layers", ""),
    positions=None,
    initial=((r"^positions\.", 0.0),),
)

_WAV2VEC = Family(
    title="wav2vec 2.0",
    model="Wav2Vec2Model",
    modality="speech",
    left_out=(
        (r"^(feature_extractor|feature_projection)\.", "convolutional front end"),
        (r"^masked_spec_embed$", "mask token"),
        (r"^(quantizer|project_hid|project_q|adapter)\b", "heads of its pretraining"),
    ),
    groups=(
        (r"(^|\.)(final_)?layer_norm\.", "norm"),
        (r"\.attention\.", "attention"),
        (r"\.feed_forward\.", "feedforward"),
        (r"\.pos_conv_embed\.", "position"),
    ),
    layer=r"^encoder\.layers\.(\d+)\.",
    part="encoder",
    argument="hidden_states",
    positions=None,
    renames=(
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
    ),
    initial=((r"\.original0$", 1.0),),
    refused=(("add_adapter", (False,)), ("adapter_attn_dim", ())),
    alone="its positions are a convolution with weight normalisation, which a pack would share",
)

_T5 = Family(
    title="T5's encoder",
    model="T5EncoderModel",
    gated="is_gated_act",
    left_out=((r"^decoder\.", "decoder"),),
    groups=(
        (r"layer_norm\.", "norm"),
        (r"\.SelfAttention\.", "attention"),
        (r"\.DenseReluDense\.", "feedforward"),
        (r"^(shared|encoder\.embed_tokens)\.", "token"),
    ),
    layer=r"^encoder\.block\.(\d+)\.",
    part="encoder",
    positions=None,
)

_MAMBA = Family(
    title="Mamba",
    model="MambaModel",
    causal=True,
    groups=(
        (r"\.mixer\.", "recurrent"),
        (r"(^|\.)norm(_f)?\.", "norm"),
        (r"^embeddings\.", "token"),
    ),
    positions=None,
    renames=((r"^embedding\.", "embeddings."),),
    initial=((r"\.A_log$", None), (r"\.D$", 1.0), (r"\.dt_(proj\.)?bias$", -4.6)),
)

FAMILIES: dict[str, Family] = {
    "llama": _with(_LLAMA, title="Llama, SmolLM"),
    "mistral": _with(_LLAMA, title="Mistral", model="MistralModel"),
    "qwen2": _with(_LLAMA, title="Qwen 2", model="Qwen2Model"),
    "qwen3": _with(_LLAMA, title="Qwen 3", model="Qwen3Model"),
    "gemma": _with(_GEMMA, title="Gemma", model="GemmaModel"),
    "gemma2": _with(_GEMMA, title="Gemma 2", model="Gemma2Model"),
    "gemma3_text": _with(_GEMMA, title="Gemma 3", model="Gemma3TextModel"),
    "olmo2": _with(_LLAMA, title="OLMo 2", model="Olmo2Model"),
    "smollm3": _with(_LLAMA, title="SmolLM 3", model="SmolLM3Model"),
    "phi3": _with(_LLAMA, title="Phi 3", model="Phi3Model"),
    "phi": _with(
        _LLAMA,
        title="Phi",
        model="PhiModel",
        gated=False,
        groups=((r"layernorm\.(weight|bias)$", "norm"), *_LLAMA.groups[1:]),
    ),
    "gpt2": Family(
        title="GPT-2",
        model="GPT2Model",
        causal=True,
        groups=(
            (r"(^|\.)(ln_1|ln_2|ln_f)\.", "norm"),
            (r"\.attn\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^wpe\.", "position"),
            (r"^wte\.", "token"),
        ),
        layer=r"^h\.(\d+)\.",
        table="wpe",
        positions="n_positions",
        refused=(("add_cross_attention", (False,)),),
    ),
    "gpt_neo": Family(
        title="GPT-Neo",
        model="GPTNeoModel",
        causal=True,
        groups=(
            (r"(^|\.)(ln_1|ln_2|ln_f)\.", "norm"),
            (r"\.attn\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^wpe\.", "position"),
            (r"^wte\.", "token"),
        ),
        layer=r"^h\.(\d+)\.",
        table="wpe",
    ),
    "gptj": Family(
        title="GPT-J",
        model="GPTJModel",
        causal=True,
        groups=(
            (r"(^|\.)(ln_1|ln_f)\.", "norm"),
            (r"\.attn\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^wte\.", "token"),
        ),
        layer=r"^h\.(\d+)\.",
        positions="n_positions",
    ),
    "gpt_neox": Family(
        title="GPT-NeoX, Pythia",
        model="GPTNeoXModel",
        causal=True,
        groups=(
            (r"layer_?norm\.", "norm"),
            (r"\.attention\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^embed_in\.", "token"),
        ),
    ),
    "opt": Family(
        title="OPT",
        model="OPTModel",
        causal=True,
        groups=(
            (r"layer_norm\.", "norm"),
            (r"\.self_attn\.", "attention"),
            (r"\.fc[12]\.", "feedforward"),
            (r"\.embed_positions\.", "position"),
            (r"\.(embed_tokens|project_in)\.", "token"),
        ),
        table="decoder.embed_positions",
        first_position=2,
        input_width="word_embed_proj_dim",
        refused=(("_remove_final_layer_norm", (False,)),),
    ),
    "bloom": Family(
        title="BLOOM",
        model="BloomModel",
        causal=True,
        groups=(
            (r"(layernorm|ln_f)\.", "norm"),
            (r"\.self_attention\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^word_embeddings\.", "token"),
        ),
        layer=r"^h\.(\d+)\.",
        positions=None,
    ),
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _with(_ROBERTA, title="XLM-RoBERTa", model="XLMRobertaModel"),
    "camembert": _with(_ROBERTA, title="CamemBERT", model="CamembertModel"),
    "electra": _with(
        _BERT,
        title="ELECTRA",
        model="ElectraModel",
        groups=(*_BERT.groups, (r"^embeddings_project\.", "token")),
        input_width="embedding_size",
    ),
    "albert": Family(
        title="ALBERT",
        model="AlbertModel",
        left_out=((r"^pooler\.", "pooler"),),
        groups=(
            (r"(LayerNorm|layer_norm)\.", "norm"),
            (r"\.attention\.", "attention"),
            (r"\.ffn(_output)?\.", "feedforward"),
            (r"\.position_embeddings\.", "position"),
            (r"\.(word|token_type)_embeddings\.|\.embedding_hidden_mapping_in\.", "token"),
        ),
        layer=r"\.albert_layer_groups\.(\d+)\.",
        table="embeddings.position_embeddings",
        input_width="embedding_size",
    ),
    "mpnet": _with(_BERT, title="MPNet", model="MPNetModel", first_position=2),
    "deberta-v2": _with(
        _BERT,
        title="DeBERTa v2 and v3",
        model="DebertaV2Model",
        # The relative positions, and the norm on them, act on the attention's scores.
        groups=((r"^encoder\.(rel_embeddings|LayerNorm|conv)\.", "attention"), *_BERT.groups),
        biased="position_biased_input",
        undropped=r"\.pos_dropout$",
        refused=(("conv_kernel_size", (0,)),),
    ),
    "distilbert": Family(
        title="DistilBERT",
        model="DistilBertModel",
        groups=(
            (r"(LayerNorm|_layer_norm)\.", "norm"),
            (r"\.attention\.", "attention"),
            (r"\.ffn\.", "feedforward"),
            (r"\.position_embeddings\.", "position"),
            (r"\.word_embeddings\.", "token"),
        ),
        layer=r"^transformer\.layer\.(\d+)\.",
        table="embeddings.position_embeddings",
    ),
    "modernbert": Family(
        title="ModernBERT",
        model="ModernBertModel",
        gated=True,
        groups=(
            (r"norm\.(weight|bias)$", "norm"),
            (r"\.attn\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^embeddings\.tok_embeddings\.", "token"),
        ),
    ),
    "t5": _T5,
    "mt5": _with(_T5, title="mT5's encoder", model="MT5EncoderModel"),
    "bart": Family(
        title="BART's encoder",
        model="BartModel",
        left_out=((r"^decoder\.", "decoder"),),
        groups=(
            (r"(layer_norm|layernorm_embedding)\.", "norm"),
            (r"\.self_attn\.", "attention"),
            (r"\.fc[12]\.", "feedforward"),
            (r"\.embed_positions\.", "position"),
            (r"^(shared|encoder\.embed_tokens)\.", "token"),
        ),
        layer=r"^encoder\.layers\.(\d+)\.",
        part="encoder",
        table="encoder.embed_positions",
        first_position=2,
    ),
    "vit": _VIT,
    "deit": _with(_VIT, title="DeiT", model="DeiTModel"),
    "beit": _with(
        _VIT,
        title="BEiT",
        model="BeitModel",
        left_out=(
            *_VIT.left_out,
            (r"relative_position_bias|shared_position_bias", "positions of patches"),
        ),
    ),
    "dinov2": _with(
        _VIT,
        title="DINOv2",
        model="Dinov2Model",
        gated="use_swiglu_ffn",
        tower=("", "encoder.layer", "layernorm"),
        renames=_VISION_RENAMES[1:],
    ),
    "dinov2_with_registers": _with(
        _VIT,
        title="DINOv2 with registers",
        model="Dinov2WithRegistersModel",
        gated="use_swiglu_ffn",
        tower=("", "encoder.layer", "layernorm"),
        renames=_VISION_RENAMES[1:],
    ),
    "dinov3_vit": _with(
        _VIT,
        title="DINOv3",
        model="DINOv3ViTModel",
        gated="use_gated_mlp",
        tower=("", "model.layer", "norm"),
        renames=((r"^layer\.", "model.layer."),),
    ),
    "clip": _CLIP,
    "clip_vision_model": _with(_CLIP, sub=None),
    "siglip": _with(
        _CLIP,
        title="SigLIP's vision tower",
        model="SiglipVisionModel",
        left_out=(*_CLIP.left_out[1:3], *_CLIP.left_out[4:]),
        tower=("", "encoder.layers", "post_layernorm"),
    ),
    "wav2vec2": _WAV2VEC,
    "hubert": _with(_WAV2VEC, title="HuBERT", model="HubertModel"),
    "whisper": Family(
        title="Whisper's encoder",
        model="WhisperModel",
        modality="speech",
        left_out=(
            (r"^decoder\.", "decoder"),
            (r"^encoder\.conv[12]\.", "convolutional front end"),
        ),
        groups=(
            (r"layer_norm\.", "norm"),
            (r"\.self_attn\.", "attention"),
            (r"\.fc[12]\.", "feedforward"),
            (r"\.embed_positions\.", "position"),
        ),
        layer=r"^encoder\.layers\.(\d+)\.",
        tower=("", "encoder.layers", "encoder.layer_norm"),
        table="encoder.embed_positions",
        positions="max_source_positions",
    ),
    "esm": Family(
        title="ESM-2",
        model="EsmModel",
        modality="protein",
        left_out=(
            *_POOLER,
            (r"^contact_head\.", "contact head"),
        ),
        groups=(
            (r"(LayerNorm|layer_norm(_after)?)\.", "norm"),
            (r"\.attention\.", "attention"),
            (r"\.(intermediate|output)\.dense\.", "feedforward"),
            (r"\.word_embeddings\.", "token"),
        ),
        layer=r"^encoder\.layer\.(\d+)\.",
        refused=(("is_decoder", (False,)), ("position_embedding_type", ("rotary",))),
    ),
    "mamba": _MAMBA,
    "mamba2": _with(_MAMBA, title="Mamba-2", model="Mamba2Model"),
    "fnet": Family(
        title="FNet",
        model="FNetModel",
        left_out=_POOLER,
        groups=(
            (r"LayerNorm\.", "norm"),
            (r"\.(intermediate|output)\.dense\.", "feedforward"),
            (r"\.position_embeddings\.", "position"),
            (r"\.(word|token_type)_embeddings\.|^embeddings\.projection\.", "token"),
        ),
        layer=r"^encoder\.layer\.(\d+)\.",
        table="embeddings.position_embeddings",
    ),
}
FAMILIES["perceiver"] = Family(
    title="Perceiver IO",
    model="PerceiverForMaskedLM",
    left_out=((r"(^|\.)embedding_decoder\.", "head"),),
    groups=(
        (r"\.layernorm\d?\.", "norm"),
        # What the first attention asks with, and frozen with it.
        (r"(^|\.)embeddings\.latents$", "attention"),
        (r"\.attention\.", "attention"),
        (r"\.mlp\.", "feedforward"),
        (r"\.position_embeddings(\.|$)|\.output_position_encodings\.", "position"),
        (r"(^|\.)input_preprocessor\.embeddings\.", "token"),
    ),
    layer=r"\.self_attends\.(\d+)\.",
    part="perceiver",
    table="perceiver.input_preprocessor.position_embeddings",
    queries="perceiver.decoder.output_position_encodings",
    renames=((r"(\.output_position_encodings)\.position_embeddings$", r"\1.weight"),),
    # The decoders of the others have no query for each token.
    refused=(("architectures", (["PerceiverForMaskedLM"],)),),
)
FAMILIES["siglip_vision_model"] = _with(FAMILIES["siglip"], sub=None)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a config.json; None: it is not known here."""
    kind = config.get("model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that says how the backbone is built."""
    family = family_of(config)
    own = config.get(family.sub) if family is not None and family.sub else None
    return own if isinstance(own, Mapping) else config


@functools.cache
def _expression(rule: str) -> re.Pattern[str]:
    return re.compile(rule)


def groups_of(family: Family, config: Mapping[str, Any]) -> Rules:
    """Return the rules of a model: those of its family, as far as its config has them."""
    if family.biased is None or inner(config).get(family.biased, True):
        return family.groups
    return tuple(rule for rule in family.groups if rule[1] != "position")


def wrapper_of(names: Collection[str]) -> re.Pattern[str]:
    """Return what wraps the names of one checkpoint: `WRAPPER`, and any word before all of them."""
    places = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = (words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, places))
    own = (rf"{re.escape(word)}\." for word in shared if word not in _OWN_WORDS)
    return re.compile("|".join((WRAPPER.pattern, *own)))


def bare(family: Family, name: str, wrapper: re.Pattern[str]) -> str:
    """Return a parameter's name in a file as transformers' base model has it.

    Args:
        family: Whose rules hold.
        name: The name in the file.
        wrapper: See `wrapper_of`.
    """
    while found := wrapper.match(name):
        name = name[found.end() :]
    for old, new in family.renames:
        name = re.sub(old, new, name)
    return name


def sort(family: Family, name: str) -> tuple[str | None, str | None]:
    """Return (group, None) of a parameter, (None, what it is) if left out, else (None, None).

    Args:
        family: Whose rules hold.
        name: The parameter's name in transformers' base model, or in a model with a head.
    """
    for rule, what in (*family.left_out, *_HEADS):
        if _expression(rule).search(name):
            return None, what
    for rule, group in family.groups:
        if _expression(rule).search(name):
            return group, None
    return None, None


def refused(family: Family, config: Mapping[str, Any]) -> str | None:
    """Return what of a config.json cannot be honoured, in words; None: nothing."""
    for name, allowed in family.refused:
        if name in config and config[name] not in (*allowed, None):
            words = " or ".join(map(repr, (*allowed, None)))
            return f"{name}: {config[name]!r}, and {family.title} can only be run with {words}"
    return None


def most_tokens(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model has positions for; None: any number."""
    family = family_of(config)
    found = inner(config).get(family.positions) if family and family.positions else None
    if not isinstance(found, int) or family is None:
        return None
    # RoBERTa's table counts the rows that belong to no token; OPT's and BART's do not.
    return found - 2 if family.first_position == "pad" or family.model == "MPNetModel" else found


_INNER = ("intermediate_size", "n_inner", "encoder_ffn_dim", "ffn_dim", "d_ff", "hidden_dim")
"""What a config.json calls the width inside the feed-forward layer."""


@dataclass(frozen=True)
class Widths:
    """How wide the matrices of a layer are, whose hidden state is `width` wide."""

    queries: int
    """All heads of the queries together."""
    keys: int
    """All heads of the keys together; of the values alike."""
    inner: int
    """Inside the feed-forward layer."""
    entrances: int = 1
    """Matrices into it: 2 with a gate."""


def widths(config: Mapping[str, Any], *, width: int, heads: int) -> Widths:
    """Return how wide a layer's matrices are.

    Args:
        config: The content of config.json; empty: as in the table's own backbones.
        width: Of the hidden state.
        heads: Attention heads.
    """
    own, family = inner(config), family_of(config)
    head = own.get("head_dim") or own.get("d_kv") or width // heads
    gated = family.gated if family is not None else False
    if isinstance(gated, str):
        said = str(own.get("feed_forward_proj", "")).startswith("gated")
        gated = bool(own.get(gated, said))
    if ratio := own.get("mlp_ratio"):
        wide = int(width * ratio)
        if gated:  # DINOv2 keeps the number of its parameters.
            wide = (wide * 2 // 3 + 7) // 8 * 8
    else:
        wide = next((own[name] for name in _INNER if own.get(name)), 4 * width)
    return Widths(heads * head, (own.get("num_key_value_heads") or heads) * head, wide, 1 + gated)
