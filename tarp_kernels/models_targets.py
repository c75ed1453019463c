"""Which layers of a model get an adapter: the defaults of each family, name patterns, blocks, and what is refused."""

import difflib
import re
import sys
from collections.abc import Mapping

import torch
from torch import nn

from tarp_kernels.nn import TarpConfig
from tarp_kernels.nn.linear import TarpLayer

# Endings of the layer names that are adapted by default (method.md §2), by `model.config.model_type`. Only layers
# inside the numbered blocks count, so heads and poolers that share an ending stay as they are.
_GPT2 = ("c_attn", "q_attn", "c_proj", "c_fc")
_LLAMA = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")

_MODEL_TYPES = {
    _GPT2: "gpt2 gpt_bigcode imagegpt openai-gpt",
    _LLAMA: "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 olmo olmo2 olmo3 cohere cohere2 stablelm "
    "granite helium seed_oss exaone4 arcee apertus ernie4_5 glm glm4 phi3",
    _BART: "bart mbart blenderbot blenderbot-small pegasus marian m2m_100 opt plbart whisper",
    _BERT: "bert roberta xlm-roberta camembert electra xlm-roberta-xl bert-generation roberta-prelayernorm "
    "data2vec-text ernie megatron-bert layoutlm",
    _T5: "t5 mt5 umt5 longt5",
}
DEFAULT_TARGETS = {model_type: endings for endings, types in _MODEL_TYPES.items() for model_type in types.split()}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def select_layers(model: nn.Module, config: TarpConfig) -> dict[str, nn.Module]:
    """{name: layer} of the layers to adapt, in the model's order. Raises before anything is changed."""
    candidates = {name: module for name, module in model.named_modules() if _is_linear_like(module)}
    if "" in candidates:
        raise TypeError(
            f"model: is a single {type(model).__name__}, which cannot be replaced in place; use TarpLinear.from_linear"
        )
    chosen = _by_target(model, config.target_modules, candidates)
    if config.layers is not None:
        chosen = _in_blocks(chosen, config.layers)
    for name, module in chosen.items():
        _refuse_unsupported(model, name, module)
    return chosen


def select_norms(model: nn.Module, config: TarpConfig) -> dict[str, nn.Module]:
    """{name: module} of the LayerNorm and RMSNorm modules that `train_layernorm` trains, within `layers` if given."""
    if not config.train_layernorm:
        return {}
    norms = {
        name: module
        for name, module in model.named_modules()
        if re.search("LayerNorm|RMSNorm", type(module).__name__)
        and not module._modules
        and any(True for _ in module.parameters(recurse=False))
    }
    if config.layers is not None:
        norms = {name: module for name, module in norms.items() if block_index(name) in config.layers}
    if not norms:
        raise ValueError("train_layernorm: the model has no LayerNorm or RMSNorm with weights; leave it False")
    return norms


def layer_ranks(names: list[str], config: TarpConfig) -> dict[str, int]:
    """{name: rank}: the first pattern of `rank_pattern` that fits the name or its ending after a dot, else r."""
    patterns = {_compile("rank_pattern", pattern): rank for pattern, rank in (config.rank_pattern or {}).items()}
    ranks, used = {}, set()
    for name in names:
        hit = next((pattern for pattern in patterns if _fits_ending(pattern, name)), None)
        ranks[name] = config.r if hit is None else patterns[hit]
        used.add(hit)
    for pattern in patterns:
        if pattern not in used:
            raise ValueError(
                f"rank_pattern: {pattern.pattern!r} decides the rank of no adapted layer; the first pattern that fits "
                f"counts, put special ones first. {_describe(names)}"
            )
    return ranks


def block_index(name: str) -> int | None:
    """Index of the transformer block in a layer's name: its first numeric part; None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_conv1d(module: nn.Module) -> bool:
    """Exactly transformers' Conv1D. Whoever holds one has imported transformers, so nothing is imported here."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


# --- by name ----------------------------------------------------------------------------------------------------------


def _by_target(model: nn.Module, target, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if target is None:
        return _family_defaults(model, candidates)
    if target == "all-linear":
        return _all_linear(model, candidates)
    if isinstance(target, str):
        pattern = _compile("target_modules", target)
        chosen = {name: module for name, module in candidates.items() if pattern.fullmatch(name)}
        if not chosen:
            raise ValueError(
                f"target_modules: the regular expression {target!r} fits the whole name of no linear layer; "
                f"pass a list for name endings, as in [{target!r}]. {_describe(candidates)}"
            )
        return chosen
    if not isinstance(target, list | tuple) or not target or not all(isinstance(ending, str) for ending in target):
        raise TypeError(
            f"target_modules: got {target!r}, expected None, 'all-linear', a regular expression or a list of "
            "name endings"
        )
    for ending in target:
        if not any(_ends_with(name, ending) for name in candidates):
            leaves = {name.rpartition(".")[2] for name in candidates}
            close = difflib.get_close_matches(ending, leaves, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"target_modules: {ending!r} ends no linear layer's name{hint} {_describe(candidates)}")
    return {name: layer for name, layer in candidates.items() if any(_ends_with(name, ending) for ending in target)}


def _family_defaults(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGETS:
        what = type(model).__name__ if model_type is None else f"model type {model_type!r}"
        raise ValueError(
            f"target_modules: there are no defaults for {what}; pass name endings of its linear layers, as in "
            f"target_modules={_suggestion(candidates)}, or 'all-linear'. {_describe(candidates)}"
        )
    endings = DEFAULT_TARGETS[model_type]
    chosen = {
        name: module
        for name, module in candidates.items()
        if block_index(name) is not None and any(_ends_with(name, ending) for ending in endings)
    }
    if not chosen:
        raise ValueError(
            f"target_modules: none of the default names of model type {model_type!r} ({', '.join(endings)}) occurs in "
            f"this model; pass target_modules. {_describe(candidates)}"
        )
    return chosen


def _all_linear(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer but the output embeddings, whose rank-r update would cost more than most blocks'."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    chosen = {name: module for name, module in candidates.items() if module is not head}
    if not chosen:
        raise ValueError(
            "target_modules: 'all-linear' finds no linear layer besides the output embeddings; "
            "name layers that are nn.Linear or transformers' Conv1D"
        )
    return chosen


def _in_blocks(chosen: Mapping[str, nn.Module], layers) -> dict[str, nn.Module]:
    if isinstance(layers, str) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise TypeError(f"layers: got {layers!r}, expected a list of block indices, for example [0, 1]")
    blocks = sorted({index for name in chosen if (index := block_index(name)) is not None})
    missing = [index for index in layers if index not in blocks]
    if missing or not layers:
        span = f"from {blocks[0]} to {blocks[-1]}" if blocks else "none"
        came = f"there is no block {missing[0]}" if missing else "the list is empty"
        raise ValueError(f"layers: {came}; indices of this model's blocks with such layers: {span}")
    return {name: module for name, module in chosen.items() if block_index(name) in layers}


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _fits_ending(pattern: re.Pattern, name: str) -> bool:
    starts = (0, *(found.end() for found in re.finditer(r"\.", name)))
    return any(pattern.fullmatch(name, start) for start in starts)


def _compile(argument: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression ({error})") from error


# --- what can be adapted ----------------------------------------------------------------------------------------------


def _is_linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or _looks_linear(module)


def _looks_linear(module: nn.Module) -> bool:
    """Linear layers of quantisation libraries that are no nn.Linear: seen, so that they are refused and not skipped."""
    leaf = not module._modules and not isinstance(module, TarpLayer)
    return leaf and hasattr(module, "in_features") and hasattr(module, "out_features")


def _refuse_unsupported(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise for a layer whose own forward would be lost, or whose weight is no plain floating-point matrix.

    The rule is the exact type: a subclass overrides forward (quantised weights, tensor parallelism, parametrisations)
    or marks that a caller reads the weight and never calls the layer, and both would go wrong in silence.
    """
    kind = type(module).__name__
    ways = "leave it out by naming other layers in target_modules"
    if type(module) is not nn.Linear and not is_conv1d(module):
        raise TypeError(
            f"{name}: got {kind}, expected exactly torch.nn.Linear or transformers' Conv1D; "
            f"load the model without quantisation or wrappers, or {ways}"
        )
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        raise TypeError(
            f"{name}.weight: got {type(weight).__name__} of {weight.dtype}, expected an nn.Parameter of "
            f"float32, bfloat16, float16 or float64; load the model without quantisation or sharding, or {ways}"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise TypeError(
            f"{name}: belongs to torch.nn.TransformerEncoderLayer, whose fast path reads the weights and would skip "
            f"the adapter in eval mode; {ways}"
        )
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise ValueError(
            f"{name}: has hooks or a replaced forward, which the adapted layer would lose; "
            "call apply_tarp first and register them afterwards"
        )


# --- words for errors -------------------------------------------------------------------------------------------------


def _describe(names) -> str:
    patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    shown = ", ".join(patterns[:16]) + (f", and {len(patterns) - 16} more" if len(patterns) > 16 else "")
    return f"Linear layers: {shown or 'none'}"


def _suggestion(candidates) -> list[str]:
    inside = [name for name in candidates if block_index(name) is not None] or list(candidates)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in inside))[:8]
