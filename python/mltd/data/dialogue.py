"""Dialogue pairs as scored examples: the prompt is read, only the reply is learnt."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

from mltd.tasks import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MARK = "<|im_start|>"


class Pair(NamedTuple):
    """What one side says and what the other answers."""

    prompt: str
    reply: str


def normalised(text: str) -> str:
    """Lower case, words only: the form in which two texts count as the same."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def stable_order(*parts: str) -> str:
    """A sort key that shuffles the same way on every machine and every Python."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of ``prompt`` up to where the reply begins.

    Chat models get their turns (``<|im_start|>user … assistant``) without the template's default system message:
    on the corpus of the demo the untouched model scores better without it, at half the tokens. A tokenizer
    without chat marks gets the prompt and a line break.
    """
    if CHAT_MARK in tokenizer.get_vocab():
        text = f"{CHAT_MARK}user\n{prompt}<|im_end|>\n{CHAT_MARK}assistant\n"
    else:
        text = f"{prompt}\n"
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Example:
    """``pair`` as token ids and labels: -100 over the prompt; the reply and its end-of-turn token are scored."""
    prompt = prompt_ids(tokenizer, pair.prompt)
    reply = tokenizer(pair.reply, add_special_tokens=False).input_ids
    if tokenizer.eos_token_id is not None:
        reply = [*reply, tokenizer.eos_token_id]
    return Example(tuple(prompt + reply), tuple([IGNORED] * len(prompt) + reply))
