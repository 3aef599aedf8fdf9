"""Trials that are forked: the same results as processes of their own, and ends of all kinds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_coco
from small_sweep import COMMAND, EXPERIMENT

from sam2train import cli, sweep_server
from sam2train.sweep_server import ForkServer


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(sweep_server, "PRELOADED", ())
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
        for _ in range(5):  # before it has begun
            process = start(server, tmp_path, "import time; time.sleep(60)")
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM

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
    found = {p.relative_to(trial) for p in trial.rglob("*") if p.suffix in (".csv", ".png")}
    alone = Path("alone")
    expected = {p.relative_to(alone) for p in alone.rglob("*") if p.suffix in (".csv", ".png")}
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
