"""What is written in several parts is written whole: a signal's handler that raises waits until all parts are there."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]


class _Postponed:
    """Stands for a signal's handler: notes the signals until it is told to pass them on."""

    def __init__(self, number: int, handler: _Handler) -> None:
        self.number, self.handler = number, handler
        self.noted: list[FrameType | None] = []
        self.passes_on = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.passes_on:
            self.restore()
            self.handler(number, frame)
        else:
            self.noted.append(frame)

    def restore(self) -> None:
        signal.signal(self.number, self.handler)

    def finish(self) -> None:
        """Restores the handler, and calls it for the signals that were noted."""
        self.passes_on = True  # from here on none is noted
        self.restore()
        _call_all([functools.partial(self.handler, self.number, frame) for frame in self.noted])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Lets no signal's handler, such as Ctrl-C's, run and raise within the block; those that came run after it.

    Python runs handlers in the main thread alone, between any two bytecodes. In other threads there is nothing to do.
    An exception that another thread forces upon this one (`PyThreadState_SetAsyncExc`) cannot be postponed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    postponed: list[_Postponed] = []
    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):  # any other handler is not Python's
                postponed.append(_Postponed(number, handler))
                signal.signal(number, postponed[-1])
        yield
    finally:
        try:
            for each in postponed:  # all before the first is finished, whose handler may raise
                each.passes_on = True
        finally:
            _call_all([each.finish for each in postponed])


def _call_all(functions: list[Callable[[], Any]]) -> None:
    """Calls all functions, though one raises."""
    if functions:
        try:
            functions[0]()
        finally:
            _call_all(functions[1:])
