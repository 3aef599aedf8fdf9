"""Exceptions for a user's mistake and a machine's fault; any other is a bug in this program."""


class UserError(ValueError):
    """A mistake that the user can correct. The message gives path, value, expectation and a way
    out.

    `run.py` prints the message without a traceback and exits with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: in a notebook the message is enough, too."""
        return [f"error: {self}"]


class MachineFault(RuntimeError):
    """A fault of the machine, such as a process that it ended. The message gives a way out.

    `run.py` prints the message without a traceback and exits with code 1.
    """
