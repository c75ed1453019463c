"""Compile Triton kernels ahead of time (no GPU, no driver) and run their PTX on CPU tensors."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .instructions.bulk_copy import HostTensorMap
from .launch import load, run

_TYPE_NAMES = {
    "float32": "fp32",
    "float64": "fp64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "bool": "i1",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fn": "fp8e4nv",
}


@dataclass(frozen=True)
class CompiledTriton:
    """``ptx`` with what its launch needs; ``kernel`` is the parsed form, ``cubin`` what a GPU would load."""

    ptx: str
    cubin: bytes
    kernel: object
    shared_bytes: int
    num_warps: int
    scratch_bytes: int
    tensor_maps: tuple  # how each tensor descriptor among the arguments is to be encoded


def _is_descriptor(value):
    """Triton's TensorDescriptor, without importing it."""
    return hasattr(value, "block_shape")


def _jit_function(fn):
    """Peel off @triton.autotune and @triton.heuristics."""
    while type(fn).__name__ in ("Autotuner", "Heuristics"):
        fn = fn.fn
    return fn


def compile_triton(fn, signature, constexprs, cc=80, num_warps=4, num_stages=3, divisible_by_16=(), **options):
    """Compile ``fn`` for compute capability ``cc`` (80, 90 for sm_90a, 100 for sm_100a).

    signature        argument name -> Triton type ("*bf16", "i32", "fp32"); constexprs: name -> value
    divisible_by_16  names of arguments promised to be multiples of 16, as the JIT does at run time
    options          further compiler options, e.g. ``maxnreg`` or ``enable_fp_fusion``
    """
    key = (tuple(signature.items()), tuple(constexprs.items()), tuple(divisible_by_16), tuple(options.items()))
    return _compile(_jit_function(fn), *key[:3], cc, num_warps, num_stages, key[3])


@lru_cache(maxsize=256)
def _compile(fn, signature, constexprs, divisible, cc, num_warps, num_stages, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(signature) | {name: "constexpr" for name, _ in constexprs}
    ordered = {name: types[name] for name in fn.arg_names}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=fn, signature=ordered, constexprs=dict(constexprs), attrs=attributes)
    options = dict(options, num_warps=num_warps, num_stages=num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    kernel = load(ptx)
    scratch = max(getattr(metadata, "global_scratch_size", 0) or 0, 0)
    threads = kernel.required_threads or 32 * metadata.num_warps
    maps = tuple(getattr(metadata, "tensordesc_meta", None) or ())
    return CompiledTriton(ptx, compiled.asm["cubin"], kernel, metadata.shared, threads // 32, scratch, maps)


def _type_of(name, value):
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, (int, np.integer)):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, (float, np.floating)):
        return "fp32"
    if _is_descriptor(value):
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_type_of(name, value.base)[1:]}[{block}]>"
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if dtype not in _TYPE_NAMES:
        raise TypeError(f"argument {name}: {type(value).__name__} {dtype} has no Triton type")
    return "*" + _TYPE_NAMES[dtype]


def _is_multiple_of_16(value):
    if isinstance(value, (bool, float)) or _is_descriptor(value):
        return False
    if isinstance(value, (int, np.integer)):
        return value % 16 == 0
    address = value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data
    return address % 16 == 0


def run_triton(
    fn,
    grid,
    *args,
    cc=80,
    num_warps=4,
    num_stages=3,
    specialize=True,
    check_races=True,
    poison=True,
    options=None,
    **named,
):
    """Call a @triton.jit function as ``fn[grid](*args, **named)`` would, and return the Report.

    With ``specialize`` the arguments are specialised as the JIT does: multiples of 16 are promised
    to the compiler and integers equal to 1 become constants.
    """
    compiled, passed, constexprs = compile_call(fn, args, named, cc, num_warps, num_stages, specialize, options)
    grid = grid(constexprs) if callable(grid) else grid
    return launch_compiled(compiled, grid, passed, check_races, poison)


def compile_call(fn, args, named, cc, num_warps=4, num_stages=3, specialize=True, options=None):
    """What `fn[grid](*args, **named)` would compile, its run-time arguments, and its constants by name."""
    fn = _jit_function(fn)
    values = dict(zip(fn.arg_names, args, strict=False)) | named
    missing = [param.name for param in fn.params if param.name not in values and not param.has_default]
    if missing:
        raise TypeError(f"{fn.__name__} lacks the arguments {missing}")
    signature, constexprs, divisible, passed = {}, {}, [], []
    for param in fn.params:
        value = values.get(param.name, param.default)
        one = specialize and isinstance(value, int) and not isinstance(value, bool) and value == 1
        if param.is_constexpr or value is None or (one and not param.do_not_specialize):
            constexprs[param.name] = value
            continue
        signature[param.name] = _type_of(param.name, value)
        passed.append(value)
        if specialize and not param.do_not_specialize and _is_multiple_of_16(value):
            divisible.append(param.name)
    compiled = compile_triton(fn, signature, constexprs, cc, num_warps, num_stages, divisible, **(options or {}))
    return compiled, passed, constexprs


def _parameters(value, maps):
    """The kernel parameters of one argument: a tensor descriptor is a map, its shape and its strides."""
    if not _is_descriptor(value):
        return [value]
    made = next(maps)
    box = tuple(made["block_size"])
    encoded = HostTensorMap(
        value.base, tuple(value.shape), tuple(value.strides), box, made["elem_type"], made["swizzle"]
    )
    return [encoded, *value.shape, *value.strides]


def launch_compiled(compiled, grid, args, check_races=True, poison=True):
    """Run a compiled kernel; Triton's hidden scratch pointers are appended."""
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    maps = iter(compiled.tensor_maps)
    args = [part for value in args for part in _parameters(value, maps)]
    blocks = int(np.prod(grid))
    if len(args) < len(compiled.kernel.params):
        args.append(np.zeros(compiled.scratch_bytes * blocks, np.uint8) if compiled.scratch_bytes else None)
    args += [None] * (len(compiled.kernel.params) - len(args))
    block = 32 * compiled.num_warps
    return run(compiled.kernel, grid, block, args, compiled.shared_bytes, check_races, poison)
