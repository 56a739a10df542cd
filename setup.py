"""Builds the C++ and CUDA libraries with CMake. Everything else about the package stands in pyproject.toml.

Environment variables:
    DIFFRATE_CUDA        AUTO (default: CUDA kernels where nvcc and a CUDA build of torch are found), ON or OFF
    TORCH_CUDA_ARCH_LIST the GPU architectures, such as "8.0;9.0+PTX" (default: those two)
    CMAKE_BUILD_PARALLEL_LEVEL  compilers that run side by side (default: one for each processor)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = "2.10"


def find_torch() -> dict[str, str] | None:
    """Where torch is, or None. pip's build isolation hides installed packages by PYTHONPATH, which -E looks past."""
    question = "import json, torch; print(json.dumps([torch.__path__[0], torch.__version__, torch.version.cuda]))"
    for options in ([], ["-E"]):
        asked = subprocess.run([sys.executable, *options, "-c", question], capture_output=True, text=True, cwd="/")
        if asked.returncode == 0:
            folder, version, cuda = json.loads(asked.stdout)
            if tuple(int(part) for part in version.split(".")[:2]) >= tuple(int(p) for p in OLDEST_TORCH.split(".")):
                return {"DIR": folder, "VERSION": version, "CUDA": cuda or "none"}
    return None


def cmake_architectures(torch_list: str) -> str:
    """``8.0;9.0+PTX`` in CMake's words: ``80-real;90``. What is older than the kernels can run on is left out."""
    found = []
    for word in torch_list.replace(",", " ").replace(";", " ").split():
        version = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if version is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be versions such as '8.0;9.0+PTX', got {word!r}")
        major, minor, variant, ptx = version.groups()
        if int(major) < 8:
            print(f"diffrate_ext: no CUDA kernels for {word}, which is older than 8.0")
        else:
            found.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    if not found:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST must name at least one version from 8.0 on, got {torch_list!r}")
    return ";".join(found)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise RuntimeError(f"building diffrate_ext needs torch >= {OLDEST_TORCH}, and {sys.executable} has none")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = [
            "-GNinja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDIFFRATE_CUDA={os.environ.get('DIFFRATE_CUDA', 'AUTO')}",
            "-DBUILD_TESTING=OFF",
            *(f"-DDIFFRATE_TORCH_{key}={value}" for key, value in torch.items()),
        ]
        if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(architectures)}")
        # a build directory in the tree would remember the ninja of pip's deleted environment
        with tempfile.TemporaryDirectory(prefix="diffrate_build_") as build:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", build, *options], check=True)
            subprocess.run(["cmake", "--build", build], check=True)
            subprocess.run(["cmake", "--install", build, "--prefix", str(target)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the operator library goes where _C goes."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1])
            for library in built.glob("libdiffrate_ops.*"):
                self.copy_file(str(library), str(ROOT / "diffrate_ext"))


setup(
    ext_modules=[Extension("diffrate_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # honoured by pip as a build requirement; a static one would download a second torch beside an installed one
    setup_requires=[] if find_torch() else [f"torch>={OLDEST_TORCH}"],
)
