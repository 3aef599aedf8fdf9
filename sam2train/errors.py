"""Exceptions for what a user or a machine did; everything else that is raised is a bug of ours."""


class UserError(ValueError):
    """Something the user can mend. The message gives path, value, expectation and a way out.

    `run.py` prints the message without a traceback and exits with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: in a notebook the message is enough, too."""
        return [f"error: {self}"]


class MachineFault(RuntimeError):
    """Something that the machine did, such as ending a process. The message says what helps.

    `run.py` prints the message without a traceback and exits with code 1.
    """
