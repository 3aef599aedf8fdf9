"""SIGTERM and Ctrl-C as requests: a run saves before it stops."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(SystemExit):
    """The run was asked to stop and has saved; the code is the shell's for the signal."""


class StopRequests:
    """While open, SIGTERM and Ctrl-C are kept in `received`; a second Ctrl-C aborts."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        def keep(number: int, frame: FrameType | None) -> None:
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = number

        try:
            self._before = {n: signal.signal(n, keep) for n in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            self._before = {}  # not in the main thread: signals are somebody else's business
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def interrupted(self) -> Interrupted:
        """What to raise once all is saved."""
        return Interrupted(128 + self.received)


def leave_group(worker: int) -> None:
    """For processes that load data: a signal to the whole group (Ctrl-C, `timeout`, a scheduler)
    must not end them before the run has saved. One to them alone does, as at exit."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
