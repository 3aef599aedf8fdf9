"""Several processes run one sweep: no trial twice, and those of a dead process once more."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from small_sweep import SEEDS, calls, results, run

from sam2train import sweep_claims
from sam2train.errors import UserError
from sam2train.sweep_claims import CLAIMS, claim_trial, is_claimed, record_lock
from sam2train.sweep_trials import LOG

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
    old = time.time() - sweep_claims.STALE - 5
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
    monkeypatch.setattr(sweep_claims, "PATIENCE", 0.1)
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
