"""What is done before a CPU is timed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from diffrate_ext.machine import settle_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.zeros(2**20) for _ in range(6)]  # 24 MiB in blocks of 4: 6,144 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

settle_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does")
def test_memory_is_kept_once_it_is_settled(tmp_path):
    """Without that, in most processes 61,000 page faults are counted here, and in some none."""
    # glibc's own settings would decide in place of what it has seen
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**os.environ, "GLIBC_TUNABLES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
