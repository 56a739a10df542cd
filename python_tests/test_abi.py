"""The operator library needs torch's stable C ABI and the system's C and C++ libraries, and nothing else.

What it needs beyond that would tie it to one version of torch, to CUDA, or to one version of Python.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffrate_ext import _C

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

LIBRARY = Path(_C.__file__).parent / "libdiffrate_ops.so"
STABLE = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")  # C functions: a C++ name starts with _Z
SYSTEM_VERSIONS = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")
# looked up by the loader and by sanitizers or profilers where there are any, and null elsewhere
OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
FORBIDDEN_LIBRARIES = ("libtorch_cuda", "libtorch_python", "libc10", "libpython", "libcudart", "libcuda.", "libnv")
SYSTEM_LIBRARIES = (
    "libstdc++.so",
    "libm.so",
    "libgcc_s.so",
    "libc.so",
    "ld-linux",
    "libpthread.so",
    "libdl.so",
    "librt.so",
)


@dataclass(frozen=True)
class Symbol:
    name: str  # with its version, such as malloc@GLIBC_2.2.5
    weak: bool

    @property
    def bare(self) -> str:
        return self.name.partition("@")[0]


def read_symbols(listing: str) -> list[Symbol]:
    """From what ``nm -D --undefined-only`` prints."""
    return [
        Symbol(name, kind in "wv") for kind, name in (line.split() for line in listing.splitlines() if line.strip())
    ]


def is_in_system_libraries(name: str) -> bool:
    try:
        getattr(ctypes.CDLL("libstdc++.so.6"), name)  # looks into the libraries that it needs, too: libm, libc, libgcc
    except AttributeError:
        return False
    return True


def violations(symbols: list[Symbol]) -> list[str]:
    """Symbols that neither the stable ABI nor a system library provides."""
    return [
        symbol.name
        for symbol in symbols
        if not STABLE.fullmatch(symbol.bare)
        and not SYSTEM_VERSIONS.search(symbol.name)
        and not (symbol.weak and symbol.bare in OPTIONAL)
        # without a version: a template that libtorch happened to offer at link time; libstdc++ must have it as well
        and not is_in_system_libraries(symbol.bare)
    ]


def needed_libraries(path: Path) -> list[str]:
    printed = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", printed)


@pytest.fixture(scope="module")
def symbols() -> list[Symbol]:
    command = ["nm", "-D", "--undefined-only", str(LIBRARY)]
    return read_symbols(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_only_the_stable_abi_is_needed(symbols: list[Symbol]) -> None:
    assert violations(symbols) == []


def test_the_stable_abi_is_used(symbols: list[Symbol]) -> None:
    """The list is not empty by mistake."""
    names = {symbol.bare for symbol in symbols}
    assert {"aoti_torch_library_def", "torch_parallel_for", "free"} <= names


def hard_references_to_cuda(symbols: list[Symbol]) -> list[str]:
    """``aoti_torch_device_type_cuda`` is a constant that every torch has."""
    return [s.name for s in symbols if "cuda" in s.bare and not s.weak and s.bare != "aoti_torch_device_type_cuda"]


def test_cuda_is_optional(symbols: list[Symbol]) -> None:
    """A CPU-only torch lacks this function; a weak reference is then null, where a strong one would not load."""
    assert Symbol("aoti_torch_get_current_cuda_stream", weak=True) in symbols
    assert hard_references_to_cuda(symbols) == []


@pytest.mark.parametrize(
    "name",
    [
        "_ZN2at4_ops5empty4callEv",  # at::_ops::empty
        "_ZN3c1010TensorImplD1Ev",  # c10::TensorImpl
        "_ZN5torch8autograd4NodeD2Ev",
        "_ZN3c104cuda20getCurrentCUDAStreamEa",
        "cudaMalloc",
        "cudaLaunchKernel@libcudart.so.13",
        "PyErr_SetString",
        "THPVariable_Wrap",
        "omp_get_num_threads",
        "GOMP_parallel@GOMP_4.0",
        "Torch_thing",
    ],
)
def test_the_guard_sees_a_forbidden_symbol(symbols: list[Symbol], name: str) -> None:
    (found,) = read_symbols(f"                 U {name}\n")
    assert violations([*symbols, found]) == [name]


def test_the_guard_sees_a_hard_reference_to_cuda(symbols: list[Symbol]) -> None:
    name = "aoti_torch_get_current_cuda_stream"
    assert hard_references_to_cuda([*symbols, *read_symbols(f"                 U {name}\n")]) == [name]


def test_needed_libraries() -> None:
    needed = needed_libraries(LIBRARY)
    assert [name for name in needed if name.startswith(FORBIDDEN_LIBRARIES)] == []
    assert [name for name in needed if not name.startswith((*SYSTEM_LIBRARIES, "libtorch.so", "libtorch_cpu.so"))] == []
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)  # without them it would not load


def test_the_python_module_needs_no_libpython() -> None:
    """Python's own symbols come from the interpreter; one that was linked in would be a second interpreter."""
    needed = needed_libraries(Path(_C.__file__))
    assert "libdiffrate_ops.so" in needed
    assert [name for name in needed if name.startswith(FORBIDDEN_LIBRARIES)] == []


@pytest.mark.parametrize("path", [LIBRARY, Path(_C.__file__)], ids=["operators", "python module"])
def test_no_path_of_the_build_machine(path: Path) -> None:
    printed = subprocess.run(["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    assert [found for found in re.findall(r"(?:RPATH|RUNPATH)\)\s+.*\[(.*)\]", printed) if found != "$ORIGIN"] == []
