"""Which rows belong to which sequence and task: what attention_mask, cu_seqlens and segments say together.

Padding is dropped before anything is computed, so a convolution's neighbours are the nearest tokens, and a cell sees
nothing but tokens with offsets. What a device needs of that is made once and kept: steps on the same batch neither look
at its mask again nor copy tables from the host.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor


class Part(NamedTuple):
    """The tokens of one task."""

    start: int
    end: int
    sequences: list[int]  # offsets from `start` to `end` of its sequences; those whose rows are all padding are kept


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def _once(make: Callable[Concatenate["Layout", Arguments], Made]) -> Callable[Concatenate["Layout", Arguments], Made]:
    """A method of `Layout` whose result is kept for the same arguments."""

    @functools.wraps(make)
    def kept(self: "Layout", *arguments: Arguments.args, **named: Arguments.kwargs) -> Made:
        key = (make.__name__, *arguments, *named.items())
        if key not in self.kept:
            with torch.inference_mode(False):  # a later backward may have to keep it
                self.kept[key] = make(self, *arguments, **named)
        return self.kept[key]

    return kept


class Layout:
    """Which rows are tokens and whose they are; its tables are shared by all who ask, so nobody may write to them.

    rows   int64: the rows of h that are tokens; None: all are
    parts  one for each task, one without segments
    """

    def __init__(self, rows: Tensor | None, parts: list[Part]):
        self.rows, self.parts = rows, parts
        self.kept: dict[tuple, Any] = {}

    def tokens(self, rows: Tensor) -> Tensor:
        """Those of a tensor like h, [rows, d], that are no padding."""
        return rows if self.rows is None else rows[self.rows]

    def with_padding(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """The tokens' results among the rows of `padding`, in its shape."""
        flat = padding.detach().reshape(-1, padding.shape[-1])
        return (tokens if self.rows is None else flat.index_copy(0, self.rows, tokens)).reshape(padding.shape)

    @_once
    def task_ends(self, device: torch.device) -> Tensor:
        """int64 [tasks + 1]: where the tasks begin and end among the tokens."""
        return torch.tensor([0, *(part.end for part in self.parts)], device=device)

    @_once
    def sequence_ends(self, device: torch.device) -> Tensor:
        """int64 [sequences + 1]: where the sequences of all tasks begin and end among the tokens."""
        return torch.tensor([0, *(end for part in self.parts for end in part.sequences[1:])], device=device)

    @_once
    def task_sequences(self) -> Tensor:
        """int64 [tasks + 1], on the CPU: where the tasks begin and end among the sequences."""
        return torch.tensor([0, *(len(part.sequences) - 1 for part in self.parts)]).cumsum(0)

    @_once
    def sequence_numbers(self, device: torch.device) -> Tensor:
        """int32 [T]: the sequence of each token."""
        lengths = self.sequence_ends(torch.device("cpu")).diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).int().to(device)

    @_once
    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 [T] each: a token's place in its sequence, and that sequence's length."""
        ends = self.sequence_ends(torch.device("cpu"))
        lengths = ends.diff()
        starts = torch.repeat_interleave(ends[:-1], lengths)
        places = torch.arange(int(ends[-1])) - starts
        return places.int().to(device), torch.repeat_interleave(lengths, lengths).int().to(device)

    @_once
    def neighbours(self, task: int, past_rows: int, device: torch.device) -> "Neighbours":
        """Of the tokens of one task."""
        part = self.parts[task]
        return Neighbours([offset - part.start for offset in part.sequences], past_rows, device)


@torch.inference_mode(False)
def layout(h: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, segments: Tensor | None) -> Layout:
    """The layout of h [B, S, d] or [T, d]; the end of a task is the end of a sequence."""
    count = h.shape[:-1].numel()
    if h.dim() == 3:
        sequences = [i * h.shape[1] for i in range(h.shape[0] + 1)]
    else:
        sequences = [0, count] if cu_seqlens is None else cu_seqlens.tolist()
    tasks = [0, count] if segments is None else segments.tolist()
    rows, tokens_before = None, None
    if attention_mask is not None:
        token = attention_mask.reshape(-1) != 0
        if not bool(token.all()):
            rows = token.nonzero().squeeze(1)
            tokens_before = [0, *token.cumsum(0).tolist()]
    parts = []
    for start, end in zip(tasks[:-1], tasks[1:], strict=True):
        own = [start, *(offset for offset in sequences if start < offset < end)]
        if start < end:  # no rows are no sequence
            own.append(end)
        if tokens_before is not None:
            own = [tokens_before[offset] for offset in own]
        parts.append(Part(own[0], own[-1], own))
    return Layout(rows, parts)


class Layouts:
    """`layout`, but the same arguments are looked at once: for calls with one mask, in many layers or many steps.

    An argument is the same as long as it is the same tensor and nobody has written to it. It is held, and the layouts
    with it; of more than MOST the oldest goes. Whoever captures a CUDA graph keeps what `held` returns as long as the
    graph, which reads the layouts' tables.
    """

    MOST = 8

    def __init__(self) -> None:
        self._found: dict[tuple, tuple[tuple[Tensor | None, ...], Layout]] = {}

    def __call__(
        self, h: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, segments: Tensor | None
    ) -> Layout:
        given = (attention_mask, cu_seqlens, segments)
        if any(tensor is not None and tensor.is_inference() for tensor in given):  # nobody counts what is written there
            return layout(h, *given)
        key = (h.shape[:-1], *(None if tensor is None else (id(tensor), tensor._version) for tensor in given))
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = given, layout(h, *given)
            for oldest in list(self._found)[: -self.MOST]:
                self._found.pop(oldest, None)  # another thread may have been here
        return found[1]

    def held(self) -> list[Layout]:
        """The layouts that are kept now."""
        return [found for _, found in self._found.values()]


class Neighbours:
    """Where a convolution finds the tokens around each token of one task: rows of [its input; the past; a zero row].

    The past are the last rows of each sequence from before this call, STATE_ROWS of them, where there is a state.
    """

    def __init__(self, sequences: list[int], past_rows: int, device: torch.device):
        ends = torch.tensor(sequences, dtype=torch.int64, device=device)
        self.tokens, self.sequences, self.past_rows = sequences[-1], len(sequences) - 1, past_rows
        self.lengths = ends.diff()
        self.starts = ends[:-1]
        self.sequence = torch.repeat_interleave(torch.arange(self.sequences, device=device), self.lengths)
        self.position = torch.arange(self.tokens, device=device) - self.starts[self.sequence]  # [T]

    def at(self, offset: int) -> Tensor:
        """[T]: where the row lies that is `offset` tokens later."""
        return self._find(self.sequence, self.position + offset)

    def last(self, rows: int) -> Tensor:
        """[sequences, rows]: where the last rows of every sequence lie, the past counted in."""
        sequence = torch.arange(self.sequences, device=self.lengths.device)[:, None]
        return self._find(sequence, self.lengths[:, None] + torch.arange(-rows, 0, device=self.lengths.device))

    def _find(self, sequence: Tensor, position: Tensor) -> Tensor:
        zero = self.tokens + self.sequences * self.past_rows
        past = self.tokens + sequence * self.past_rows + self.past_rows + position
        found = torch.where(position < 0, past, self.starts[sequence] + position)
        outside = (position < -self.past_rows) | (position >= self.lengths[sequence])
        return found.masked_fill(outside, zero)
