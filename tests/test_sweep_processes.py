"""Trials that are forked: the same results as processes of their own, and ends of all kinds."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_coco
from small_sweep import COMMAND, EXPERIMENT, SEEDS, calls, results, run

from sam2train import cli, sweep_processes
from sam2train.errors import UserError
from sam2train.sweep_processes import CLAIMS, ForkServer, claim_trial, is_claimed, record_lock
from sam2train.sweep_trials import LOG


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(sweep_processes, "PRELOADED", ())
    server = ForkServer({**os.environ, "PYTHONUNBUFFERED": "1"})
    yield server
    server.close()


def start(server, tmp_path, code, **environment):
    program = tmp_path / "program.py"
    program.write_text(code)
    with (tmp_path / "log.txt").open("w") as log:
        words = [sys.executable, str(program), "--a=1"]
        return server.start(words, {"PATH": "", **environment}, log.fileno(), ())


class TestProcess:
    @pytest.mark.parametrize(
        ("end", "code"),
        [
            ("", 0),
            ("sys.exit(3)", 3),
            ("sys.exit('a reason')", 1),
            ("raise ValueError('a reason')", 1),
            ("os.kill(os.getpid(), 9)", -9),
            ("os._exit(143)", 143),
        ],
    )
    def test_it_ends_as_a_process_of_its_own_does(self, server, tmp_path, end, code):
        process = start(server, tmp_path, f"import os, sys\nprint('begun')\n{end}\n")
        assert process.wait(30) == process.returncode == process.poll() == code
        said = (tmp_path / "log.txt").read_text()
        assert said.startswith("begun\n")
        assert ("a reason" in said) == ("a reason" in end)
        process.terminate()  # of a process that is gone: nothing

    def test_it_is_the_program_with_its_words_environment_and_folder(
        self, server, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        code = (
            "import atexit, os, signal, sys\n"
            "atexit.register(print, 'at exit')\n"
            "print(__name__, sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read())\n"
            "print(os.getsid(0) == os.getpid(), signal.getsignal(15) is signal.SIG_DFL)\n"
            "print(os.path.samefile(sys.path[0], '.'), 'torch' in sys.modules)\n"
        )
        assert start(server, tmp_path, code, WORD="x").wait(30) == 0
        first, second, *others = (tmp_path / "log.txt").read_text().splitlines()
        assert first.startswith("__main__ ['--a=1'] {'PATH': '', 'WORD': 'x'")
        assert first.endswith(f"{tmp_path} ")
        assert second == "True True"
        assert others == ["True False", "at exit"]

    def test_signals(self, server, tmp_path):
        process = start(server, tmp_path, "import time; time.sleep(60)")
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # to one that just began
            process = start(server, tmp_path, "import time; time.sleep(60)")
            os.kill(process.pid, number)
            assert process.wait(30) == -number

    def test_a_signal_to_the_job_does_not_end_the_server(self, server, tmp_path):
        start(server, tmp_path, "").wait(30)  # it listens
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            server._process.send_signal(number)
        assert start(server, tmp_path, "import sys; sys.exit(5)").wait(30) == 5

    def test_a_dead_server_is_a_dead_trial(self, server, tmp_path):
        process = start(server, tmp_path, "import time; time.sleep(60)")
        pid = process.pid
        server._process.kill()
        assert process.wait(30) == -signal.SIGKILL
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(BrokenPipeError):
            start(server, tmp_path, "")

    def test_without_a_program_nothing_starts(self, server, tmp_path):
        with pytest.raises(FileNotFoundError), (tmp_path / "log.txt").open("w") as log:
            server.start([sys.executable, "missing.py"], {}, log.fileno(), ())


def test_trials_of_a_sweep_write_what_separate_runs_do(tmp_path, monkeypatch):
    """Weights, scores, tables and pictures, bit for bit; and the second trial reads the scores of
    step 0, of the base and of the copied mask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    data = make_coco(tmp_path / "data", num_frames=5, size=(64, 64))
    text = EXPERIMENT.replace("train.json", str(data)).replace("val.json", str(data))
    text = text.replace("val_path:", f"test_path: {data}, val_path:")
    (tmp_path / "small.yaml").write_text(text)
    rates = {"optimizer.learning_rate": {"values": [0.0001, 0.001]}}
    content = {"method": "grid", "command": COMMAND, "parameters": rates}
    content["metric"] = {"name": "val/J_and_F", "goal": "maximize"}
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(content))
    words = ["--smoke", "trainer.device=cpu"]
    assert cli.main(["rates.yaml", *words]) == 0
    monkeypatch.delenv("SAM2TRAIN_BASE_SCORES", raising=False)
    alone = ["small.yaml", *words, "--run-dir", "alone", "optimizer.learning_rate=0.001"]
    assert cli.main(alone) == 0
    trial = Path("runs/sweeps/rates-smoke/002")
    found = {p.relative_to(trial) for p in trial.rglob("*") if p.suffix in (".csv", ".jpg")}
    alone = Path("alone")
    expected = {p.relative_to(alone) for p in alone.rglob("*") if p.suffix in (".csv", ".jpg")}
    assert found == expected
    assert len(found) > 3
    for name in found:
        assert (trial / name).read_bytes() == (alone / name).read_bytes(), name
    one, other = (
        torch.load(folder / "checkpoints/last.pt", weights_only=True)["model"]
        for folder in (trial, alone)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    entries = [p for p in (trial.parent / "base_scores").iterdir() if p.is_dir()]
    # Step 0, which is the best here, on both splits, the base on test, the copy on both.
    assert len(entries) == 5
    newest = max(p.stat().st_mtime for p in entries)
    assert newest < (trial / "config.yaml").stat().st_mtime


FORK = multiprocessing.get_context("fork")


def in_process(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_claim_is_of_one_process_and_comes_free(tmp_path):
    first = claim_trial(tmp_path, "001")
    assert claim_trial(tmp_path, "001") is None
    assert is_claimed(tmp_path, "001")
    assert not is_claimed(tmp_path, "002")
    assert first.renew()
    first.release()
    assert not is_claimed(tmp_path, "001")
    claim_trial(tmp_path, "001").release()


def claim_and_die(folder):
    claim_trial(folder, "001")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_process_of_this_host_has_no_claim(tmp_path):
    in_process(claim_and_die, tmp_path).join()
    assert (tmp_path / CLAIMS / "001").exists()
    assert not is_claimed(tmp_path, "001")
    claim_trial(tmp_path, "001").release()


def test_a_claim_of_another_host_counts_until_it_is_old(tmp_path):
    claim_trial(tmp_path, "001").release()
    path = tmp_path / CLAIMS / "001"
    path.write_text("elsewhere 12 abc")
    assert is_claimed(tmp_path, "001")
    assert claim_trial(tmp_path, "001") is None
    old = time.time() - sweep_processes.STALE - 5
    os.utime(path, (old, old))
    assert not is_claimed(tmp_path, "001")
    taken = claim_trial(tmp_path, "001")
    assert taken is not None
    # The process that slept sees that it lost the trial, and leaves the claim of the other alone.
    path.write_text("a third 1 abc")
    taken.renewed -= 100
    assert not taken.renew()
    taken.release()
    assert path.read_text() == "a third 1 abc"


def test_one_process_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_processes, "PATIENCE", 0.1)
    with record_lock(tmp_path), pytest.raises(UserError, match="another process has been writing"):
        record_lock(tmp_path).__enter__()
    with record_lock(tmp_path):
        pass


def sweep_in(number, path, options):
    os.setpgid(0, 0)
    os._exit(run(path, **options) + 10 * number)


@pytest.mark.parametrize("settings", [{}, {"method": "random", "run_cap": 6}])
def test_two_processes_run_each_trial_once(small, settings):
    seeds = {"trainer.seed": {"values": list(range(6))}}
    Path("slow").write_text("0.05")
    path = small(seeds, **settings)
    processes = [in_process(sweep_in, number, path, {}) for number in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 10]
    trials = [call["trial"] for call in calls()]
    assert sorted(trials) == [f"{k:03d}" for k in range(1, 7)]
    assert {row["state"] for row in results().values()} == {"finished"}
    assert len(results()) == 6
    ids = {call["trial"]: call["env"]["WANDB_RUN_ID"] for call in calls()}
    record = json.loads(Path("runs/sweeps/small-sweep/sweep.json").read_text())
    assert {row["name"]: row["run_id"] for row in record["trials"]} == ids


def test_the_trial_of_a_dead_process_is_taken_over(small):
    Path("slow").write_text("3600")
    path = small(SEEDS)
    folder = Path("runs/sweeps/small-sweep")
    first = in_process(sweep_in, 0, path, {})
    wait_for(lambda: (folder / "001" / "metrics.jsonl").is_file())
    second = in_process(sweep_in, 1, path, {})
    wait_for(lambda: (folder / "002" / "metrics.jsonl").is_file())
    Path("slow").unlink()
    # The process of the sweep and that of its trial, as where a host goes down.
    (trial,) = processes_of(folder / "001")
    os.kill(first.pid, signal.SIGKILL)
    os.kill(trial, signal.SIGKILL)
    (sleeping,) = processes_of(folder / "002")
    os.kill(sleeping, signal.SIGTERM)  # that one is interrupted, and its sweep goes on
    second.join(60)
    counts = Counter(call["trial"] for call in calls())
    assert counts == {"001": 1, "002": 1, "003": 1}
    assert results()["001"]["state"] == "finished"
    first.join()


def processes_of(folder):
    """The numbers of the trials that this test runs in a folder, by the log they print to."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (process / "fd" / "1").resolve() == (folder / LOG).resolve():
                found.append(int(process.name))
    return found


def test_jobs_are_spread_over_the_gpus(small, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    program = Path("program/run.py")
    text = program.read_text().replace("names = (", 'names = ("CUDA_VISIBLE_DEVICES", ')
    program.write_text(text)
    Path("slow").write_text("0.3")
    seeds = {"trainer.seed": {"values": list(range(4))}}
    assert run(small(seeds), jobs=2) == 0
    found = Counter(call["env"]["CUDA_VISIBLE_DEVICES"] for call in calls())
    assert set(found) == {"4", "GPU-7"}
    first = {c["trial"]: c["env"]["CUDA_VISIBLE_DEVICES"] for c in calls() if c["trial"] < "003"}
    assert sorted(first.values()) == ["4", "GPU-7"]


def test_the_gpus_of_this_machine_are_counted(monkeypatch):
    import torch

    from sam2train.sweep_trials import gpus_for_jobs

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpus_for_jobs() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_for_jobs() == []


def test_on_windows_the_lock_of_a_claim_is_that_of_msvcrt(tmp_path, monkeypatch):
    held = set()

    def locking(number, mode, size):
        """As there: a second lock of a file's first byte is refused, by whichever process."""
        file = os.fstat(number).st_ino
        if file in held:
            raise PermissionError(13, "Permission denied")
        held.add(file)

    windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    first, second = claim_trial(tmp_path, "001"), claim_trial(tmp_path, "002")
    assert claim_trial(tmp_path, "001") is None
    assert is_claimed(tmp_path, "001")
    for claim in (first, second):
        claim.release()
