"""build_info: what was built, and what it runs with."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import diffrate_ext
from diffrate_ext import _build


def test_what_was_built() -> None:
    info = diffrate_ext.build_info()
    assert set(info) == {
        "compiler",
        "simd_levels",
        "simd_in_use",
        "cuda_architectures",
        "abi_target",
        "built_with_torch",
        "torch",
        "torch_cuda",
        "threads",
    }
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert "plain" in info["simd_levels"]
    assert info["simd_in_use"] in info["simd_levels"]
    assert isinstance(info["cuda_architectures"], list)
    assert info["abi_target"] == "2.10"
    assert (info["torch"], info["torch_cuda"]) == (torch.__version__, torch.version.cuda)
    major, minor = (int(part) for part in info["built_with_torch"].split(".")[:2])
    assert (major, minor) >= (2, 10)


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert diffrate_ext.build_info()["threads"] == 3
    finally:
        torch.set_num_threads(before)


def test_every_call_returns_its_own_lists() -> None:
    diffrate_ext.build_info()["simd_levels"].clear()
    assert diffrate_ext.build_info()["simd_levels"] != []


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(diffrate_ext, "_C")
    monkeypatch.setitem(sys.modules, "diffrate_ext._C", None)
    spec = importlib.util.spec_from_file_location("build_once_more", _build.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"compiled library is missing or does not load.*pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
