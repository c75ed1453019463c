"""Dialogue pairs as scored examples: the prompt is read, only the reply is learnt."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple

from mltd.kinds import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "\n"
"""What ends a turn, the prompt's as well as the reply's."""


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
    """Token ids of ``prompt`` up to where the reply begins: the two are plain lines, without a chat template.

    The corpus is terse chat, not instructions, and plain lines need 0.4 to 0.7 of the tokens of a chat template.
    """
    return tokenizer(prompt + END, add_special_tokens=False).input_ids


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> Example:
    """``pair`` as token ids and labels: -100 over the prompt; the reply and the line break that ends it are scored."""
    prompt = prompt_ids(tokenizer, pair.prompt)
    reply = tokenizer(pair.reply, add_special_tokens=False).input_ids
    reply += tokenizer(END, add_special_tokens=False).input_ids
    return Example(tuple(prompt + reply), tuple([IGNORED] * len(prompt) + reply))
