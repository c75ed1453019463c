"""Every model type that has a place for search cells: as many cells as blocks, an unchanged start, what each cell adds,
and the cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, architecture
from tarp_kernels.models_cells import _PLACES, search_cells
from tests.models.cell_models import MIXED, logits_of_checked_cells, one_hot
from tests.models.tiny import logits, move

SIZES = (
    {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    | {"hidden_size": 32, "d_model": 32, "embedding_size": 32, "n_embd": 32, "intermediate_size": 48, "d_ff": 48}
    | {"num_hidden_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
    | {"n_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "n_head": 4}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    | {"n_positions": 64, "max_position_embeddings": 64, "query_pre_attn_scalar": 8}
)
TYPES = [(name, place.begins) for place in _PLACES for name in place.types.split()]


def tiny(model_type: str, begins: str):
    default = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name) or name.endswith("token_id")}
    config = AutoConfig.for_model(model_type, **sizes)
    kind = AutoModelForCausalLM if begins == "mlp" else AutoModelForMaskedLM
    torch.manual_seed(0)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else kind).from_config(config).double().eval()


@pytest.mark.parametrize(("model_type", "begins"), TYPES, ids=[name for name, _ in TYPES])
def test_family(model_type, begins):
    model = tiny(model_type, begins)
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5]
    base = logits(model, batch)
    apply_tarp(model, TarpConfig(r=2, search_cell=SearchCellConfig(width=4)))
    causal = [cell.causal for cell in search_cells(model).values()]
    assert causal == ([False] * 2 if begins == "intermediate.dense" else [True] * 2) or (
        model.config.is_encoder_decoder and causal == [False] * 2 + [True] * 2
    )
    with architecture(model, one_hot()):
        torch.testing.assert_close(logits(model, batch), base, rtol=1e-10, atol=1e-10)
    move(model, scale=0.3)
    mask[1, 5:] = 0
    one, other = (logits_of_checked_cells(model, batch, alpha) for alpha in (one_hot(), one_hot(MIXED)))
    assert (one - other).abs().max() > 1e-3, "what the cells add would not reach the logits"
    mask.fill_(1)
    with architecture(model, one_hot(MIXED)):
        if begins == "intermediate.dense":
            return
        if model_type != "gemma2":  # whose own attention, in float64, makes NaN of rows that are padding alone
            mask[0, :3] = 0
        given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        given |= {"output_scores": True, "return_dict_in_generate": True}
        found, expected = (model.generate(**given, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.isfinite(found.scores[0]).all()
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
