"""A GPU that computes nothing: MindSpore's GPU backend compiles and launches graphs on it, on any Linux machine.

`make(folder)` copies the MindSpore that is installed (by links, where the file system has them) and builds stand-ins
for CUDA's libraries and for MindSpore's own CUDA kernels beside it. `environment(folder)` is what a process needs to
use it.
What a network computes there is whatever lies in the memory. What it shows: MindSpore finds a GPU kernel for every
operator, in the layout and precision that it chooses, plans the memory, and launches all of them in order.

Needs the Linux wheel of MindSpore, which contains the GPU backend, gcc and binutils (nm).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
PLUGIN = "lib/plugin/libmindspore_gpu.so.11.6"
KERNELS = "lib/plugin/gpu/libcuda_ops.so.11"
# The libraries that the plugin needs, the beginning of their functions' names, and our own source of some of these.
LIBRARIES = {
    "libcudart.so.11.0": ("", "cudart.c"),
    "libcuda.so.1": ("", "cuda.c"),
    "libcudnn.so.8": ("cudnn", "cudnn.c"),
    "libcublas.so.11": ("cublas", ""),
    "libcusolver.so.11": ("cusolver", ""),
    "libcufft.so.10": ("cufft", ""),
    "libcusparse.so.11": ("cusparse", ""),
    "libcurand.so.10": ("curand", ""),
    "libnvrtc.so.11.2": ("nvrtc", "nvrtc.c"),
}
NVCC = '#!/bin/sh\necho "Cuda compilation tools, release 11.6, V11.6.55"\n'


def make(folder: Path) -> None:
    """Puts the copy of MindSpore and the stand-ins into a folder; what is there already stays.

    Raises:
        FileNotFoundError: MindSpore has no GPU backend here, or gcc or nm is missing.
    """
    installed = Path(importlib.util.find_spec("mindspore").submodule_search_locations[0])
    for file in (PLUGIN, KERNELS):
        if not (installed / file).exists():
            raise FileNotFoundError(f"{installed / file} is missing: only MindSpore's wheel for Linux has it")
    for tool in ("gcc", "nm"):
        if not shutil.which(tool):
            raise FileNotFoundError(f"{tool} is missing: install gcc and binutils")
    copy, libraries = folder / "python" / "mindspore", folder / "lib"
    if not copy.exists():
        unused = shutil.ignore_patterns("__pycache__", "libmindspore_ascend*", "libmindspore_ops_ascend*")
        shutil.copytree(installed, copy, copy_function=_link, ignore=unused)
    libraries.mkdir(exist_ok=True)
    (folder / "cuda" / "bin").mkdir(parents=True, exist_ok=True)
    nvcc = folder / "cuda" / "bin" / "nvcc"  # by which MindSpore tells CUDA's version
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    needed = _symbols(installed / PLUGIN, "--undefined-only")
    defined = _symbols(installed / KERNELS, "--defined-only")
    (copy / KERNELS).unlink(missing_ok=True)
    _build(copy / KERNELS, needed & defined)
    needed |= _symbols(installed / KERNELS, "--undefined-only")
    for name, (prefix, source) in LIBRARIES.items():
        _build(libraries / name, {n for n in needed if prefix and n.startswith(prefix)}, source)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that uses it."""
    paths = [str(folder / "python"), os.environ.get("PYTHONPATH", "")]
    return dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        LD_LIBRARY_PATH=str(folder / "lib"),
        CUDA_HOME=str(folder / "cuda"),
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _symbols(library: Path, which: str) -> set[str]:
    """Names of the functions that a library needs or has."""
    words = ["nm", "-D", which, str(library)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = {"T", "W", "U"}
    return {words[-1].partition("@")[0] for words in map(str.split, lines) if len(words) > 1 and words[-2] in kinds}


def _build(library: Path, names: set[str], source: str = "") -> None:
    """A library with these functions. Those of `source` do what it says; of the others, those that create something
    give a handle, and all return 0."""
    text = "void *calloc(unsigned long, unsigned long);\n"
    for name in sorted(names):  # weak: those of `source` replace them
        parameters, creation = ("void **handle", "*handle = calloc(1, 256); ") if "Create" in name else ("void", "")
        text += f"__attribute__((weak)) long {name}({parameters}) {{ {creation}return 0; }}\n"
    versions = library.with_suffix(".map")
    versions.write_text(f"{library.name} {{ global: *; }};\n")
    generated = library.with_suffix(".c")
    generated.write_text(text)
    words = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-Wl,--version-script={versions}"]
    sources = [str(generated), *([str(HERE / source)] if source else [])]
    subprocess.run([*words, "-o", str(library), *sources], check=True)
    versions.unlink()
    generated.unlink()
