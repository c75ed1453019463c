"""One run in several processes: torchrun starts them, torch.distributed joins them, and they share the tasks.

    torchrun --nproc-per-node 4 train.py

Every process builds the same model, tasks and configuration and calls the same functions. Between CPUs they talk by
gloo, between GPUs through NCCL; there each must have put its model on the GPU of its own, `cuda:$LOCAL_RANK`.

The result is that of one process, to rounding. So a run can go on in another number of them; with dropout in the inner
loop it then draws other masks, while in the same number it ends on the same bits.

A process that dies takes the others along, soon and with a message: under gloo as soon as its connection closes, under
NCCL when torch's watchdog finds it missing for TIMEOUT. torchrun stops those that are left in both cases, at the latest
30 s after the first has failed. SIGTERM to torchrun reaches all of them: they finish the outer step and save, for which
torchrun leaves them those 30 s too.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long processes wait for one another. They meet once in an outer step, so the slowest share of one must be done
within it; where that is not enough, call torch.distributed.init_process_group with a timeout before MetaTrainer."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or did not answer in time."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from number `rank` of `size`. Of one alone nothing here costs anything.

    take_turns  whether they share work out; else each does all of it, as the processes of a sharded model must
    """

    rank: int = 0
    size: int = 1
    take_turns: bool = True

    @classmethod
    def join(cls) -> "Processes":
        """Those of torch's default process group; it is made from torchrun's environment where there is none yet."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(timeout=TIMEOUT)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def owns(self, place: int) -> bool:
        """Whether number `place` of some work is this process's."""
        return not self.take_turns or place % self.size == self.rank

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What all processes have, added up: one all-reduce of a flat buffer for each dtype. The same bits in all."""
        if self.size == 1:
            return list(tensors)
        added: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = {i: tensor for i, tensor in enumerate(tensors) if tensor.dtype == dtype}
            flat = torch.cat([tensor.reshape(-1) for tensor in own.values()])
            with _answering():
                dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in own.values()])
            added |= {i: part.view(tensor.shape) for (i, tensor), part in zip(own.items(), parts, strict=True)}
        return [added[i] for i in range(len(tensors))]

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; anything that can be pickled."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _answering():
                dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, or raises there, in all of them; only there it is called."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except Exception as error:
                said[1] = error
        with _answering():
            dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        return said[0]

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with what they are in the first process."""
        for tensor in tensors if self.size > 1 else ():
            sent = tensor.detach().contiguous()
            with _answering():
                dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def unwrapped(model: Any) -> Any:
    """The model inside a DistributedDataParallel, or the model itself.

    The wrapper's reducer listens to `.backward()`, which nothing here calls: gradients are asked for by
    torch.autograd.grad and added up once in an outer step. So it neither helps nor disturbs.
    """
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"another process of this run has ended or did not answer ({error})") from None


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
