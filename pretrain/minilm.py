"""The text encoder: all-MiniLM-L6-v2 token states, T = 32 tokens, width 384, as ``backbones/pocket.py`` uses it.

``states`` are the last hidden states with padding zeroed; ``pooled`` is their mean over the real tokens, L2-normalised.
``reduce_encoder`` writes a half-precision copy that knows only the tokens of the given texts, small enough to carry to
a machine without the package; unknown tokens are refused there, never replaced.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

TOKENS = 32


def open_tokenizer(path: Path) -> Tokenizer:
    """WordPiece tokenizer that cuts and pads to ``TOKENS``."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return tokenizer


def reduce_encoder(model_folder: Path, texts: Iterable[str], folder: Path) -> int:
    """Writes the encoder with the embedding rows of ``texts``' tokens, fp16, and the id list; returns the row count."""
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    used = {0, 100, 101, 102}
    for encoding in tokenizer.encode_batch(list(texts)):
        used.update(encoding.ids)
    ids = torch.tensor(sorted(used), dtype=torch.int32)
    state = {k.removeprefix("bert."): v for k, v in load_file(model_folder / "model.safetensors").items()}
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    key = "embeddings.word_embeddings.weight"
    state[key] = state[key][ids.long()]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids} | {k: v.half().contiguous() for k, v in state.items()}, folder / "minilm.safetensors")
    config = json.loads((model_folder / "config.json").read_text()) | {"vocab_size": len(ids)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    return len(ids)


class TextEncoder:
    """The reduced encoder. ``tokenize`` runs on CPU (any process), ``embed`` on ``device`` after ``load``."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = open_tokenizer(folder / "tokenizer.json")
        self.state = load_file(folder / "minilm.safetensors")
        known = self.state.pop("ids").numpy()
        self.row_of = np.full(int(known.max()) + 1, -1, np.int32)
        self.row_of[known] = np.arange(len(known))
        self.config = BertConfig.from_dict(json.loads((folder / "config.json").read_text()))
        self.model: BertModel | None = None

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """-> int32 [B, T] rows of the reduced embedding, 0 = padding. Raises ValueError on tokens it does not know."""
        ids = np.array([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))], np.int64)
        ids = ids.reshape(-1, TOKENS)
        rows = np.where(ids < len(self.row_of), self.row_of[np.minimum(ids, len(self.row_of) - 1)], -1)
        if (rows < 0).any():
            bad = int(np.where((rows < 0).any(1))[0][0])
            raise ValueError(
                f"text {texts[bad]!r} has tokens outside the reduced vocabulary: reduce with this text too"
            )
        return rows.astype(np.int32)

    def load(self, device: str) -> None:
        """Builds the model in fp32 on ``device``."""
        self.model = BertModel(self.config, add_pooling_layer=False)
        wanted = self.model.state_dict().keys()
        self.model.load_state_dict({k: v.float() for k, v in self.state.items() if k in wanted})
        self.model.eval().to(device)

    @torch.no_grad()
    def embed(self, rows_BT: Tensor) -> tuple[Tensor, Tensor]:
        """-> (states [B, T, 384], pooled [B, 384]), fp32."""
        if self.model is None:
            raise RuntimeError("TextEncoder.embed before load(device): call load first")
        mask = (rows_BT != 0).long()
        # half on a GPU: two times faster, and an error (1e-3) below that of the bf16 in which the states are kept
        with torch.autocast(rows_BT.device.type, torch.float16, enabled=rows_BT.device.type == "cuda"):
            states = self.model(input_ids=rows_BT.long(), attention_mask=mask).last_hidden_state
        states = states.float() * mask[..., None]
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return states, torch.nn.functional.normalize(mean, dim=1)
