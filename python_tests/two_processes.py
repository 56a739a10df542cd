"""Scripts in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    # python -m looks in the working directory first, where a checkout has no compiled library
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=300, cwd=Path(__file__).parent
    )
