"""Runs PTX on the CPU and reports values, faults and memory-access counters. See README.md."""

from .launch import load, run
from .machine import Deadlock
from .memory import GlobalMemory
from .nvcc_launch import compile_cuda, run_cuda
from .report import KernelFault, Report
from .triton_launch import compile_call, compile_triton, launch_compiled, run_triton

__all__ = [
    "Deadlock",
    "GlobalMemory",
    "KernelFault",
    "Report",
    "compile_call",
    "compile_cuda",
    "compile_triton",
    "launch_compiled",
    "load",
    "run",
    "run_cuda",
    "run_triton",
]
