"""What the tests of the benchmarks share."""

import pytest
import torch

from mltd.bench import models


@pytest.fixture
def small_llama(monkeypatch):
    """Whole models of two narrow layers instead of SmolLM2's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def small(layers, vocabulary):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes)).eval()

    monkeypatch.setattr(models, "smollm2_shaped", small)
    monkeypatch.setattr(models, "TOKENS", 6)
