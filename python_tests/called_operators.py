"""Which of our operators a test calls."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CalledOperators(TorchDispatchMode):
    """Collects their names and arguments, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "diffrate":
            self.names.append(func.__name__.split(".")[0])
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))
