"""Builds csrc/ into tarp_kernels/_C with CMake and ninja. Everything else about the package is in pyproject.toml.

Extra arguments for CMake come from the environment variable CMAKE_ARGS, e.g. CMAKE_ARGS="-DTARP_SANITIZE=ON".
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str, module: str, directory: str) -> str:
    """The program from its PyPI package (whose folder need not be on PATH), or else the one on PATH."""
    try:
        found = shutil.which(name, path=getattr(importlib.import_module(module), directory))
    except ImportError:
        found = None
    found = found or shutil.which(name)
    if found is None:
        sys.exit(f"building tarp_kernels needs {name}: pip install {module}")
    return found


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt knows."""

    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        output = (ROOT / self.get_ext_fullpath(extension.name)).resolve()
        arguments = os.environ.get("CMAKE_ARGS", "")
        # Not setuptools' build_temp: an editable install takes a fresh one each time and would compile everything anew.
        build = ROOT / "build" / re.sub(r"\W+", "-", f"cmake {sys.implementation.cache_tag} {arguments}".strip())
        cmake = tool("cmake", "cmake", "CMAKE_BIN_DIR")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        # Named on every call: an isolated pip build leaves a cache that points into a folder that is gone.
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DTARP_VERSION={self.distribution.get_version()}",
        ]
        subprocess.run(configure + shlex.split(arguments), check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)
        if not output.exists():
            sys.exit(f"CMake built no {output}")


setup(ext_modules=[CMakeExtension("tarp_kernels._C")], cmdclass={"build_ext": CMakeBuild})
