"""Tiny random models of every family, made from configurations; nothing is downloaded."""

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tarp_kernels import TarpConfig, apply_tarp, tarp_parameters

VOCABULARY, WIDTH, BLOCKS = 61, 16, 2
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = ("gpt2", "llama", "bart", "roberta", "t5")
GENERATING = ("gpt2", "llama", "bart", "t5")


def _gpt2(**changes):
    sizes = {"n_positions": 64, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**TOKENS, **sizes | changes))


def _llama(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**TOKENS, **sizes | changes))


def _bart(**changes):
    sizes = {"d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "max_position_embeddings": 64}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    starts = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartForConditionalGeneration(BartConfig(**TOKENS, **sizes, **starts, **changes))


def _roberta(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 64, "type_vocab_size": 1}
    return RobertaForMaskedLM(RobertaConfig(**TOKENS, **sizes, **changes))


def _t5(**changes):
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": BLOCKS, "num_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**tokens, **sizes, **{"feed_forward_proj": "gated-gelu"} | changes))


_BUILD = {"gpt2": _gpt2, "llama": _llama, "bart": _bart, "roberta": _roberta, "t5": _t5}


def base_model(family: str, seed: int = 0, **changes) -> nn.Module:
    """A random model in evaluation mode, its weights large enough that its outputs depend on its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _BUILD[family](**changes)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2 and family != "t5":
                    parameter.mul_(15 if family == "bart" else 5)
                elif parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(family: str, sequences: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sequences, length), generator=draw)
    mask = torch.ones_like(ids)
    if family in ("bart", "t5"):
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.flip(1)[:, :5].contiguous()}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def move(model: nn.Module, seed: int = 1, scale: float = 0.1) -> nn.Module:
    """Take an adapter off its start, where it has no effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tarp_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.add_(noise.to(parameter), alpha=scale)
    return model


def tarp_model(
    family: str, seed: int = 0, moved: bool = True, changes=None, dtype=torch.float32, **config
) -> nn.Module:
    """base_model(family, seed, **changes) with an adapter, which `moved` takes off its start."""
    model = base_model(family, seed, **changes or {}).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        apply_tarp(model, TarpConfig(**{"r": 3} | config))
    return move(model) if moved else model


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the loss for every adapter parameter."""
    parameters = tarp_parameters(model)
    found = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))
