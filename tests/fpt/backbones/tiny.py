"""A tiny directory of every family that `auto` knows, made by transformers' own config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 13,
}  # fmt: skip
POSITIONS = {"max_position_embeddings": 64}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = TEXT | POSITIONS | IDS | {"num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 8}
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
SOUND = TEXT | {
    "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 13, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 13, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}  # fmt: skip
STATES: dict[str, Any] = {
    "vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 4}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 4, "attn_logit_softcapping": 0.5}),
    "gemma3_text": ("Gemma3Text", GEMMA | {"sliding_window": 4}),
    "olmo2": ("Olmo2", LLAMA),
    "smollm3": ("SmolLM3", LLAMA | {"no_rope_layers": [1, 0]}),
    "phi3": ("Phi3", LLAMA),
    "phi": ("Phi", TEXT | POSITIONS | IDS),
    "gpt2": (
        "GPT2",
        {"vocab_size": 13, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 1},
    ),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": 13, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 1,
         "eos_token_id": 1, **POSITIONS},
    ),
    "gptj": (
        "GPTJ",
        {"vocab_size": 13, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoX", TEXT | POSITIONS | {"bos_token_id": 1, "eos_token_id": 1}),
    "opt": (
        "OPT",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
         "vocab_size": 13, "word_embed_proj_dim": 32, **POSITIONS},
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 13}),
    "bert": ("Bert", TEXT | POSITIONS),
    "roberta": ("Roberta", TEXT | POSITIONS),
    "xlm-roberta": ("XLMRoberta", TEXT | POSITIONS),
    "camembert": ("Camembert", TEXT | POSITIONS),
    "electra": ("Electra", TEXT | POSITIONS | {"embedding_size": 16}),
    "albert": ("Albert", TEXT | POSITIONS | {"embedding_size": 16}),
    "mpnet": ("MPNet", TEXT | POSITIONS),
    "deberta-v2": (
        "DebertaV2",
        TEXT | POSITIONS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                            "position_buckets": 8, "share_att_key": True,
                            "norm_rel_ebd": "layer_norm", "position_biased_input": False,
                            "type_vocab_size": 0},
    ),
    "distilbert": (
        "DistilBert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 13, **POSITIONS},
    ),
    "modernbert": (
        "ModernBert",
        TEXT | POSITIONS | IDS | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": ("T5", T5),
    "mt5": ("MT5", T5),
    "bart": ("Bart", SEQ2SEQ | POSITIONS),
    "vit": ("ViT", IMAGE),
    "deit": ("DeiT", IMAGE),
    "beit": ("Beit", IMAGE | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2", IMAGE),
    "dinov2_with_registers": ("Dinov2WithRegisters", IMAGE),
    "dinov3_vit": ("DINOv3ViT", IMAGE),
    "clip": ("CLIP", {"vision_config": IMAGE, "text_config": TEXT | POSITIONS | IDS}),
    "clip_vision_model": ("CLIPVision", IMAGE),
    "siglip": ("Siglip", {"vision_config": IMAGE, "text_config": TEXT | POSITIONS | IDS}),
    "siglip_vision_model": ("SiglipVision", IMAGE),
    "wav2vec2": ("Wav2Vec2", SOUND),
    "hubert": ("Hubert", SOUND | {"do_stable_layer_norm": True}),
    "whisper": (
        "Whisper",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 64, "max_target_positions": 16,
                   "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
                   "decoder_start_token_id": 1, "suppress_tokens": None,
                   "begin_suppress_tokens": None},
    ),
    "esm": (
        "Esm",
        TEXT | POSITIONS | {"pad_token_id": 1, "mask_token_id": 3,
                            "position_embedding_type": "rotary"},
    ),
    "mamba": ("Mamba", STATES),
    "mamba2": (
        "Mamba2",
        STATES | {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
    ),
    "fnet": (
        "FNet",
        {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 13,
         **POSITIONS},
    ),
    "perceiver": (
        "Perceiver",
        {"d_model": 32, "d_latents": 24, "num_latents": 6, "num_self_attends_per_block": 2,
         "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 16,
         "v_channels": 24, "num_blocks": 2, "cross_attention_widening_factor": 2,
         "vocab_size": 13, **POSITIONS},
    ),
}  # fmt: skip
"""model_type -> (what transformers' classes begin with, fields of its config)."""


def save(kind: str, folder: Path, **changes: Any) -> Any:
    """Save a small random model of a family, with norms and biases that are not 1 and 0."""
    name, fields = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields | changes)
    # Perceiver's own model has no decoder, and so no state for a token.
    whole = "ForMaskedLM" if kind == "perceiver" else "Model"
    model = getattr(transformers, f"{name}{whole}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model
