"""`SearchCell`: the weights of one search cell as a module, whole or cut down to one architecture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tarp_kernels.nn.config import check_operations
from tarp_kernels.ops.search_cell import OPERATIONS, CellWeights, search_cell

EDGES = 9
STEMS = ("layernorm", "identity")


class SearchCell(nn.Module):
    """A search cell of reduced width beside a layer of width d = hidden_size (see `tarp_kernels.search_cell`).

    Its parameters are those of `CellWeights`, by the same names and in the same layout, causal or not. It starts as
    exactly the identity, because the projection back to d starts at zero; the rest starts like nn.Linear and nn.Conv1d.
    Source: Hou, Salazar, Polovets, "Meta-Learning the Difference", TACL 10 (2022), section 3.3.

    hidden_size  d, width of the layer
    width        C, width inside the cell
    stem         "layernorm": h is normalised before it enters; "identity": it enters as it is
    causal       True for decoders: convolutions see the past only; False for encoders
    operations   names of the candidates, in the order of OPERATIONS; the others have no weights

    d = 768, C = 64, stem="identity", all operations: 556,736 parameters. Raises TypeError or ValueError otherwise.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int = 64,
        stem: str = "layernorm",
        causal: bool = True,
        operations: Sequence[str] = OPERATIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("width", width)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: got {size!r}, expected an integer ≥ 1")
        if stem not in STEMS:
            raise ValueError(f"stem: got {stem!r}, expected one of {', '.join(map(repr, STEMS))}")
        if not isinstance(causal, bool):
            raise TypeError(f"causal: got {causal!r}, expected True (decoder) or False (encoder)")
        self.hidden_size, self.width, self.stem, self.causal = hidden_size, width, stem, causal
        self.operations = check_operations(operations)
        for name, shape in self.shapes.items():
            if name.removesuffix("_bias") in self.operations or name.removesuffix("_bias") not in OPERATIONS:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of `CellWeights`, of left out operations too."""
        return CellWeights.shapes(self.hidden_size, self.width, self.stem == "layernorm")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: exactly the identity, whatever alpha is."""
        taps = {"conv3": 3, "conv5": 5}
        for name, parameter in self.named_parameters(recurse=False):
            owner = name.removesuffix("_bias")
            if owner == "output" or name == "norm_bias":
                parameter.zero_()
            elif name == "norm":
                parameter.fill_(1)
            else:
                inputs = self.hidden_size if owner == "project" else self.width * taps.get(owner, 1)
                parameter.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def weights(self, tensors: Mapping[str, Tensor] | None = None) -> CellWeights:
        """The cell's own tensors, or others in their place, as the operator takes them; nothing is copied."""
        given: dict[str, Any] = dict(self.named_parameters(recurse=False) if tensors is None else tensors)
        lead = given["output"].shape[:-2]  # of a stack of cells
        for name, shape in self.shapes.items():
            if name not in given:  # of a left out operation: its alpha is 0, so nobody reads it
                given[name] = given["output"].new_zeros(()).expand(*lead, *shape)
        return CellWeights(**given)

    def full_alpha(self, alpha: Tensor) -> Tensor:
        """alpha [..., 9, 6] from alpha [..., 9, len(operations)]: zeros for the operations that are left out."""
        if not isinstance(alpha, Tensor):
            raise TypeError(f"alpha: got {type(alpha).__name__}, expected a torch.Tensor [9, {len(self.operations)}]")
        if alpha.dim() < 2 or alpha.shape[-1] != len(self.operations):
            raise ValueError(
                f"alpha: got shape {list(alpha.shape)}, expected [9, {len(self.operations)}], that is [edges, "
                f"operations] with the operations {', '.join(self.operations)}"
            )
        if self.operations == OPERATIONS:
            return alpha
        columns = dict(zip(self.operations, alpha.unbind(-1), strict=True))
        left_out = alpha.new_zeros(alpha.shape[:-1])
        return torch.stack([columns.get(name, left_out) for name in OPERATIONS], -1)  # no index: a copy from the host

    def forward(
        self, h: Tensor, alpha: Tensor, attention_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """h [B, S, d] or one packed sequence [T, d] -> the same shape and dtype.

        alpha           [9, len(operations)]; with segments also [tasks, 9, len(operations)]
        attention_mask  [B, S], 0 for padding; segments: row offsets of tasks; both as in `search_cell`
        """
        return search_cell(
            h,
            self.weights(),
            self.full_alpha(alpha),
            causal=self.causal,
            attention_mask=attention_mask,
            segments=segments,
        )

    def finalize(self, alpha: Tensor) -> "SelectedCell":
        """The same cell for one architecture for good: a module without the weights of what alpha did not select.

        alpha  [9, len(operations)], one-hot in every row; ValueError for another one
        """
        full = self.full_alpha(alpha).detach().cpu()
        if tuple(full.shape) != (EDGES, len(OPERATIONS)):
            raise ValueError(f"alpha: got shape {list(alpha.shape)}, expected [9, {len(self.operations)}], of one task")
        if not bool(((full == 0) | (full == 1)).all()) or not bool((full.sum(-1) == 1).all()):
            raise ValueError(
                "alpha: got values that are not one-hot in every row, expected one operation for each edge; "
                f"use torch.nn.functional.one_hot(alpha.argmax(-1), {len(self.operations)}).float()"
            )
        return SelectedCell(self, tuple(OPERATIONS[i] for i in full.argmax(-1).tolist()))

    def extra_repr(self) -> str:
        left_out = "" if self.operations == OPERATIONS else f", operations={self.operations}"
        return f"{self.hidden_size}, width={self.width}, stem={self.stem!r}, causal={self.causal}{left_out}"


class SelectedCell(nn.Module):
    """A search cell whose architecture is fixed, made by `SearchCell.finalize`: only selected weights are kept.

    The parameters of an operation are those of the edges that selected it, in the order of the edges; the others are
    those of `CellWeights`. A call puts them back into their places, which copies them.
    """

    def __init__(self, cell: SearchCell, selected: tuple[str, ...]):
        super().__init__()
        self.selected, self.causal, self.shapes = selected, cell.causal, cell.shapes
        for name, parameter in cell.named_parameters(recurse=False):
            kept = parameter.detach()
            if name.removesuffix("_bias") in OPERATIONS:
                edges = self.edges(name)
                if not edges:
                    continue
                kept = kept[edges]
            self.register_parameter(name, nn.Parameter(kept.clone(), parameter.requires_grad))
        self.train(cell.training)

    def edges(self, name: str) -> list[int]:
        """The edges that selected the operation to which the parameter of this name belongs."""
        return [edge for edge, selected in enumerate(self.selected) if selected == name.removesuffix("_bias")]

    def forward(self, h: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """h [B, S, d] or one packed sequence [T, d] -> the same shape and dtype; attention_mask [B, S] or None."""
        tensors: dict[str, Any] = dict(self.named_parameters(recurse=False))
        for name, shape in self.shapes.items():
            if name.removesuffix("_bias") in OPERATIONS:
                zero = self.output.new_zeros(())  # type: ignore[operator]
                if name in tensors:
                    edges = torch.tensor(self.edges(name), device=zero.device)
                    tensors[name] = zero.new_zeros(shape).index_copy(0, edges, tensors[name])
                else:
                    tensors[name] = zero.expand(shape)
        alpha = torch.zeros(EDGES, len(OPERATIONS))
        alpha[range(EDGES), [OPERATIONS.index(name) for name in self.selected]] = 1
        return search_cell(h, CellWeights(**tensors), alpha, causal=self.causal, attention_mask=attention_mask)

    def extra_repr(self) -> str:
        return f"{', '.join(self.selected)}, causal={self.causal}"
