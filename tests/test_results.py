"""Runs on disk and in W&B -> one table: resumed, stopped, killed, broken and swept ones."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from sam2train import results
from sam2train.config import apply_overrides
from sam2train.errors import UserError
from sam2train.results import find_runs, load_curves, load_metrics, load_runs, load_scores

CONFIG = {
    "dataset": {"prompt_types": ["point", "bbox"], "image_size": [64, 64], "num_workers": 0},
    "model": {"num_maskmem": 7, "max_obj_ptrs_in_encoder": 16},
    "trainer": {"num_steps": 20, "seed": 0},
    "tracking": {"name": None},
}


def make_run(
    folder: Path,
    curve=((0, 0.25), (10, 0.5), (20, 0.375)),
    *,
    status: str = "finished",
    settings: dict | None = None,
    num_videos: int = 6,
    gains=None,
) -> Path:
    """A run folder as the trainer leaves it, with one object a video in `scores.csv`.

    Args:
        curve: (step, J&F) of each validation.
        settings: dotted key -> value, over CONFIG.
        num_videos: in `scores.csv`; 0 writes none.
        gains: (num_videos,) what each video has above the mean of the curve, from the second on.
    """
    folder.mkdir(parents=True)
    config = apply_overrides(CONFIG, settings or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text('{"device": "cpu", "code": {"commit": "c0ffee"}}')
    lines, scores = [], ["step,split,model,video_id,object_id,J,F,J_and_F,num_frames"]
    for step, value in curve:
        if step:
            lines.append({"step": step, "loss": 1.0 / step, "seconds": float(step)})
        names = {"val/J": value - 0.0625, "val/F": value + 0.0625, "val/J_and_F": value}
        lines.append({"step": step, **names, "val/num_objects": num_videos})
        for v in range(num_videos):
            score = value + (gains[v] if gains is not None and step else 0)
            scores.append(f"{step},val,trained,{v:03d},1,{score},{score},{score},9")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if num_videos:
        (folder / "scores.csv").write_text("\n".join(scores) + "\n")
    summary = {"params/total": 100, "params/trainable": 40, "params/memory_encoder": 40}
    summary |= {"status": status, "steps": curve[-1][0] if status == "finished" else 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_seeds_in_the_table(tmp_path):
    """Runs of several trainer.seed are a group; the other seeds are settings, named in full."""
    changes = {
        "a": {"evaluation.seed": 0},
        "b": {"evaluation.seed": 0, "trainer.seed": 1},
        "c": {"evaluation.seed": 3, "trainer.seed": 1},
        "d": {"evaluation.seed": None, "trainer.seed": 1},
        "old": {"trainer.seed": 1},
        "older": {"trainer.seed": 2},
        "data": {"evaluation.seed": 0, "dataset.seed": 4},
    }
    for name, settings in changes.items():
        make_run(tmp_path / "runs" / "small" / name, settings=settings)
    runs = load_runs(tmp_path / "runs").set_index("run")
    assert runs["seed"].to_dict() == {
        "a": 0, "b": 1, "c": 1, "d": 1, "old": 1, "older": 2, "data": 0,
    }  # fmt: skip
    assert runs["evaluation_seed"].to_dict() == {
        "a": 0, "b": 0, "c": 3, "d": 1, "old": 1, "older": 2, "data": 0,
    }  # fmt: skip
    groups = runs["group"]
    assert groups["a"] == groups["b"]
    assert groups["old"] == groups["older"]
    assert groups[["a", "c", "d", "old", "data"]].nunique() == 5
    for name in ("d", "old", "older", "data"):
        shutil.rmtree(tmp_path / "runs" / "small" / name)
    told = results.labels(load_runs(tmp_path / "runs")).tolist()
    assert told == ["evaluation.seed=0", "evaluation.seed=0", "evaluation.seed=3"]


def make_old(run: Path, seconds: float) -> None:
    for path in [run, *run.rglob("*")]:
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_run_is_one_row(tmp_path):
    make_run(tmp_path / "runs" / "small" / "first")
    (row,) = load_runs(tmp_path / "runs").to_dict("records")
    assert (row["source"], row["experiment"], row["run"]) == ("disk", "small", "first")
    assert (row["status"], row["seed"], row["sweep"], row["problem"]) == ("finished", 0, None, None)
    assert (row["step"], row["num_steps"], row["seconds"]) == (20, 20, 20.0)
    assert (row["baseline"], row["best"], row["last"]) == (0.25, 0.5, 0.375)
    assert (row["gain"], row["scored"]) == (0.125, 20)
    assert (row["params/trainable"], row["params/memory_encoder"]) == (40, 40)
    assert (row["commit"], row["device"]) == ("c0ffee", "cpu")
    assert row["dataset.prompt_types"] == "point+bbox"
    assert row["dataset.image_size"] == "[64, 64]"
    assert row["model.num_maskmem"] == 7


def test_a_run_folder_itself_can_be_loaded(tmp_path):
    run = make_run(tmp_path / "elsewhere")
    assert list(load_runs(run)["path"]) == [str(run)]


def test_runs_inside_runs_and_hidden_folders_are_not_searched(tmp_path):
    run = make_run(tmp_path / "a" / "1")
    make_run(run / "wandb" / "files")
    make_run(tmp_path / ".trash" / "2")
    make_run(tmp_path / "a" / "evaluations" / "3")
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / "a" / "notes" / "config.yaml").write_text("{}")  # a config alone is no run
    assert find_runs(tmp_path) == [run]


@pytest.mark.parametrize("make", [False, True])
def test_no_folder_and_no_run(tmp_path, make):
    folder = tmp_path / "runs"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match="no run in it" if make else "no such folder") as caught:
        load_runs(folder)
    assert str(folder) in str(caught.value)


class TestStatus:
    def test_what_the_run_said_is_kept(self, tmp_path):
        for status in ("interrupted", "failed"):
            make_run(tmp_path / status, status=status)
        assert list(load_runs(tmp_path)["status"]) == ["failed", "interrupted"]

    def test_silence_is_a_crash(self, tmp_path):
        run = make_run(tmp_path / "run", status="running")
        assert load_runs(run)["status"][0] == "running"
        make_old(run, results.QUIET + 60)
        assert load_runs(run)["status"][0] == "crashed"

    def test_a_run_with_long_validations_may_be_silent_for_long(self, tmp_path):
        run = make_run(tmp_path / "run", status="running")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 21, "seconds": 3000.0}\n')
        make_old(run, 3600)
        assert load_runs(run)["status"][0] == "running"
        make_old(run, 3 * 3000 + 60)
        assert load_runs(run)["status"][0] == "crashed"

    def test_a_killed_run_has_its_numbers_from_the_metrics(self, tmp_path):
        run = make_run(tmp_path / "run", status="running")  # its summary says 0 steps
        row = load_runs(run).iloc[0]
        assert (row["step"], row["last"], row["seconds"]) == (20, 0.375, 20.0)

    def test_a_run_before_its_first_line(self, tmp_path):
        run = make_run(tmp_path / "run")
        for name in ("metrics.jsonl", "summary.json"):
            (run / name).unlink()
        row = load_runs(run).iloc[0]
        assert (row["status"], row["step"]) == ("running", 0)
        assert math.isnan(row["baseline"])
        assert load_curves(load_runs(run)).empty

    def test_a_run_without_its_settings_is_named_and_hides_no_other_run(self, tmp_path):
        make_run(tmp_path / "good")
        run = make_run(tmp_path / "bad")
        (run / "config.yaml").write_text('{"a": ')
        bad, good = load_runs(tmp_path).to_dict("records")
        assert bad["status"] == "unreadable"
        assert str(run / "config.yaml") in bad["problem"]
        assert good["status"] == "finished"
        assert set(load_curves(load_runs(tmp_path))["run"]) == {"good"}

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("summary.json", '{"a": ', "not valid JSON"),
            ("summary.json", "[]", "not an object"),
            ("summary.json", "\xff", "not UTF-8"),
            ("summary.json", '{"status": 7, "steps": "x"}', "status is 7; steps is 'x'"),
            ("summary.json", '{"seconds": {}, "best/J_and_F": []}', "seconds is {}"),
            ("summary.json", '{"steps": 1' + "0" * 400 + "}", "steps is a number beyond 2**53"),
            ("summary.json", '{"seconds": 1e300}', "seconds is 1e+300"),
            ("metrics.jsonl", 'ROWS{"step": 20, "seconds": -1}\n', "seconds is -1"),
            ("environment.json", '{"a": ', "not valid JSON"),
            ("environment.json", '{"code": 1.5}', "`code` and `device`"),
            ("metrics.jsonl", '{"loss": 1}\nROWS', "line 1 is no row"),
            ("metrics.jsonl", "3\nROWS", "line 1 is no row"),
            ("metrics.jsonl", '{"step": 0}\n{"st\nROWS', "line 2 is no row"),
            ("metrics.jsonl", 'ROWS{"step": 20, "loss": "x", "lr": {}}\n', "loss is 'x'"),
            ("metrics.jsonl", "\xff\xfe\nROWS", "line 1 is no row"),
            ("metrics.jsonl", 'ROWS{"step": 1' + "0" * 400 + "}\n", "is no row"),
        ],
    )
    def test_an_odd_file_is_named_and_the_rest_is_read(self, tmp_path, capsys, name, text, said):
        make_run(tmp_path / "good")
        run = make_run(tmp_path / "odd")
        text = text.replace("ROWS", (run / "metrics.jsonl").read_text())
        (run / name).write_text(text, encoding="latin-1")
        runs = load_runs(tmp_path)
        good, odd = runs.to_dict("records")
        assert str(run / name) in odd["problem"]
        assert said in odd["problem"]
        assert good["problem"] != good["problem"]  # NaN
        for key in ("last", "best", "step", "num_steps"):
            assert odd[key] == good[key]
        assert set(load_curves(runs)["run"]) == {"good", "odd"}
        assert "odd" in capsys.readouterr().out or name != "metrics.jsonl"
        assert len(results.overview(runs)) == 2

    @pytest.mark.parametrize("key", ["trainer.seed", "trainer.num_steps", "evaluation.seed"])
    @pytest.mark.parametrize("value", ["x", 10**30, [1], 1.5])
    def test_settings_that_are_no_numbers(self, tmp_path, key, value):
        make_run(tmp_path / "odd", settings={key: value})
        (row,) = load_runs(tmp_path).to_dict("records")
        assert row["status"] == "unreadable"
        assert f"{key} is " in row["problem"]

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("metrics.jsonl", '{"loss": 1}\n', "line 1 is no row with a `step`"),
            ("metrics.jsonl", "3\n", "line 1 is no row"),
        ],
    )
    def test_files_of_another_kind(self, tmp_path, name, text, said):
        run = make_run(tmp_path / "bad")
        (run / name).write_text(text)
        runs = load_runs(tmp_path)
        assert said in runs["problem"].iloc[0]
        # Nothing but this run, and still all columns.
        assert runs["last"].isna().all()
        assert len(results.overview(runs)) == 1

    def test_a_summary_without_its_numbers(self, tmp_path):
        run = make_run(tmp_path / "run")
        (run / "summary.json").write_text('{"steps": null, "seconds": null, "status": "finished"}')
        assert load_runs(tmp_path)["step"].tolist() == [20]


class TestGroups:
    def test_seeds_form_a_group(self, tmp_path):
        for seed in range(2):
            make_run(tmp_path / f"seed{seed}", settings={"trainer.seed": seed})
        make_run(
            tmp_path / "workers", settings={"dataset.num_workers": 4, "tracking.name": "other"}
        )
        make_run(tmp_path / "z", settings={"model.num_maskmem": 4})
        runs = load_runs(tmp_path)
        assert runs["group"].nunique() == 2
        assert (runs["group"] == runs["group"][0]).tolist() == [True, True, True, False]
        assert results.varied(runs) == ["model.num_maskmem"]

    def test_a_run_that_cannot_be_read_differs_in_nothing(self, tmp_path):
        make_run(tmp_path / "good")
        (make_run(tmp_path / "bad") / "config.yaml").write_text("")
        assert results.varied(load_runs(tmp_path)) == []

    def test_an_absent_setting_is_a_difference(self, tmp_path):
        make_run(tmp_path / "new", settings={"model.memory_gradient": "full"})
        make_run(tmp_path / "old")
        assert results.varied(load_runs(tmp_path)) == ["model.memory_gradient"]

    def test_sweeps_are_recognised(self, tmp_path):
        make_run(tmp_path / "sweeps" / "prompts" / "t1")
        make_run(tmp_path / "other" / "t2")
        (tmp_path / "other" / "results.csv").write_text("trial\n")
        make_run(tmp_path / "plain" / "t3")
        runs = load_runs(tmp_path).set_index("run")
        assert runs["sweep"].fillna("").to_dict() == {"t1": "prompts", "t2": "other", "t3": ""}

    def test_over_seeds_by_hand(self, tmp_path):
        frame = pd.DataFrame(
            {
                "m": [7, 7, 7, 7, 0],
                "seed": [0, 1, 1, 2, 0],  # seed 1 was run twice, and counts once
                "last": [0.1, 0.2, 0.4, math.nan, 0.5],
            }
        )
        zero, seven = results.over_seeds(frame, ["m"]).to_dict("records")
        assert (zero["m"], zero["mean"], zero["num"]) == (0, 0.5, 1)
        assert zero["text"] == "0.500 (1 seed: no interval)"
        assert (seven["mean"], seven["num"]) == (pytest.approx(0.2), 2)
        # Standard deviation sqrt(0.02), of two: 12.706 x 0.1.
        assert seven["high"] == pytest.approx(0.2 + 1.2706, abs=1e-3)


class TestTables:
    def test_labels_are_what_was_varied(self, tmp_path):
        make_run(tmp_path / "x" / "a", settings={"model.num_maskmem": 1, "loss.dice": 2})
        make_run(tmp_path / "x" / "b", settings={"model.num_maskmem": 7, "loss.dice": 2})
        runs = load_runs(tmp_path)
        assert results.labels(runs).tolist() == ["num_maskmem=1", "num_maskmem=7"]
        assert results.labels(runs[:1]).tolist() == ["x"]

    def test_overview_is_sorted_and_takes_broken_runs(self, tmp_path):
        make_run(tmp_path / "low", [(0, 0.25), (10, 0.3)])
        make_run(tmp_path / "high", [(0, 0.25), (10, 0.5)], settings={"model.num_maskmem": 1})
        (make_run(tmp_path / "broken") / "config.yaml").write_text("")
        table = results.overview(load_runs(tmp_path))
        assert table["run"].tolist() == ["high", "low", "broken"]
        assert table["step"].tolist()[:2] == [10, 10]
        assert table["model.num_maskmem"].tolist()[:2] == [1, 7]
        assert table["written"].str.startswith("20").tolist()[:2] == [True, True]

    def test_newest_is_an_experiment_or_a_sweep(self, tmp_path):
        old = make_run(tmp_path / "first" / "1")
        make_run(tmp_path / "sweeps" / "second" / "2")
        make_run(tmp_path / "sweeps" / "second" / "3")
        make_old(old, 60)
        assert results.newest(load_runs(tmp_path))["run"].tolist() == ["2", "3"]

    def test_failures_say_what_to_do(self, tmp_path):
        for status in ("finished", "interrupted", "failed"):
            make_run(tmp_path / status, status=status)
        broken = make_run(tmp_path / "broken")
        (broken / "config.yaml").write_text("")
        table = results.failures(load_runs(tmp_path))
        assert table["status"].tolist() == ["unreadable", "failed", "interrupted"]
        assert str(broken) in table["what"][0]
        assert "--resume" in table["what"][2]

    def test_overlays_are_found_by_step_and_video(self, tmp_path):
        (tmp_path / "overlays").mkdir()
        for name in ("step_000100_video_a.png", "step_000000_video_a.png", "other.png"):
            (tmp_path / "overlays" / name).touch()
        found = results.overlay_files(tmp_path)
        assert found[["step", "video"]].values.tolist() == [[0, "video_a"], [100, "video_a"]]
        assert results.overlay_files(tmp_path / "nowhere").empty

    def test_the_state_of_things_in_words(self, tmp_path):
        make_run(tmp_path / "x" / "a", [(0, 0.25), (10, 0.5)])
        make_run(tmp_path / "x" / "b", status="failed")
        text = results.status_text(load_runs(tmp_path))
        assert "2 runs: 1 finished, 1 failed." in text
        assert "is 0.500, of x/a." in text
        (tmp_path / "x" / "a" / "metrics.jsonl").write_text("")
        assert results.status_text(load_runs(tmp_path / "x" / "a")) == "1 run: 1 finished."

    def test_overlays_to_compare_show_one_video(self, tmp_path):
        for name, last, videos in (("low", 0.3, "ab"), ("high", 0.5, "bc"), ("none", 0.6, "")):
            run = make_run(tmp_path / name, [(0, 0.25), (10, last)])
            (run / "overlays").mkdir()
            for video in videos:
                for step in (0, 5, 10):
                    (run / "overlays" / f"step_{step:06d}_video_{video}.png").touch()
        chosen = results.overlays_to_compare(load_runs(tmp_path))
        assert list(chosen) == ["high, step 0", "high, step 10", "low, step 10"]
        assert {path[-5:] for path in chosen.values()} == {"b.png"}
        assert results.overlays_to_compare(load_runs(tmp_path / "none")) == {}


class TestMetrics:
    def test_segments_of_a_resumed_run_are_joined(self, tmp_path):
        run = make_run(tmp_path / "run", curve=[(0, 0.5)])
        rows = [
            {"step": 10, "loss": 4.0, "lr": 0.1},
            {"step": 20, "loss": 3.0},
            {"step": 20, "val/J_and_F": 0.9},
            {"step": 30, "loss": 2.0},
            {"step": 20, "loss": 1.0},  # resumed at step 10
            {"step": 40, "loss": None},  # was NaN
        ]
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        metrics = load_metrics(run)
        assert list(metrics.index) == [0, 10, 20, 40]
        assert metrics["loss"].tolist()[1:3] == [4.0, 1.0]
        assert metrics.loc[10, "lr"] == 0.1
        assert math.isnan(metrics.loc[20, "val/J_and_F"])  # to be validated again
        assert math.isnan(metrics.loc[40, "loss"])
        assert metrics.dtypes.unique() == ["float64"]

    def test_a_last_line_cut_off_is_left_out(self, tmp_path):
        run = make_run(tmp_path / "run")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "lo')
        assert load_metrics(run).index.max() == 20

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
        run = make_run(tmp_path / "run")
        path = run / "metrics.jsonl"
        path.write_text('{"step": 0}\n{"st\n' + path.read_text())
        said = []
        assert load_metrics(run, said.append).index.max() == 20
        assert said == [f"{path}, line 2 is no row with a `step`: not as a run writes it, left out"]

    def test_curves_are_long_and_know_their_run(self, tmp_path):
        make_run(tmp_path / "a", curve=[(0, 0.25), (5, 0.5)], settings={"trainer.seed": 3})
        make_run(tmp_path / "b", curve=[(0, 0.125)])
        curves = load_curves(load_runs(tmp_path))
        assert curves[["run", "seed", "step", "value"]].values.tolist() == [
            ["a", 3, 0, 0.25],
            ["a", 3, 5, 0.5],
            ["b", 0, 0, 0.125],
        ]
        assert load_curves(load_runs(tmp_path), "loss")["run"].tolist() == ["a"]


class TestScores:
    def test_ids_stay_text(self, tmp_path):
        scores = load_scores(make_run(tmp_path / "run"))
        assert scores["video_id"].iloc[0] == "000"
        assert scores["object_id"].iloc[0] == "1"
        assert len(scores) == 18

    def test_ids_that_look_like_missing_values(self, tmp_path):
        run = make_run(tmp_path / "run")
        path = run / "scores.csv"
        path.write_text(path.read_text().replace(",000,1,", ",NA,null,").replace(",001,", ",nan,"))
        scores = load_scores(run)
        assert scores["video_id"].unique().tolist()[:2] == ["NA", "nan"]
        assert scores["object_id"].iloc[0] == "null"

    def test_baselines_are_left_out(self, tmp_path):
        run = make_run(tmp_path / "run")
        with (run / "scores.csv").open("a") as file:
            file.write("0,val,copy_first_mask,000,1,0,0,0,9\n")
        assert len(load_scores(run)) == 18

    @pytest.mark.parametrize("text", [None, "", "step,split\n0,val\n"])
    def test_missing_or_unlike_files(self, tmp_path, text):
        run = make_run(tmp_path / "run", num_videos=0)
        if text is not None:
            (run / "scores.csv").write_text(text)
        with pytest.raises(UserError, match=r"scores\.csv"):
            load_scores(run)


class StubApi:
    """As much of wandb.Api as is used: runs of a project, and one run by its path."""

    def __init__(self, *runs):
        self.found = {"/".join(run.path): run for run in runs}

    def runs(self, project, lazy):
        if project == "me/missing":
            raise ValueError("Could not find project missing")
        return iter(self.found.values())

    def run(self, path):
        return self.found[path]


def stub_run(*, state="finished", **summary):
    def scan_history(keys):
        rows = [(0, 0.25), (10, 0.5), (20, 0.2), (10, 0.3), (20, 0.4)]  # resumed before step 10
        return [dict(zip(keys, row, strict=True)) for row in rows]

    return SimpleNamespace(
        path=["me", "sam2train", "abc"],
        id="abc",
        name="coco",
        state=state,
        sweep_name="s1",
        config=CONFIG,
        summary_metrics={"params/trainable": 40, "steps": 20, "seconds": 5.0, **summary},
        created_at="2026-01-02T03:04:05Z",
        commit="c0ffee",
        scan_history=scan_history,
    )


class TestWandb:
    def test_the_shape_is_that_of_the_disk(self, tmp_path):
        make_run(tmp_path / "run", curve=[(0, 0.25), (10, 0.3), (20, 0.4)])
        disk, wandb = load_runs(tmp_path), results.load_wandb("sam2train", StubApi(stub_run()))
        assert set(wandb.columns) == set(disk.columns) - {"params/total", "params/memory_encoder"}
        for name in ("group", "seed", "status", "baseline", "last", "step", "num_steps", "scored"):
            assert wandb[name][0] == disk[name][0], name
        assert (wandb["path"][0], wandb["sweep"][0]) == ("me/sam2train/abc", "s1")
        assert wandb["written"][0] == pd.Timestamp("2026-01-02T03:04:05", tz="UTC")

    def test_curves_come_through_the_same_call(self):
        api = StubApi(stub_run())
        curves = load_curves(results.load_wandb("sam2train", api), api=api)
        assert curves[["step", "value"]].values.tolist() == [[0, 0.25], [10, 0.3], [20, 0.4]]

    @pytest.mark.parametrize(
        ("state", "said", "status"),
        [
            ("crashed", {"status": "running"}, "crashed"),
            ("killed", {}, "interrupted"),
            ("failed", {"status": "interrupted"}, "interrupted"),  # it exits with 143
            ("running", {"status": "running"}, "running"),
        ],
    )
    def test_states(self, state, said, status):
        runs = results.load_wandb("p", StubApi(stub_run(state=state, **said)))
        assert runs["status"].tolist() == [status]

    def test_mistakes(self):
        with pytest.raises(UserError, match="Could not find project"):
            results.load_wandb("me/missing", StubApi())
        with pytest.raises(UserError, match="no run in it"):
            results.load_wandb("me/empty", StubApi())
