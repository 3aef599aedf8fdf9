"""Local sweeps: the trials of W&B's engine and agent, run, stopped, gone on with, and ranked."""

import io
import itertools
import json
import math
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

from sam2train import cli, sweep, sweep_file, sweep_report, sweep_search, sweep_trials
from sam2train.config import flatten, parse_overrides, sweep_parameters
from sam2train.errors import UserError
from sam2train.results import load_runs
from sam2train.sweep_file import check_values, grid, load_sweep
from sam2train.sweep_trials import Trial

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
EXPERIMENT = """\
dataset: {data_path: train.json, val_path: val.json, image_size: [64, 64], video_clip_length: 3}
model: {config_path: sam2train/configs/sam2.1_hiera_demo.yaml, image_size: 64}
trainer: {num_steps: 4}
"""
COMMAND = ["${env}", "${interpreter}", "${program}", "small.yaml", "${args}"]

# Stands in for run.py: a trial of 4 steps that saves each, as told by the files beside it.
TRIAL = """
import json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
folder = Path(words[words.index("--run-dir") + 1])
last = folder / "checkpoints" / "last.pt"
done = int(last.read_text()) if "--resume" in words else 0
last.parent.mkdir(parents=True, exist_ok=True)
names = ("OMP_NUM_THREADS", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_PROJECT", "WANDB_MODE")
call = {"words": words, "from": done, "env": {n: os.environ.get(n) for n in names}}
call["began"] = time.time()
seed = int(dict(w.removeprefix("--").split("=", 1) for w in words if "=" in w)["trainer.seed"])

def end(status, code):
    summary = {"status": status, "baseline/J_and_F": 0.1, "seconds": 1.0 * done}
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder.parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps({**call, "ended": time.time(), "trial": folder.name}) + "\\n")
    sys.exit(code)

def stop(number, _):
    last.write_text(str(done))
    end("interrupted", 128 + number)

signal.signal(signal.SIGTERM, stop)
if Path(f"fail-{seed}").exists():
    print("a rule of the trial was broken")
    end("failed", 1)
while done < 4:
    done += 1
    row = {"step": done, "seconds": 1.0 * done, "val/J_and_F": 0.1 * done + 0.01 * seed}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")
    if Path("slow").exists() and done == 2:
        time.sleep(float(Path("slow").read_text()))
end("finished", 0)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Writes small-sweep.yaml in a folder with small.yaml; its trials are the stand-in's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    program = tmp_path / "program"
    program.mkdir()
    (program / "run.py").write_text(TRIAL)
    monkeypatch.setattr(sweep_file, "REPOSITORY", program)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.setattr(sweep, "LOOK", 0.02)

    def write(parameters, **settings) -> Path:
        content = {"program": "run.py", "method": "grid", "command": COMMAND}
        content |= {"metric": {"name": "val/J_and_F", "goal": "maximize"}}
        path = tmp_path / "small-sweep.yaml"
        content |= {**settings, "parameters": parameters}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


SEEDS = {"trainer.seed": {"values": [0, 1, 2]}}


def run(path, **options) -> int:
    return sweep.run_sweep(path, console=Console(width=200), **options)


def calls() -> list[dict]:
    lines = Path("runs/sweeps/small-sweep/calls.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def results() -> dict[str, dict[str, str]]:
    """trial -> column -> cell of results.csv."""
    import pandas as pd

    frame = pd.read_csv("runs/sweeps/small-sweep/results.csv", dtype=str, keep_default_na=False)
    return frame.set_index("trial").to_dict("index")


def problems(write, parameters, **settings) -> str:
    """The message with which a sweep is refused, before anything is run."""
    path = write(parameters, **settings)
    with pytest.raises(UserError) as caught:
        run(path)
    assert not Path("runs").exists()
    assert "small-sweep.yaml" in str(caught.value)
    return str(caught.value)


class TestTrials:
    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_the_files_here_say_what_they_ask(self, path):
        made = load_sweep(path)
        values = grid(made) if made.config.method == "grid" else sweep_search.examples(made)
        assert len(check_values(made, values)) == len(values)
        assert (made.config.metric.name, made.config.metric.goal) == ("val/J_and_F", "maximize")
        assert made.config.name == path.stem
        header = path.read_text().split("name:")[0]
        for part in ("?", f"python run.py sweeps/{path.name}", "wandb agent", "minutes", "trials"):
            assert part in header

    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_the_words_of_wandb_agent(self, path):
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

        made = load_sweep(path)
        for values in grid(made) if made.config.method == "grid" else sweep_search.examples(made):
            given = {name: {"value": v} for name, v in made.arguments(values).items()}
            theirs = []
            parts = create_sweep_command_args({"args": given}) | {"env": [], "program": ["PROGRAM"]}
            for item in create_sweep_command(list(made.config.command)):
                theirs += parts.get(item[2:-1], [item]) if item[:2] == "${" else [item]
            ours = made.command(values)
            assert ours[0] == sys.executable
            assert Path(ours[1]) == ROOT / "run.py"
            assert ours[2:] == theirs[2:]

    @pytest.mark.parametrize(
        "parameters",
        [
            {"trainer.seed": {"values": [2, 0, 1]}, "loss.dice": {"values": [1, 1.0, 1, 2.5]}},
            {"model.num_maskmem": {"min": 1, "max": 3}, "bf": {"value": None}},
            {"x": {"distribution": "q_uniform", "min": 0.0, "max": 2.0, "q": 0.5}},
            {"types": {"values": [["point"], ["point", "bbox"]]}, "b": {"values": [True, None]}},
        ],
    )
    def test_the_grid_of_wandbs_engine(self, small, parameters):
        made = load_sweep(small(parameters))
        theirs, runs = [], []
        with sweep_search._engine(0, 0) as engine:
            config = {"method": "grid", "parameters": parameters}
            while (drawn := engine.next_run(config, runs)) is not None:
                runs.append(drawn)
                theirs.append({name: cell["value"] for name, cell in drawn.config.items()})
        ours = grid(made)
        assert list(map(repr, ours)) == list(map(repr, theirs))

    def test_the_ablations_in_numbers(self):
        prompts, memory = (
            load_sweep(ROOT / "sweeps" / f"{n}.yaml") for n in ("prompts", "num_maskmem")
        )
        sets = (["point"], ["bbox"], ["mask"], ["point", "bbox"], ["point", "bbox", "mask"])
        expected = [
            {"dataset.prompt_types": types, "trainer.seed": seed}
            for types, seed in itertools.product(sets, range(5))
        ]
        assert grid(prompts) == expected
        cells = {
            (v["model.num_maskmem"], v["model.max_obj_ptrs_in_encoder"], v["trainer.seed"])
            for v in grid(memory)
        }
        assert cells == {*itertools.product((0, 1, 2, 4, 7), (0, 16), range(3))}
        assert len(grid(memory)) == 30

    def test_nested_and_dotted_names_are_one_setting(self, small):
        nested = {"model": {"parameters": {"num_maskmem": {"values": [2, 4]}}}}
        inner = load_sweep(small({**nested, **SEEDS}))
        assert [v["model.num_maskmem"] for v in grid(inner)] == [2, 2, 2, 4, 4, 4]
        last = grid(inner)[-1]
        assert inner.command(last)[3:] == ["--model={'num_maskmem': 4}", "--trainer.seed=2"]
        assert inner.experiment(last).model.num_maskmem == 4
        both = {**nested, "model.num_maskmem": {"values": [1]}}
        assert "is there twice" in problems(small, both)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("optimizer.learning_rate", [1e-05, 0.001, 3]),
            ("trainer.bf16", [None, True, False]),
            ("trainer.seed", [0, 7]),
            ("model.memory_gradient", ["full", "detached", 2]),
            ("dataset.prompt_types", [["point"], ["point", "mask"]]),
            ("model.checkpoint_path", [None, "a b/it's.pt", "007", "yes", "null", "[x"]),
            ("optimizer.learning_rates", [{"mask_decoder": 1e-05}, {}]),
            ("tracking.tags", [["007", "yes"], []]),
        ],
    )
    def test_values_of_every_type_arrive(self, small, tmp_path, name, values):
        made = load_sweep(small({name: {"values": values}}))
        experiments = check_values(made, grid(made))
        for trial_values, experiment in zip(grid(made), experiments, strict=True):
            trial = Trial("001", "id", trial_values, tmp_path / "001")
            trial.write_values(made.arguments(trial_values))
            # As `launch` does it: words first, then the typed values of the file.
            overrides = parse_overrides(made.command(trial_values)[3:])
            overrides |= sweep_parameters(tmp_path / "001" / sweep_trials.VALUES)
            given = flatten(trial_values)
            assert {key: overrides[key] for key in given} == given
            assert list(map(type, map(overrides.get, given))) == list(map(type, given.values()))
            assert sweep_file.load_experiment(tmp_path / "small.yaml", overrides) == experiment

    def test_macros_of_the_command(self, small, monkeypatch):
        monkeypatch.setenv("STEPS", "7")
        command = [*COMMAND[1:4], "trainer.num_steps=${envvar:STEPS}", "${args_no_hyphens}"]
        made = load_sweep(small(SEEDS, command=command), ["trainer.log_every=3"])
        words = made.command({"trainer.seed": 1})[2:]
        expected = ["small.yaml", "trainer.num_steps=7", "trainer.seed=1", "trainer.log_every=3"]
        assert words == expected
        settings = made.experiment({"trainer.seed": 1}).trainer
        assert (settings.num_steps, settings.seed, settings.log_every) == (7, 1, 3)


class TestMistakes:
    def test_unknown_names_and_values_out_of_range_all_at_once(self, small):
        parameters = {
            "model.num_maskmen": {"values": [1]},
            "trainer.seed": {"values": [0, -1, "one"]},
            "dataset.prompt_types": {"values": [["point"], ["pointe"]]},
        }
        message = problems(small, parameters)
        assert "model.num_maskmen: unknown key" in message
        assert "`model.num_maskmem`" in message
        assert "trainer.seed: got -1; expected a whole number of at least 0" in message
        assert 'trainer.seed: got "one"' in message
        assert "did you mean point?" in message
        assert "4 problems" in message

    def test_settings_that_do_not_go_together(self, small):
        message = problems(small, {"model.image_size": {"values": [64, 128]}})
        assert "set dataset.image_size to [128, 128]" in message

    @pytest.mark.parametrize(
        ("written", "cure"),
        [("1e-4", "write 0.0001"), ("1e-5", "write 1.0e-05"), ("3e2", "write 300.0")],
    )
    def test_a_number_that_is_text_to_wandb(self, small, written, cure):
        path = small({"optimizer.learning_rate": {"values": [0.5]}})
        path.write_text(path.read_text().replace("0.5", written))
        with pytest.raises(UserError) as caught:
            load_sweep(path)
        assert f"the text {written}; {cure}" in str(caught.value)
        assert "parameters.optimizer.learning_rate.values[0]" in str(caught.value)
        path.write_text(path.read_text().replace(written, cure.removeprefix("write ")))
        assert grid(load_sweep(path)) == [{"optimizer.learning_rate": float(written)}]

    def test_a_number_in_quotes(self, small):
        path = small({"optimizer.learning_rate": {"values": ["word", 0.5]}})
        path.write_text(path.read_text().replace("word", "'1e-4'"))
        with pytest.raises(UserError, match=r"'1e-4' is text; .*: write 0\.0001"):
            run(path)

    def test_a_switch_has_its_own_cure(self, small):
        path = small({"dataset.shuffle": {"values": ["word"]}})
        path.write_text(path.read_text().replace("word", "yes"))
        with pytest.raises(UserError, match="write 'yes', or true where a switch is meant"):
            load_sweep(path)

    def test_smoke_is_known_to_the_sweep(self, small):
        sweep = load_sweep(small({"trainer.seed": {"values": [0]}}), ["--smoke"])
        assert sweep.experiment({"trainer.seed": 0}).trainer.num_steps == 2

    @pytest.mark.parametrize("written", ["on", "010", "2020-01-01", "1_000", "12:30"])
    def test_what_wandb_reads_differently(self, small, written):
        path = small({"tracking.name": {"values": ["word"]}})
        path.write_text(path.read_text().replace("word", written))
        with pytest.raises(UserError, match=f"write '{written}'"):
            load_sweep(path)
        path.write_text(path.read_text().replace(written, f"'{written}'"))
        assert grid(load_sweep(path)) == [{"tracking.name": written}]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"command": COMMAND[:4]}, "no ${args}"),
            ({"command": [*COMMAND[:3], "${args}"]}, "no experiment"),
            ({"command": [*COMMAND, "${args_json}"]}, "${args_json} is not known here"),
            ({"program": "train.py"}, "got train.py; expected run.py"),
            ({"method": "girds"}, "did you mean grid?"),
            ({"metrics": {}}, "did you mean `metric`?"),
            ({"early_terminate": {"type": "hyperband"}}, "needs min_iter"),
        ],
    )
    def test_of_the_file(self, small, change, expected):
        assert expected in problems(small, SEEDS, **change)

    def test_a_grid_has_ends(self, small):
        message = problems(small, {"optimizer.learning_rate": {"min": 0.1, "max": 0.5}})
        assert "set method: random" in message

    def test_random_search_has_none(self, small):
        message = problems(small, {"loss.dice": {"min": 0.1, "max": 0.5}}, method="random")
        assert "--count N" in message

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ({"min": 0.1, "max": 3.5, "distribution": "uniform"}, "trainer.seed: got 0.1"),
            ({"min": -3, "max": 3}, "trainer.seed: got -3"),
            ({"values": [1, -1]}, "trainer.seed: got -1"),
            ({"least": 1, "most": 3}, "parameters.trainer.seed: W&B does not take"),
            ({"min": 4, "max": 3}, "parameters.trainer.seed: W&B does not take"),
        ],
    )
    def test_ranges_that_are_drawn_from(self, small, spec, expected):
        assert expected in problems(small, {"trainer.seed": spec}, method="random", run_cap=2)

    def test_without_the_engine(self, small, monkeypatch):
        monkeypatch.setitem(sys.modules, "sweeps", None)
        with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
            run(small({"loss.dice": {"min": 0.1, "max": 0.5}}, method="random", run_cap=2))

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--jobs", "0"], "--jobs: 0: expected a whole number of at least 1"),
            (["--count", "many"], "--count: many"),
            (["--resume"], "--resume belongs to training and does not go with a sweep"),
            (["trainer.seed=1"], "trainer.seed is varied by the sweep"),
        ],
    )
    def test_of_the_command_line(self, small, capsys, words, expected):
        assert cli.main([str(small(SEEDS)), *words]) == 2
        assert expected in capsys.readouterr().err
        assert cli.main(["small.yaml", "--count", "2"]) == 2
        assert "--count belongs to a sweep" in capsys.readouterr().err


class TestSearch:
    RATES = {  # noqa: RUF012
        "optimizer.learning_rate": {
            "distribution": "log_uniform_values",
            "min": 1e-5,
            "max": 1e-2,
        },
        "optimizer.warmup_steps": {"min": 0, "max": 9},
        "trainer.seed": {"value": 3},
    }

    def draw(self, made, num):
        trials = []
        for index in range(num):
            values = sweep_search.next_values(made, trials)
            # Best at a rate of 1e-3.
            score = 1 - abs(math.log10(values["optimizer.learning_rate"]) + 3) / 4
            trials.append(Trial(f"{index:03d}", "id", values, Path("none"), state="finished"))
            trials[-1].history = [0.0, score]
        return [trial.values for trial in trials], [trial.score for trial in trials]

    @pytest.mark.parametrize("method", ["random", "bayes"])
    def test_draws_are_in_range_and_the_same_again(self, small, method):
        made = load_sweep(small(self.RATES, method=method))
        drawn, _ = self.draw(made, 5)
        assert drawn == self.draw(made, 5)[0]
        assert len({values["optimizer.learning_rate"] for values in drawn}) == 5
        for values in drawn:
            assert 1e-5 <= values["optimizer.learning_rate"] <= 1e-2
            assert 0 <= values["optimizer.warmup_steps"] <= 9
            assert values["trainer.seed"] == 3
            assert type(values["optimizer.learning_rate"]) is float
            assert type(values["optimizer.warmup_steps"]) is int

    def test_bayes_learns_from_the_trials(self, small):
        made = load_sweep(small(self.RATES, method="bayes"))
        _, scores = self.draw(made, 12)
        assert max(scores) > 0.97  # 12 random ones reach that one time in four
        made = load_sweep(small(self.RATES, method="random"))
        assert max(scores) > max(self.draw(made, 12)[1])

    def test_hyperband_stops_the_lower_half(self, small):
        made = load_sweep(
            small(SEEDS, early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
        )
        curves = {"001": [0.1, 0.5, 0.6], "002": [0.1, 0.2], "003": [0.1], "004": [0.1, 0.55]}
        trials = [
            Trial(name, "id", {"trainer.seed": 0}, Path("none"), state="running", history=curve)
            for name, curve in curves.items()
        ]
        trials[0].state = "finished"
        assert [trial.name for trial in sweep_search.trials_to_stop(made, trials)] == ["002"]

    def test_other_random_numbers_are_left_alone(self, small):
        import random

        import numpy as np

        made = load_sweep(small(self.RATES, method="random"))
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        expected = random.random(), np.random.rand()  # noqa: NPY002
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        sweep_search.next_values(made, [])
        assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


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
        console.print(sweep_report.live_table(made, trials, 6, 2, rows=4))
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
from sam2train import sweep, sweep_file, sweep_trials

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
        printed, _ = process.communicate(timeout=30)
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
        with pytest.raises(UserError, match="running already, or one of its trials still is"):
            run(path)
        deadline = time.monotonic() + 30
        while len(calls_so_far()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        Path("slow").unlink()
        time.sleep(0.2)
        assert run(path) == 0
        assert sorted(call["trial"] for call in calls()) == ["001", "002", "003"]


def calls_so_far() -> list[dict]:
    return calls() if Path("runs/sweeps/small-sweep/calls.jsonl").is_file() else []


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
