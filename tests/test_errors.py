"""A user's mistake and a fault of the machine are told apart from bugs of ours."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_run import (
    write_experiment,
)

from sam2train import cli, commands
from sam2train.errors import MachineFault, UserError
from sam2train.files import REPOSITORY


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


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


def no_space():
    problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    problem.filename = "/nowhere/run/last.pt"
    return problem


FAULTS = {
    "disk full": (no_space(), r"/nowhere/run/last\.pt: No space left on device; the disk is full"),
    "read-only": (OSError(errno.EROFS, "Read-only", "a/b"), r"a/b: Read-only; .*--run-dir"),
    "removed": (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: .*removed"),
    "host": (MemoryError("Unable to allocate 9 GiB"), r"this machine.*batch_size=1.*num_workers=0"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "on this machine"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), r"GPU.*image_size="),
    "worker": (MachineFault("a process that loads data ended"), "a process that loads data ended"),
    "not finite": (FloatingPointError("step 3: loss nan"), "step 3: loss nan"),
    # As torch raises it, in the middle of an evaluation.
    "worker in between": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        r"a process that loads data ended \(DataLoader worker .*Killed\).*num_workers=0.*--resume",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_is_a_message(experiment, monkeypatch, capsys, fault):
    error, expected = FAULTS[fault]

    def fails_so(self):
        raise error

    monkeypatch.setattr(commands.DryRun, "run", fails_so)
    assert cli.main([str(experiment), "--dry-run"]) == 1
    printed = capsys.readouterr().err
    assert re.match(f"error: .*{expected}", printed, re.DOTALL)
    assert "Traceback" not in printed
    assert cli.main([str(experiment), "--dry-run", "--traceback"]) == 1
    printed = capsys.readouterr().err
    assert "fails_so" in printed
    assert re.search(f"error: .*{expected}", printed, re.DOTALL)


def test_a_bug_is_no_fault_of_the_machine(experiment, monkeypatch):
    def fails_so(self):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(commands.DryRun, "run", fails_so)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main([str(experiment), "--dry-run"])


def test_a_machine_without_memory_is_a_message_with_what_lowers_it(experiment, tmp_path):
    """A real one: the process may take 400 MB more than its libraries do."""
    code = (
        "import resource, sys, sam2train.trainer\n"
        "from sam2train import cli\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (400 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["dataset.batch_size=64", "dataset.num_workers=0", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, str(experiment), *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert said[0].startswith("error: out of memory on this machine: ")
    assert said[1].startswith("these settings lower it, the first ones most; now they are: ")
    for setting in ("dataset.batch_size=64", "dataset.num_workers=0", "dataset.mask_cache_mb="):
        assert setting in said[1]
    assert said[2] == "the same command with --probe measures which fit"
    assert said[3] == "What a run has saved stays; --resume goes on with it"


def test_ctrl_c_while_libraries_tidy_up_prints_no_traceback(tmp_path):
    """Python handles it to its very end, and what is called there prints it."""
    late = "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    (tmp_path / "sitecustomize.py").write_text(late)
    done = subprocess.run(
        [sys.executable, REPOSITORY / "run.py", "--list"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
    assert "coco_point_bbox" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_of_which_a_library_makes_another_error_is_no_bug(monkeypatch, capsys, number):
    """As imports do, in the middle of which it is raised."""

    def sent(self):
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except BaseException:
            raise AttributeError("'NoneType' object has no attribute 'x'") from None

    monkeypatch.setattr(commands.ListExperiments, "run", sent)
    assert cli.main(["--list"]) == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}\n"
