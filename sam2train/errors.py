"""The one exception for a user's mistake; everything else that is raised is a bug of ours."""


class UserError(ValueError):
    """Something the user can mend. The message gives path, value, expectation and a way out.

    `run.py` prints the message without a traceback and exits with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: in a notebook the message is enough, too."""
        return [f"error: {self}"]
