"""Local sweeps: trials run, stopped, gone on with, and ranked."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_coco
from rich.console import Console
from small_sweep import COMMAND, EXPERIMENT, ROOT, SEEDS, calls, results, run

from sam2train import cli, sweep_file
from sam2train.errors import UserError
from sam2train.results import load_runs
from sam2train.sweep_file import grid, load_sweep
from sam2train.sweep_search import random_values
from sam2train.sweep_trials import Trial


class TestRunning:
    def test_all_trials_then_nothing_more(self, small, capsys):
        path = small({**SEEDS, "model.num_maskmem": {"values": [1, 7]}})
        assert run(path) == 0
        printed = capsys.readouterr().out
        found = results()
        assert list(found) == ["001", "002", "003", "004", "005", "006"]
        assert {row["state"] for row in found.values()} == {"finished"}
        assert found["005"]["model.num_maskmem"] == "7"
        assert (found["005"]["seed"], found["005"]["val/J_and_F"]) == ("1", "0.41000000000000003")
        assert (found["005"]["baseline/J_and_F"], found["005"]["step"]) == ("0.1", "4")
        first = calls()[0]
        assert first["words"][:3] == ["small.yaml", "--model.num_maskmem=1", "--trainer.seed=0"]
        assert first["words"][3:] == ["--run-dir", "runs/sweeps/small-sweep/001"]
        assert first["env"]["WANDB_MODE"] == "offline"
        assert first["env"]["WANDB_SWEEP_ID"] is None
        assert len({call["env"]["WANDB_RUN_ID"] for call in calls()}) == 6
        assert "0.410 ± 0.025 (3 seeds)" in printed
        assert "+0.000" in printed
        assert run(path) == 0
        assert len(calls()) == 6

    def test_count_is_of_all_sittings_and_a_grid_may_grow(self, small):
        path = small(SEEDS)
        assert run(path, count=1) == 0
        assert [call["trial"] for call in calls()] == ["001"]
        assert run(path, count=2) == 0
        assert [call["trial"] for call in calls()] == ["001", "002"]
        assert run(small({"trainer.seed": {"values": [5, 0, 1]}})) == 0
        assert [row["seed"] for row in results().values()] == ["0", "1", "5"]
        assert len(calls()) == 3

    def test_a_failed_trial_shows_its_log_and_the_others_run(self, small, capsys):
        Path("fail-1").touch()
        path = small(SEEDS)
        assert run(path) == 1
        printed = capsys.readouterr().out
        assert "trial 002 failed; its log runs/sweeps/small-sweep/002/log.txt ends:" in printed
        assert "a rule of the trial was broken" in printed
        assert [row["state"] for row in results().values()] == ["finished", "failed", "finished"]
        assert "0.410 ± " in printed
        Path("fail-1").unlink()
        assert run(path) == 0
        assert [call["trial"] for call in calls()] == ["001", "002", "003", "002"]
        log = Path("runs/sweeps/small-sweep/002/log.txt").read_text()
        assert log.count("$ ") == 2

    def test_a_trial_that_cannot_start_does_not_stop_the_others(self, small, capsys, monkeypatch):
        real = Trial.start

        def start(trial, command, environment, server):
            missing = [command[0], "no-such-program"]
            real(trial, missing if trial.name == "002" else command, environment, server)

        monkeypatch.setattr(Trial, "start", start)
        assert run(small(SEEDS)) == 1
        assert [row["state"] for row in results().values()] == ["finished", "failed", "finished"]
        assert (
            "trial 002 failed: runs/sweeps/small-sweep/002: cannot start" in capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("summary.json", "{torn"),
            ("summary.json", "[1, 2]"),
            ("summary.json", ""),
            ("metrics.jsonl", '{"step": 1}\n{torn\n{"step": 3}\n'),
            ("metrics.jsonl", '[1]\n{"step": 3}\n'),
            ("metrics.jsonl", "\xff\n"),
        ],
    )
    def test_a_broken_file_of_a_trial_is_named_and_the_trial_run_again(
        self, small, capsys, name, content
    ):
        path = small(SEEDS)
        assert run(path, count=2) == 0
        broken = Path("runs/sweeps/small-sweep/001") / name
        broken.write_text(content, encoding="latin-1")
        capsys.readouterr()
        assert run(path) == 0
        assert f"trial 001 failed: {broken.parent}" in capsys.readouterr().out
        assert [call["trial"] for call in calls()] == ["001", "002", "001", "003"]
        assert {row["val/J_and_F"] for row in results().values()} == {
            "0.4",
            "0.41000000000000003",
            "0.42000000000000004",
        }

    def test_a_trial_whose_files_break_while_it_runs(self, small, capsys):
        code = "done += 1\n"
        broken = code + "    if seed == 1: (folder / 'metrics.jsonl').write_text('[]\\n[]\\n')\n"
        program = sweep_file.REPOSITORY / "run.py"
        program.write_text(program.read_text().replace(code, broken))
        assert run(small(SEEDS)) == 1
        assert [row["state"] for row in results().values()] == ["finished", "failed", "finished"]
        assert "trial 002 failed: runs/sweeps/small-sweep/002/metrics.jsonl, line 1" in (
            capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        "last", ["null", "NaN", "Infinity", "-Infinity", '"high"', "[]", "true"]
    )
    def test_a_result_that_is_no_number_is_not_ranked(self, small, capsys, last):
        code = "if slow and done == 2"
        write = (
            "if seed == 2 and done == 4:\n"
            f'        last_row = \'{{"step": 5, "val/J_and_F": {last}}}\'\n'
            '        with (folder / "metrics.jsonl").open("a") as f: f.write(last_row + "\\n")\n'
            '        (folder / "diverged").touch()\n    '
        )
        summary = '(folder / "summary.json").write_text(json.dumps(summary))'
        program = sweep_file.REPOSITORY / "run.py"
        text = program.read_text().replace(code, write + code)
        more = 'if (folder / "diverged").exists(): summary["val/J_and_F"] = None\n    '
        program.write_text(text.replace(summary, more + summary))
        early = {"type": "hyperband", "min_iter": 1}
        assert run(small(SEEDS, early_terminate=early)) == 0
        printed = capsys.readouterr().out
        assert "the last val/J_and_F is no finite number, not ranked: 003" in printed
        assert "0.405 ± " in printed  # the mean of 0.40 and 0.41
        assert results()["003"]["val/J_and_F"] == ""
        assert results()["003"]["state"] == "finished"

    def test_jobs_run_side_by_side_and_share_the_threads(self, small, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        Path("slow").write_text("0.3")  # seconds
        assert run(small(SEEDS), jobs=2, count=2) == 0
        first, second = calls()
        assert {first["env"]["OMP_NUM_THREADS"], second["env"]["OMP_NUM_THREADS"]} == {"3"}
        assert max(first["began"], second["began"]) < min(first["ended"], second["ended"])

    def test_early_stopped_trials_are_not_run_again(self, small, capsys):
        early = {"type": "hyperband", "min_iter": 1, "eta": 2}
        path = small({"trainer.seed": {"values": [2, 1, 0]}}, early_terminate=early)
        assert run(path, count=2) == 0  # at the second step their scores are 0.22 and 0.21
        Path("slow").write_text("30")  # the third waits there, at 0.20
        assert run(path) == 0
        assert [row["state"] for row in results().values()] == ["finished", "finished", "stopped"]
        assert "stopped early, not ranked: 003" in capsys.readouterr().out
        assert run(path) == 0
        assert len(calls()) == 3

    def test_a_target_ends_it(self, small):
        metric = {"name": "val/J_and_F", "goal": "maximize", "target": 0.405}
        assert run(small(SEEDS, metric=metric)) in (0, 1)
        assert [call["trial"] for call in calls()] == ["001", "002"]

    def test_a_sweep_of_the_server_is_joined(self, small, monkeypatch):
        monkeypatch.setenv("WANDB_SWEEP_ID", "team/memory/abc123")
        assert run(small(SEEDS), count=1) == 0
        monkeypatch.delenv("WANDB_SWEEP_ID")
        assert run(small(SEEDS), count=2) == 0
        for call in calls():
            assert call["env"]["WANDB_SWEEP_ID"] == "abc123"
            assert call["env"]["WANDB_PROJECT"] == "memory"

    @pytest.mark.parametrize("method", ["random", "bayes"])
    def test_a_sweep_begun_by_an_earlier_version_goes_on(self, small, method):
        rate = {"loss.dice": {"min": 0.5, "max": 9.0}, "trainer.seed": {"value": 1}}
        early = {"type": "hyperband", "min_iter": 9}
        path = small(rate, method=method, run_cap=3, early_terminate=early)
        # What the version with W&B's engine wrote, which did not know `strict`.
        folder = Path("runs/sweeps/small-sweep")
        (folder / "001").mkdir(parents=True)
        made = load_sweep(path)
        config = {
            "program": "run.py",
            "method": method,
            "metric": {"name": "val/J_and_F", "goal": "maximize", "target": None, "impute": None},
            "early_terminate": {
                "type": "hyperband",
                "min_iter": 9,
                "max_iter": None,
                "s": None,
                "eta": 3.0,
            },
            "command": COMMAND,
            "parameters": rate,
            "extra": [],
        }
        values = {"loss.dice": 4.592279943717701, "trainer.seed": 1}
        row = {"name": "001", "run_id": "0badcafe", "values": values, "state": "finished"}
        known = {
            "sweep": config,
            "experiment": made.experiment(values).model_dump(mode="json"),
            "sweep_id": None,
            "trials": [row],
        }
        (folder / "sweep.json").write_text(json.dumps(known))
        (folder / "001" / "summary.json").write_text('{"status": "finished"}')
        (folder / "001" / "metrics.jsonl").write_text('{"step": 4, "val/J_and_F": 0.7}\n')
        assert run(path) == 0
        assert [call["trial"] for call in calls()] == ["002", "003"]
        assert results()["001"]["val/J_and_F"] == "0.7"
        drawn = [float(row["loss.dice"]) for row in results().values()]
        # With the first, those that W&B's engine, sweeps 0.2.0, draws for a random search.
        assert drawn == [random_values(made.specs, k)["loss.dice"] for k in range(3)]

    @pytest.mark.parametrize(
        "content",
        [
            "{torn",
            "[]",
            "{}",
            '{"trials": [{"name": "../../evil"}], "experiment": {}, "sweep": {}, "sweep_id": null}',
            '{"trials": [{"name": "001", "run_id": "x", "values": {}, "state": "lost"}], '
            '"experiment": {}, "sweep": {}, "sweep_id": null}',
            '{"trials": [], "experiment": [], "sweep": {}, "sweep_id": null}',
        ],
    )
    def test_a_broken_record_is_named(self, small, content):
        path = small(SEEDS)
        assert run(path, count=1) == 0
        Path("runs/sweeps/small-sweep/sweep.json").write_text(content)
        with pytest.raises(UserError, match=r"sweep\.json: .*; move .* away to start again"):
            run(path)

    def test_a_stopped_search_proposes_the_same_again(self, small):
        rate = {"loss.dice": {"min": 0.5, "max": 9.0}, "trainer.seed": {"min": 0, "max": 50}}
        path = small(rate, method="bayes", run_cap=6)
        assert run(path, folder=Path("whole")) == 0
        for count in (2, 5, 6):
            assert run(path, count=count) == 0
        whole, parts = (
            [row["values"] for row in json.loads((folder / "sweep.json").read_text())["trials"]]
            for folder in (Path("whole"), Path("runs/sweeps/small-sweep"))
        )
        assert whole == parts
        specs = load_sweep(path).specs
        assert whole[:4] == [random_values(specs, k) for k in range(4)]
        assert whole[5] != random_values(specs, 5)

    def test_another_sweep_in_the_same_folder(self, small):
        assert run(small(SEEDS), count=1) == 0
        with pytest.raises(UserError, match=r"trial 001 with .* is not in the sweep any more"):
            run(small({"trainer.seed": {"values": [4]}}))
        Path("small.yaml").write_text(EXPERIMENT.replace("num_steps: 4", "num_steps: 5"))
        with pytest.raises(UserError, match=r"trainer.num_steps: 4 there, 5 now"):
            run(small(SEEDS))
        assert run(small(SEEDS), folder=Path("elsewhere"), count=1) == 0

    def test_a_metric_that_nobody_logs(self, small, capsys):
        assert run(small(SEEDS, metric={"name": "val/J_F"}), count=1) == 0
        assert "no trial logged val/J_F" in capsys.readouterr().out

    def test_a_live_table_on_a_terminal(self, small):
        made = load_sweep(small({**SEEDS, "loss.dice": {"values": [1.0, 2.0]}}))
        trials = [
            Trial(
                f"00{k + 1}", "id", values, Path("none"), seed=values["trainer.seed"], num_steps=40
            )
            for k, values in enumerate(grid(made))
        ]
        trials[0].state, trials[0].step, trials[0].seconds = "finished", 40, 100.0
        trials[0].history = [0.5]
        trials[1].state, trials[1].step, trials[1].seconds = "running", 10, 20.0
        console = Console(width=120, file=io.StringIO())
        console.print(sweep_file.live_table(made, trials, 6, 2, rows=4))
        printed = console.file.getvalue()
        # 60 s of the running one and 4 times 100 s, by two at a time.
        assert "1 finished, 1 running of 6; about 0:03:50 left" in printed
        for heading in ("trial", "dice", "seed", "state", "step", "val/J_and_F", "left"):
            assert heading in printed
        row = next(line for line in printed.splitlines() if "002" in line)
        for cell in ("running", "10/40", "0:01:00"):
            assert cell in row
        assert "004" in printed
        assert "005" not in printed


class TestStopping:
    """Another process runs the sweep, to be ended by signals."""

    CODE = """
import sys
from pathlib import Path
from rich.console import Console
from sam2train import sweep, sweep_file, sweep_processes

sweep_processes.PRELOADED = ()
sweep_file.REPOSITORY = Path("program").resolve()
sweep.POLL = sweep.LOOK = 0.02
sys.exit(sweep.run_sweep(Path("small-sweep.yaml"), jobs=2, console=Console(width=200)))
"""

    def start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", self.CODE],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 60
        files = [Path(f"runs/sweeps/small-sweep/00{k}/metrics.jsonl") for k in (1, 2)]
        while not all(path.is_file() and path.read_text().count("\n") == 2 for path in files):
            assert time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        return process

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopped_trials_save_and_go_on(self, small, number):
        path = small(SEEDS)
        Path("slow").write_text("30")
        process = self.start()
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + number
        assert "the same command goes on" in printed
        assert [row["state"] for row in results().values()][:2] == ["interrupted"] * 2
        ids = {call["trial"]: call["env"]["WANDB_RUN_ID"] for call in calls()}
        Path("slow").unlink()
        assert run(path) == 0
        again = [call for call in calls()[2:] if call["trial"] != "003"]
        assert [call["from"] for call in again] == [2, 2]
        assert all(call["words"][-1] == "--resume" for call in again)
        assert {call["trial"]: call["env"]["WANDB_RUN_ID"] for call in again} == ids
        assert {row["state"] for row in results().values()} == {"finished"}

    def test_killed_it_leaves_trials_that_nobody_starts_twice(self, small):
        path = small(SEEDS)
        Path("slow").write_text("2")
        process = self.start()
        process.kill()
        process.communicate()
        # Another sitting runs the third, and waits for those that outlived the first.
        assert run(path) == 0
        assert sorted(call["trial"] for call in calls()) == ["001", "002", "003"]


def test_a_real_trial_through_the_command_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "some-team/some-project/abc123")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    data = make_coco(tmp_path / "data", num_frames=5, size=(64, 64))
    text = EXPERIMENT.replace("train.json", str(data)).replace("val.json", str(data))
    (tmp_path / "small.yaml").write_text(text)
    content = {"method": "grid", "command": COMMAND, "parameters": SEEDS}
    content["metric"] = {"name": "val/J_and_F", "goal": "maximize"}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["real.yaml", "--smoke", "--count", "1", "trainer.device=cpu"]) == 0
    printed = capfd.readouterr().out
    folder = tmp_path / "runs" / "sweeps" / "real-smoke"
    found = load_runs(folder)
    assert found[["sweep", "run", "seed", "status"]].to_numpy().tolist() == [
        ["real-smoke", "001", 0, "finished"]
    ]
    assert f"{found['last'][0]:.3f} (1 seed: no interval)" in printed
    (row,) = (folder / "results.csv").read_text().splitlines()[1:]
    assert row.startswith("001,finished,0,")
    assert f"{found['last'][0]}" in row
    (offline,) = (folder / "001" / "wandb").glob("offline-run-*/*.wandb")
    written = offline.read_bytes()
    for word in (b"abc123", b"some-team", b"some-project"):
        assert word in written
