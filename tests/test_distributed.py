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
from sam2train.data_loader import load_batches
from sam2train.errors import MachineFault, UserError
from sam2train.machine import Interrupted, choose_device

ROOT = Path(__file__).parents[1]
# Of the largest of a tensor's changes over 5 steps: 3e-4 was measured. Sums in another order round
# differently, and AdamW makes a step of full size of the smallest gradient.
BOUND = 2e-3


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
        error.add_note(traceback.format_exc())
        result = error
    pipe.send(result)
    pipe.close()
    os._exit(0)


def train(settings, run_dir, resume=None):
    run = make_trainer(settings, run_dir, resume=resume)
    run.run()
    return {name for name, p in run.parameters.items() if p not in run.optimizer.state}


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


@pytest.mark.parametrize(("count", "num_batches", "num_clicks"), [(2, 2, 0), (3, 1, 2)])
def test_weights_are_those_of_one_process_with_the_joint_batch(
    tmp_path, settings, count, num_batches, num_clicks
):
    clicks = {"interaction": {"num_correction_pt_per_frame": num_clicks}}
    run = make_trainer(settings(1), tmp_path / "began")
    began = {name: p.detach() for name, p in run.parameters.items()}
    alone = train(settings(count, num_batches, **clicks), tmp_path / "alone")
    found = together(count, train, settings(1, num_batches, **clicks), tmp_path / "together")
    assert found == [alone] * count  # the same parameters never got a gradient
    assert "no_mem_pos_enc" in alone
    one = weights(tmp_path / "alone" / "checkpoints" / "last.pt")
    several = weights(tmp_path / "together" / "checkpoints" / "last.pt")
    assert one.keys() == several.keys()
    for name, start in began.items():
        change, apart = (one[name] - start).abs().max(), (one[name] - several[name]).abs().max()
        assert apart <= BOUND * change, name
        assert (name in alone) == (change == 0)
    for single, joint in zip(*map(rows, (tmp_path / "alone", tmp_path / "together")), strict=True):
        timed = {"seconds", "clips_per_second", "memory_gb"}
        assert single.keys() == joint.keys()
        for name in single.keys() - timed:
            assert joint[name] == pytest.approx(single[name], rel=1e-3, abs=1e-4), name


def test_validation_rows_are_those_of_one_process(tmp_path, experiment):  # noqa: F811
    settings = experiment(
        trainer={"num_steps": 0}, evaluation={"max_videos": None, "num_overlays": 1}
    )
    train(settings, tmp_path / "alone")
    together(2, train, settings, tmp_path / "together")
    for name in ("scores.csv", "horizon.csv"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert len((tmp_path / "alone" / "scores.csv").read_text().splitlines()) > 6
    folders = [tmp_path / name / "overlays" for name in ("alone", "together")]
    alone, several = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert alone == several


def draw_clips(settings, run_dir, resume=None):
    """The clips of each step of a run that learns nothing."""
    run = make_trainer(settings, run_dir, resume=resume)
    seen = []

    def step(batches):
        collected = run._next_batches(batches)
        seen.append([name for batch in collected for name in batch.names])
        return {"loss": torch.tensor(0.0)}

    run.train_step = step
    run.run()
    return seen


def test_a_run_goes_on_with_other_numbers_of_processes_in_the_same_order(tmp_path, settings):
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    steps = []
    for count, num_batches, num_steps in ((2, 3, 1), (1, 6, 2), (3, 2, 3)):
        config = settings(2, num_batches, trainer={"num_steps": num_steps})
        found = together(count, draw_clips, config, tmp_path / "run", last if steps else None)
        assert all(len(of_process) == 1 for of_process in found), found
        pairs = [zip(part[0][::2], part[0][1::2], strict=True) for part in found]
        batches = [pair for place in zip(*pairs, strict=True) for pair in place]
        steps.append([name for pair in batches for name in pair])
    data = make_trainer(settings(1), tmp_path / "other").train_data
    stream = load_batches(data, settings(1).dataset, 0, start=0, pin_memory=False)
    expected = [next(stream).names[0] for _ in range(36)]
    assert [name for step in steps for name in step] == expected
    content = torch.load(last, weights_only=True)
    assert (content["clips"], content["clips_per_step"]) == (36, 12)
    assert len(content["rng"]["of_others"]) == 2
    # Other settings may not make another number of clips; another number of processes is told.
    with pytest.raises(UserError, match="a step had 12 clips until now, and has 10 from here"):
        make_trainer(settings(2, 5), tmp_path / "run", resume=last)
    run = make_trainer(settings(2, 2), tmp_path / "run", resume=last)
    assert "a step had 12 clips until now, and has 4 from here" in run._warnings[0]
    assert run.num_clips == 36


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


def break_one(settings, run_dir):
    run = make_trainer(settings, run_dir)
    if distributed.rank() == 1:
        real = run._next_batches

        def damaged(batches):
            (batch,) = real(batches)
            if run.step == 1:
                batch.img_batch[0] = torch.nan
            return [batch]

        run._next_batches = damaged
    run.run()


def test_the_clips_of_a_bad_step_are_kept_from_all_processes(tmp_path, settings):
    first, second = together(2, break_one, settings(1), tmp_path / "run")
    assert isinstance(first, FloatingPointError), first
    assert "the input, the frames of" in str(first)
    assert isinstance(second, SystemExit)
    assert second.code == 1
    content = torch.load(tmp_path / "run" / "bad_batch_2.pt", weights_only=True)
    assert len(content["clips"]) == 2
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 1


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
