"""A fault of the machine is a message with a way out; a bug of ours is a traceback."""

import errno
import os
import re

import pytest
import torch
from small_run import (
    write_experiment,
)

from sam2train import cli, commands
from sam2train.errors import MachineFault


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
