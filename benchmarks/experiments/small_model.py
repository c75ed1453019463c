"""The small pretrained model of the experiments, made on the spot: a tokenizer, a GPT-2, and its pretraining."""

import json
import math
import random
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mltd.kinds import Example

Losses = dict[int, list[float]]
"""Of pretraining, by seed."""


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens, learnt from these texts; no text is unknown to it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def small_gpt2(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, context: int, seed: int) -> GPT2LMHeadModel:
    """GPT-2 of this width, from `seed`, without dropout: budgets here are too small to over-fit in training."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 32), "n_positions": context}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    end = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, **sizes, **none)
        return GPT2LMHeadModel(config).eval()


def pretrain(
    model: GPT2LMHeadModel, windows: Sequence[Example], steps: int, batch: int, lr: float, seed: int, path: Path
) -> list[float]:
    """Train all weights on windows of one length, by AdamW with a cosine schedule; returns some losses on the way.

    path  where the trained weights are kept: they are read back from there, so that a run which was cut goes on
    """
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)  # the tied output weights are not saved twice
        return json.loads(path.with_suffix(".json").read_text())
    order, draw, found = list[int](), random.Random(seed), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / max(1, steps // 20))
            group["lr"] = lr * warm * (1 + math.cos(math.pi * step / steps)) / 2
        if len(order) < batch:
            order = list(range(len(windows)))
            draw.shuffle(order)
        ids = torch.tensor([windows[order.pop()].input_ids for _ in range(min(batch, len(windows)))])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            found.append(round(loss.item(), 3))
            print(f"pretraining: step {step + 1} of {steps}, loss {found[-1]}", flush=True)
    model.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(found))
    save_file(_untied(model), path)
    return found


def pretrained(
    tokenizer: PreTrainedTokenizerFast,
    windows: Sequence[Example],
    asked: Namespace,
    batch: int,
    losses: Losses,
    seed: int,
) -> GPT2LMHeadModel:
    """The model that an experiment's options ask for, from `seed`; what it lost on the way goes into `losses`."""
    made = small_gpt2(tokenizer, asked.width, asked.layers, asked.context, seed)
    path = asked.run_dir / f"pretrained-{seed}.safetensors"
    losses[seed] = pretrain(made, windows, asked.pretrain_steps, batch, lr=2e-3, seed=seed, path=path)
    return made


def _untied(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.named_parameters()}
