"""Ctrl-C, where it must not come in between."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Within a ``with`` block Ctrl-C waits for its end."""
    # only the main thread hears it, and what another language installed cannot be put back
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    waiting: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: waiting.append(None))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
