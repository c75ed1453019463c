"""Exact resume: atomic files of safetensors and JSON, and a JSON-lines log that never runs ahead of them.

A checkpoint is one safetensors file with its JSON state in the header, so one rename publishes both. Nothing in it
depends on the clock: the same run gives the same bytes, however often it was interrupted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mltd.sharded import whole
from tarp_kernels.files import write_atomically

FORMAT, VERSION = "mltd-checkpoint", 1
_HEADER = "mltd"  # one key: safetensors does not promise an order of several
_NAME = re.compile(r"iteration-(\d{8})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another program or version, or of another run; the message says which file."""


class Checkpoint(NamedTuple):
    iteration: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


def save_checkpoint(
    directory: Path, iteration: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint atomically, then drop all but the newest `keep`; a crash at any moment leaves the older ones.

    state is plain JSON. Returns the file's path.
    """
    header = {"format": FORMAT, "version": VERSION, "iteration": iteration, "state": state}
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={_HEADER: json.dumps(header, sort_keys=True)},
    )
    path = checkpoint_path(directory, iteration)
    write_atomically(path, data)
    for old in checkpoints(directory)[:-keep]:
        old.unlink()
    return path


def checkpoint_path(directory: Path, iteration: int) -> Path:
    """Where `save_checkpoint` puts the checkpoint of an iteration."""
    return directory / f"iteration-{iteration:08d}.safetensors"


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first; unfinished files are not among them."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def latest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint, or None where there is none. CheckpointError for a file that is not a whole one."""
    found = checkpoints(directory)
    return load_checkpoint(found[-1]) if found else None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint file; CheckpointError that says what is wrong with it."""
    older = [other for other in checkpoints(path.parent) if other.name < path.name]
    way_out = f"delete it to go on from {older[-1].name}" if older else "delete it to start this run anew"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read, it is truncated or no safetensors file ({error}); {way_out}"
        ) from None
    try:
        header = json.loads(metadata[_HEADER])
        if header["format"] != FORMAT:
            raise KeyError(FORMAT)
        version, iteration, state = header["version"], header["iteration"], header["state"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of mltd; {way_out}") from None
    if version != VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, expected {VERSION}; resume with the version that wrote it"
        )
    return Checkpoint(iteration, tensors, state, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; CheckpointError that names the file when it holds none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); delete it to have it made anew") from None


def plain(value: Any) -> Any:
    """A value as a trip through JSON gives it back: keys are strings, tuples are lists."""
    return json.loads(json.dumps(value))


class JsonLines:
    """A log of one JSON object a line. A line that a crash cut short is dropped when the log is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return list(self._records()) if self.path.exists() else []

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the log, atomically, with the wanted records only."""
        records = [record for record in self.read() if wanted(record)]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def _records(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def model_fingerprint(model: Any, adapter: Mapping[str, Tensor]) -> str:
    """A digest of the class, the adapter's names and shapes and 64 values of every base tensor, of no adapter value."""
    digest = hashlib.sha256(type(model).__name__.removeprefix("FSDP").encode())  # as fully_shard renames it
    for name, tensor in adapter.items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    for name, tensor in model.named_parameters():
        if name not in adapter:
            flat = whole(tensor.detach()).reshape(-1)
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(flat[:: max(1, flat.numel() // 64)][:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators, as tensors that a checkpoint can hold."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Put back what `rng_state` gave; devices that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        kind, _, index = name.partition(".")
        if kind == "cuda" and torch.cuda.is_available() and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))
