"""A user's mistake and a fault of the machine are told apart from bugs of ours."""

import pytest

from sam2train.errors import MachineFault, UserError


def test_a_notebook_shows_the_message_alone():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shown = []
    shell._showtraceback = lambda kind, error, lines: shown.extend(lines)
    try:
        raise UserError("a/b.json: no such file; name another")
    except UserError:
        shell.showtraceback()
    assert shown == ["error: a/b.json: no such file; name another"]


def test_neither_is_taken_for_the_other():
    assert not issubclass(UserError, MachineFault)
    assert not issubclass(MachineFault, UserError)
