"""What `search_cell` accepts, checked before any kernel runs: every error names the argument and the fix."""

import torch
from torch import Tensor

from tarp_kernels.ops.lowrank_linear.contract import FLOATS
from tarp_kernels.ops.search_cell.weights import EDGES, OPERATIONS, STATE_ROWS, CellWeights


def check(h, weights, alpha, causal, attention_mask, cu_seqlens, segments) -> None:
    """Raise TypeError or ValueError for input that breaks the contract of `search_cell`."""
    _tensor("h", h)
    if h.dtype not in FLOATS:
        raise TypeError(f"h: got dtype {h.dtype}, expected one of {', '.join(map(str, FLOATS))}; use h.float()")
    if h.dim() not in (2, 3):
        raise ValueError(f"h: got shape {list(h.shape)}, expected [B, S, d], or [T, d] with packed rows")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, expected True (decoder) or False (encoder)")
    tasks = None if segments is None else _offsets("segments", segments, h, "tasks")
    if cu_seqlens is not None:
        if h.dim() != 2:
            raise ValueError(f"cu_seqlens: got it with h {list(h.shape)}, expected h [T, d]; pack with h.flatten(0, 1)")
        _offsets("cu_seqlens", cu_seqlens, h, "sequences")
    if attention_mask is not None:
        _tensor("attention_mask", attention_mask)
        if attention_mask.shape != h.shape[:-1]:
            raise ValueError(
                f"attention_mask: got shape {list(attention_mask.shape)}, expected {list(h.shape[:-1])} like h "
                "without its last dimension, 0 for padding; pass the tokenizer's mask"
            )
        _placed("attention_mask", attention_mask, h, None)
    _check_weights(h, weights, tasks)
    _tensor("alpha", alpha)
    shapes = [(EDGES, len(OPERATIONS))] + ([] if tasks is None else [(tasks, EDGES, len(OPERATIONS))])
    if tuple(alpha.shape) not in shapes:
        raise ValueError(
            f"alpha: got shape {list(alpha.shape)}, expected {' or '.join(str(list(s)) for s in shapes)}, "
            f"that is [edges, operations] with the operations {', '.join(OPERATIONS)}"
            + ("; one alpha for each task needs segments" if tasks is None else "")
        )
    if not alpha.is_floating_point():
        raise TypeError(f"alpha: got dtype {alpha.dtype}, expected a float dtype; use alpha.float()")
    if alpha.device != h.device and alpha.device.type != "cpu":
        raise ValueError(f"alpha: lies on {alpha.device}, expected the CPU or {h.device} like h; move it with .cpu()")


def check_step(h, weights, state, segments) -> None:
    """What `search_cell_step` asks for beyond `check`, which comes first."""
    if h.dim() != 3:
        raise ValueError(f"h: got shape {list(h.shape)}, expected [B, S, d]; a decoding step has no packed rows")
    if segments is not None and h.shape[1] and any(offset % h.shape[1] for offset in segments.tolist()):
        raise ValueError(
            f"segments: got {segments.tolist()}, expected multiples of S = {h.shape[1]}: a task is whole sequences"
        )
    if state is None:
        return
    _tensor("state", state)
    shape = [h.shape[0], 4, STATE_ROWS, weights.width]
    if list(state.shape) != shape:
        raise ValueError(
            f"state: got shape {list(state.shape)}, expected {shape}, that is [B, 4, {STATE_ROWS}, C]; "
            "pass what the step before returned, or None for the first"
        )
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    _placed("state", state, h, (dtype,))


def _check_weights(h: Tensor, weights, tasks: int | None) -> None:
    if not isinstance(weights, CellWeights):
        raise TypeError(f"weights: got {type(weights).__name__}, expected tarp_kernels.CellWeights")
    for name, value in weights._asdict().items():
        if name != "eps" and not isinstance(value, Tensor) and not (value is None and name.startswith("norm")):
            raise TypeError(f"weights.{name}: got {type(value).__name__}, expected a torch.Tensor")
    if (weights.norm is None) != (weights.norm_bias is None):
        raise ValueError("weights.norm_bias: got norm and norm_bias apart, expected both (LayerNorm) or neither")
    if weights.output.dim() not in (2, 3):
        raise ValueError(f"weights.output: got shape {list(weights.output.shape)}, expected [d, C]")
    if weights.per_task and tasks is None:
        raise ValueError(
            f"weights.output: got shape {list(weights.output.shape)}, expected [d, C]; "
            "one cell for each task needs segments"
        )
    lead = (tasks,) if weights.per_task else ()
    dtypes = (h.dtype,) if h.dtype == torch.float64 else (h.dtype, torch.float32)
    shapes = CellWeights.shapes(h.shape[-1], weights.width, weights.norm is not None)
    for name, shape in shapes.items():
        tensor = getattr(weights, name)
        if tuple(tensor.shape) != (*lead, *shape):
            raise ValueError(
                f"weights.{name}: got shape {list(tensor.shape)}, expected {[*lead, *shape]} "
                f"for d = h.shape[-1] = {h.shape[-1]}, C = weights.output.shape[-1] = {weights.width}"
                + (f", {tasks} tasks" if lead else "")
            )
        _placed(f"weights.{name}", tensor, h, dtypes)


def _offsets(name: str, offsets, h: Tensor, what: str) -> int:
    """How many parts the offsets make."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        came = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(
            f"{name}: got {came}, expected an int32 or int64 tensor [{what} + 1]; use torch.tensor(offsets)"
        )
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}: got shape {list(offsets.shape)}, expected [{what} + 1] row offsets, starting with 0")
    if type(offsets) is Tensor and not offsets.is_meta and not torch.compiler.is_compiling():
        check_offsets(name, offsets.tolist(), h.shape[:-1].numel())  # which makes a constant of an exported length
    return offsets.shape[0] - 1


def check_layout(h: Tensor, cu_seqlens: Tensor | None, segments: Tensor | None) -> None:
    """The values of offsets that a compiler could not see."""
    for name, offsets in (("cu_seqlens", cu_seqlens), ("segments", segments)):
        if offsets is not None:
            check_offsets(name, offsets.tolist(), h.shape[:-1].numel())


def check_offsets(name: str, values: list[int], rows: int) -> None:
    """Row offsets must start at 0, never fall and end at the number of rows."""
    if values[0] != 0:
        raise ValueError(f"{name}: starts at {values[0]}, expected 0, so that every row belongs somewhere")
    for start, end in zip(values[:-1], values[1:], strict=True):
        if end < start:
            raise ValueError(f"{name}: falls from {start} to {end}, expected offsets that never fall")
    if values[-1] != rows:
        raise ValueError(f"{name}: ends at {values[-1]}, expected the number of rows of h, {rows}")


def _tensor(name: str, tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, expected torch.strided; convert it with .to_dense()")


def _placed(name: str, tensor: Tensor, h: Tensor, dtypes: tuple[torch.dtype, ...] | None) -> None:
    _tensor(name, tensor)
    if dtypes is not None and tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {expected} for h of {h.dtype}; convert it")
    if tensor.device != h.device:
        raise ValueError(f"{name}: lies on {tensor.device}, expected {h.device} like h; move it")
