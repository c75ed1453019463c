"""What a search cell is made of: its operations, its edges, its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

OPERATIONS = ("none", "identity", "linear", "glu", "conv3", "conv5")
EDGES = 9
# Node n0, n1, n2: its first edge; edge by edge it reads s0, s1 and then the nodes before it.
FIRST_EDGES = (0, 2, 5)
STATE_ROWS = 4  # what a causal conv5 sees of the past


class CellWeights(NamedTuple):
    """Weights of one search cell of width C beside a layer of width d; matrices are [out, in] like `nn.Linear`'s.

    An edge's operation is a contiguous slice. A convolution's matrices are its taps: conv3[edge, j] is the
    `Conv1d.weight[:, :, j]` of that edge, so the last tap of a causal convolution sees the token itself.

    project [2, C, d], project_bias [2, C]      to s0 and s1
    linear  [9, C, C], linear_bias [9, C]       by edge
    glu     [9, 2, C, C], glu_bias [9, 2, C]    value, then gate
    conv3   [9, 3, C, C], conv3_bias [9, C]
    conv5   [9, 5, C, C], conv5_bias [9, C]
    output  [d, C], output_bias [d]
    norm, norm_bias  [d], or both None: the stem is LayerNorm with `eps`, or the identity

    With segments every tensor may have a leading dimension: one cell for each task.
    """

    project: Tensor
    project_bias: Tensor
    linear: Tensor
    linear_bias: Tensor
    glu: Tensor
    glu_bias: Tensor
    conv3: Tensor
    conv3_bias: Tensor
    conv5: Tensor
    conv5_bias: Tensor
    output: Tensor
    output_bias: Tensor
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5

    @staticmethod
    def shapes(d: int, width: int, norm: bool = False) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of one cell, by name and in order."""
        C = width
        found: dict[str, tuple[int, ...]] = {"project": (2, C, d), "project_bias": (2, C)}
        for name, matrices in (("linear", ()), ("glu", (2,)), ("conv3", (3,)), ("conv5", (5,))):
            found[name] = (EDGES, *matrices, C, C)
            found[f"{name}_bias"] = (EDGES, 2, C) if name == "glu" else (EDGES, C)
        found |= {"output": (d, C), "output_bias": (d,)}
        return found | {"norm": (d,), "norm_bias": (d,)} if norm else found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name and in order."""
        return {name: tensor for name, tensor in self._asdict().items() if isinstance(tensor, Tensor)}

    @property
    def width(self) -> int:
        return int(self.output.shape[-1])

    @property
    def per_task(self) -> bool:
        return self.output.dim() == 3

    def map(self, function: Callable[[Tensor], Tensor]) -> "CellWeights":
        """The same cell with `function` applied to each of its tensors."""
        tensors: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors.items()}
        return self._replace(**tensors)

    def of_task(self, task: int) -> "CellWeights":
        """One task's cell out of a stack of them."""
        return self.map(lambda tensor: tensor[task])
