"""Several processes of one job: the same weights, rows, order and end as one process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from test_trainer import experiment, make_trainer, rows, weights  # noqa: F401

from sam2train import distributed
from sam2train.errors import MachineFault, UserError, add_note
from sam2train.machine import Interrupted, choose_device

ROOT = Path(__file__).parents[1]


def together(count, function, *arguments, patience=120):
    """What the function gives in each of `count` processes that work together, or its error."""
    deadline = time.monotonic() + patience
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for number in range(count):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = context.Process(target=_run, args=(theirs, environment, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results = []
    for pipe in pipes:
        try:
            results.append(
                pipe.recv() if pipe.poll(max(deadline - time.monotonic(), 0)) else "no answer"
            )
        except EOFError:
            results.append("killed")
    for process, result in zip(processes, results, strict=True):
        if result == "no answer":
            process.kill()
        process.join(10)
    return results


def _run(pipe, environment, function, arguments):
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with distributed.joined():
            result = function(*arguments)
    except BaseException as error:
        add_note(error, traceback.format_exc())
        result = error
    pipe.send(result)
    pipe.close()
    os._exit(0)


@pytest.fixture
def settings(experiment):  # noqa: F811
    """Correction clicks on, no validation; `memory` has parameters that no step reads."""

    def build(batch_size, num_batches=1, **changes):
        sections = {
            "dataset": {"batch_size": batch_size, "val_path": None},
            "model": {"trainable_modules": ["memory", "no_mem_pos_enc"]},
            "interaction": {"num_correction_pt_per_frame": 2},
            "trainer": {"num_steps": 5, "grad_accumulation": num_batches, "audit": "warn"},
        }
        for name, change in changes.items():
            sections[name] = {**sections.get(name, {}), **change}
        return experiment(**sections)

    return build


def stop_one(settings, run_dir):
    run = make_trainer(settings, run_dir)
    step = run.train_step

    def signalled(batches):
        if run.step == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    run.train_step = signalled
    with pytest.raises(Interrupted) as caught:
        run.run()
    return run.step, caught.value.code


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, settings):
    assert together(2, stop_one, settings(1), tmp_path / "run") == [(3, 143)] * 2
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 3


def stop_in_evaluation(settings, run_dir):
    """Process 1 has fewer videos, and waits for the other when that one is asked to stop."""
    run = make_trainer(settings, run_dir)
    heed = run.scores._heed_signal

    def signalled(on_frame=None):
        if distributed.rank() == 0:
            run.stop.received = signal.SIGTERM
        return heed(on_frame)

    run.scores._heed_signal = signalled
    with pytest.raises(Interrupted) as caught:
        run.run()
    return caught.value.code, run.scores.scored


def test_a_signal_in_an_evaluation_ends_it_for_all(tmp_path, experiment):  # noqa: F811
    assert together(2, stop_in_evaluation, experiment(), tmp_path / "run") == [(143, None)] * 2


def lose_one(settings, run_dir):
    run = make_trainer(settings, run_dir)
    step = run.train_step

    def dying(batches):
        if run.step == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batches)

    run.train_step = dying
    run.run()


def test_a_dead_process_ends_the_others_in_seconds(tmp_path, settings):
    began = time.monotonic()
    first, second = together(2, lose_one, settings(1), tmp_path / "run")
    assert isinstance(first, MachineFault)
    assert "lost the others" in str(first)
    assert second == "killed"
    assert time.monotonic() - began < 60  # of which the steps take most


def be_silent():
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # as in a CUDA call that waits for the other


def test_a_process_that_hangs_is_missed(monkeypatch, capfd):
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 0.5), ("GRACE", 0.2)):
        monkeypatch.setattr(distributed, name, seconds)
    assert together(2, be_silent, patience=6) == ["killed", "no answer"]
    assert "error: process 1 of the job ended; process 0 ends, too" in capfd.readouterr().err


def fail_in_main():
    def broken():
        raise UserError("the file is damaged")

    distributed.from_main(broken)


def test_what_the_main_process_cannot_read_ends_the_others_without_a_word():
    first, second = together(2, fail_in_main)
    assert isinstance(first, UserError)
    assert isinstance(second, SystemExit)
    assert second.code == 2


def test_work_is_divided_by_its_cost(monkeypatch):
    assert distributed.own_part([5, 1, 1]) == [0, 1, 2]
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        parts.append((distributed.own_part([1, 9, 1, 5, 2]), distributed.own_part([1, 9, 1, 5], 3)))
    assert parts == [([1], [0, 1, 2]), ([0, 2, 3, 4], [3])]


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    assert choose_device("cuda") == torch.device("cuda")
    for name, value in {"RANK": 5, "LOCAL_RANK": 1, "WORLD_SIZE": 8, "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, str(value))
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="cuda:0 is one GPU, and torchrun started 4 processes"):
        choose_device("cuda:0")


PROGRAM = """
import os, signal, sys
sys.path.insert(0, {root!r})
from sam2train import cli, distributed
from sam2train.trainer import Trainer

step = Trainer.train_step

def dying(self, batches):
    if self.step == 3 and distributed.rank() == 1 and not distributed.is_restarted():
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)

Trainer.train_step = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def test_torchrun_goes_on_from_the_last_checkpoint(tmp_path, settings):
    from sam2train.config import to_yaml

    (tmp_path / "small.yaml").write_text(to_yaml(settings(1, trainer={"num_steps": 4})))
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["--max-restarts=1", "program.py", "small.yaml", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4]
    assert "Traceback" not in done.stdout
    assert done.stdout.count("wrote run/") == 1
