"""Devices by name, processor cores, what a result depends on, requests to stop."""

import io
import os
import platform
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from sam2train import machine
from sam2train.errors import UserError
from sam2train.files import REPOSITORY
from sam2train.machine import (
    STOP_SIGNALS,
    Interrupted,
    StopRequests,
    cell,
    check_available,
    choose_device,
    count_bar,
    describe_environment,
    num_cores,
    plain_console,
    read_device,
    say,
)

ROOT = Path(__file__).parents[1]


def test_devices(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)  # there or not
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU", None, 1.5])
def test_names_of_no_device(name):
    with pytest.raises(UserError, match=r"device: .*; expected cpu, cuda, cuda:N"):
        read_device(name)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cpu", "cuda", "cuda:0"):
        check_available(torch.device(name))
    for name in ("cuda:1", "mps", "xpu"):
        with pytest.raises(UserError, match=f"{name} is not available here; use `cpu`"):
            check_available(torch.device(name))


def test_cores_are_those_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert num_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_what_a_result_depends_on(monkeypatch):
    found = describe_environment(torch.device("cpu"))
    assert found["python"] == platform.python_version()
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    head = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode == 0:
        assert found["code"]["commit"] == head.stdout.strip()

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    found = describe_environment(torch.device("cpu"))
    assert found["code"] == {"commit": None, "changed": None}
    assert found["packages"]["no-such-package"] is None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_kept_until_the_run_can_stop(number):
    before = signal.getsignal(number)
    with StopRequests() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        stopped = stop.interrupted()
        assert isinstance(stopped, Interrupted)
        assert stopped.code == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(first, second):
    """But `timeout` sends its own twice in a row, to the process and to its group."""
    code = (
        "import os, time; from sam2train.machine import StopRequests\n"
        "with StopRequests() as stop:\n"
        f"    os.kill(os.getpid(), {int(first)}); os.kill(os.getpid(), {int(first)})\n"
        "    print(stop.received, flush=True); time.sleep(0.4)\n"
        f"    os.kill(os.getpid(), {int(second)}); print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{int(first)}\n"
    assert done.returncode == -second
    assert "a second signal ends at once" in done.stderr


def signalled_while_it_waits(number):
    os.kill(os.getpid(), number)
    time.sleep(30)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_wait(number):
    with StopRequests() as stop:
        start = time.monotonic()
        with pytest.raises(Interrupted), stop.while_waiting():
            signalled_while_it_waits(number)
        with pytest.raises(Interrupted), stop.while_waiting():
            time.sleep(30)  # nor does a new wait begin
        assert time.monotonic() - start < 20


def test_the_end_of_the_terminal_is_ignored_under_nohup():
    code = (
        "import os, signal; from sam2train.machine import StopRequests, interruptible\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with interruptible(), StopRequests() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print(stop.received)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None\n"


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopRequests() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_a_worker_leaves_the_group_that_a_signal_is_sent_to():
    code = (
        "import os; from sam2train.machine import leave_group; before = os.getpgid(0)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    leave_group(0); os._exit(0 if os.getpgid(0) == os.getpid() != before else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_on_windows_the_two_signals_that_it_has_stop_a_run(monkeypatch):
    for name in ("SIGHUP", "SIGUSR1", "SIGALRM", "setitimer"):
        monkeypatch.delattr(signal, name)
    for name in ("setpgid", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    there = runpy.run_path(machine.__file__)  # as a process on Windows imports it
    assert there["STOP_SIGNALS"] == (signal.SIGTERM, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with there["StopRequests"]() as stop, there["time_limit"](0.0, str):
        signal.raise_signal(signal.SIGINT)
    assert stop.received == signal.SIGINT
    assert there["num_cores"]() == os.cpu_count()
    try:
        there["leave_group"](0)  # a loader process has no group to leave
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_room_needs_no_torch_to_count_cores():
    code = "import sys, sam2train.machine as m; m.num_cores(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


NASTY = "[/red][bold]x\x1b]0;title\x07\x1b[2J\u202egpj \udcff:cat:"
TOLD = r"[/red][bold]x\x1b]0;title\x07\x1b[2J\u202egpj \udcff:cat:"


def test_a_message_is_printed_as_it_is():
    out = io.StringIO()
    console = Console(file=out, width=70, force_terminal=True, color_system=None)
    say(console, f"first {NASTY}\n{'y' * 80}")
    assert out.getvalue() == f"first {TOLD}\n{'y' * 80}\n"


def test_lines_break_between_words_on_a_terminal_and_commands_stay_whole():
    text = "one two three\n  python run.py --resume some/long/folder"
    for terminal, expected in ((True, "one two\nthree"), (False, "one two three")):
        out = io.StringIO()
        say(Console(file=out, width=10, force_terminal=terminal, color_system=None), text)
        assert out.getvalue() == f"{expected}\n  python run.py --resume some/long/folder\n"


def test_a_file_gets_a_line_of_progress_now_and_then(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=80)
    with count_bar(console) as bar:
        bar.advance(bar.add_task("videos", total=4))
    assert out.getvalue() == ""
    monkeypatch.setattr(machine, "_BETWEEN_LINES", 0.0)
    with count_bar(console) as bar:
        task = bar.add_task("videos", total=4)
        bar.advance(task)
        bar.update(task, advance=1)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == [
        "videos: 1/4",
        "videos: 2/4",
    ]


def test_what_is_piped_is_not_broken_at_80(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert plain_console(quiet=False).width == 200
    monkeypatch.setenv("COLUMNS", "90")
    assert plain_console(quiet=False).width == 90


def test_a_cell_shows_a_name_as_it_is():
    table = Table(title=cell(NASTY))
    table.add_column(cell(NASTY))
    table.add_row(cell(f"{NASTY}\n"))
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True, color_system=None).print(table)
    assert out.getvalue().count(TOLD) == 3
    assert TOLD + r"\n" in out.getvalue()
    assert out.getvalue().replace("\n", "").isprintable()
