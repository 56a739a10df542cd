"""A run that stops early keeps what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def saved_however_it_ends(
    save: Callable[[], None], stopped: Callable[[], str], path: Callable[[], object]
) -> Iterator[None]:
    """Within a ``with`` block a run makes its steps; its state is saved at the end, after Ctrl-C and after an error.

    Args:
        save: write the state after the last whole step.
        stopped: what to say after Ctrl-C.
        path: where the state is by then; None: nowhere.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with a message that says what was done and how to continue.
    """
    try:
        yield
        save()
    except KeyboardInterrupt:
        save()
        where = path()
        after = (
            "nothing was written" if where is None else f"its state is in {where}: continue with --resume (resume=True)"
        )
        raise KeyboardInterrupt(f"{stopped()}; {after}") from None
    except BaseException:
        with suppress(OSError):  # the disk may be what failed
            save()
        raise
