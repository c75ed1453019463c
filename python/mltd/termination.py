"""SIGTERM as a wish to end soon: what is being done is finished and saved first."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(SystemExit):
    """The process was told to end; what was done is saved. Uncaught, it ends the process with the status of SIGTERM."""

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """Set once the process is told to end. Only the main thread hears signals; elsewhere they do what they did."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
