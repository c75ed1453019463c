"""The pretrained stories260K, a file of llama2.c, as a LlamaForCausalLM with its tokenizer: small real weights."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(os.environ.get("TARP_DATA", Path(__file__).resolve().parents[2] / "../shared/data")) / "stories260K"
needs_stories = pytest.mark.skipif(
    not (DATA / "stories260K.bin").exists(), reason=f"the pretrained model stories260K is not in {DATA}; set TARP_DATA"
)


def load_model() -> LlamaForCausalLM:
    """llama2.c's file: seven int32 (dim, hidden, layers, heads, kv heads, vocabulary, length), then float32 tensors."""
    raw = (DATA / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", raw[:28])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    weights = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    kv = dim // heads * kv_heads
    shapes = {  # in the file's order; every tensor but the first and the last has a leading layer dimension
        "embed_tokens": (vocabulary, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv, dim),
        "self_attn.v_proj": (layers, kv, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
    }
    state, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensor, at = weights[at : at + size].view(shape), at + size
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _halves(tensor, heads if name.endswith("q_proj") else kv_heads)
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = tensor
        else:
            state |= {f"model.layers.{i}.{name}.weight": tensor[i] for i in range(layers)}
    assert weights.numel() - at == length * (dim // heads), "what is left over are RoPE's cosines and sines"
    model = LlamaForCausalLM(config)
    left = model.load_state_dict(state, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys  # tied to the embedding
    return model.eval()


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama2.c rotates neighbours (2i, 2i+1) of a head, transformers rotates (i, i + half): reorder a head's rows."""
    layers, rows, dim = weight.shape
    pairs = weight.view(layers, heads, rows // heads // 2, 2, dim)
    return pairs.transpose(2, 3).reshape(layers, rows, dim)


class Tokenizer:
    """llama2.c's tokenizer file: the longest piece's length, then (score, length, bytes) for each piece."""

    def __init__(self) -> None:
        raw, at = (DATA / "tok512.bin").read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while at < len(raw):
            score, size = struct.unpack_from("<fi", raw, at)
            self.pieces.append(raw[at + 8 : at + 8 + size])
            self.scores.append(score)
            at += 8 + size
        self.ids = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Token ids after a beginning-of-sequence 1: characters, merged pair by pair where the best score is."""
        ids = [i for character in " " + text for i in self._character(character.encode())]
        while True:
            merged = [self.ids.get(self.pieces[a] + self.pieces[b]) for a, b in zip(ids, ids[1:], strict=False)]
            candidates = [(self.scores[piece], -at) for at, piece in enumerate(merged) if piece is not None]
            if not candidates:
                return [1, *ids]
            at = -max(candidates)[1]
            piece = merged[at]
            assert piece is not None
            ids[at : at + 2] = [piece]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids if i > 2).decode(errors="replace").removeprefix(" ")

    def _character(self, character: bytes) -> list[int]:
        # ids 3 to 258 are the raw bytes
        return [self.ids[character]] if character in self.ids else [byte + 3 for byte in character]
