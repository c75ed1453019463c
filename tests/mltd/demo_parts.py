"""A corpus, a tokenizer and a model small enough for a whole demo in seconds."""

import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mltd.data.chatterbot import read_topics, split_topics
from mltd.demo import Ingredients
from mltd.demo_recipe import Recipe
from mltd.inner_loop import InnerConfig
from mltd.meta_trainer import MetaConfig
from tarp_kernels import TarpConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz .?\n"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and an end-of-turn token."""
    pieces = ["<unk>", "<|im_end|>", *LETTERS]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write_corpus(folder: Path, topics: dict[str, list[list[str]]]) -> Path:
    """Topics as files of the corpus's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, conversations in topics.items():
        text = yaml.safe_dump({"categories": [name], "conversations": conversations})
        (folder / f"{name}.yml").write_text(text)
    return folder


def made_up_topics(count: int, pairs: int, seed: int = 0) -> dict[str, list[list[str]]]:
    """Topics of distinct random words, every reply beginning with its topic's own word."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefghij", k=5))

    topics = {}
    for i in range(count):
        own = word()
        topics[f"topic{i}"] = [[f"{word()} {word()}?", f"{own} {word()}."] for _ in range(pairs)]
    return topics


def tiny_model() -> LlamaForCausalLM:
    """Always the same random decoder over the letters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2 + len(LETTERS),
            max_position_embeddings=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
        return LlamaForCausalLM(config).eval()


def tiny_recipe(**changes) -> Recipe:
    inner = InnerConfig(steps=2, lr=1e-2)
    meta = MetaConfig(inner, iterations=4, tasks_per_batch=2, outer_lr=1e-2, validate_every=2)
    values = {
        "split": {"support": 2, "query": 3, "train_query": 3, "test_topics": 2, "validation_topics": 1, "episodes": 2},
        "tarp": TarpConfig(r=2),
        "steps": (0, 1, 2),
        "inner": {name: [inner] for name in ("finetune", "lora", "tarp-nometa")},
        "meta": {name: [meta] for name in ("mltd", "tarp-multitask")},
        "replies": 1,
        "rounds": 2,
    }
    return Recipe(**{**values, **changes})


def tiny_ingredients(folder: Path, recipe: Recipe) -> Ingredients:
    tokenizer = letter_tokenizer()
    topics = read_topics(write_corpus(folder, made_up_topics(6, 10)))
    return Ingredients("a tiny random model", tiny_model, tokenizer, split_topics(topics, tokenizer, **recipe.split))
