"""Compact results: what is kept, that it comes back from CSV, and what it says."""

import numpy as np
import pandas as pd
import pytest
from test_results import make_run

from sam2train.ablation import (
    MASKMEM,
    POINTERS,
    PROMPT_TYPES,
    QUESTIONS,
    Question,
    compact_results,
    differences,
    last_step,
    questions,
    read_results,
    settings_in_order,
    validation_curves,
)
from sam2train.errors import UserError
from sam2train.results import load_runs

MEMORIES = Question(MASKMEM, 0, POINTERS)
POINT = Question(PROMPT_TYPES, "point")


def make_sweep(tmp_path):
    """Three seeds each of 0 and 7 memories; 7 gains 0.25, plus 1/64 times the seed."""
    folder = tmp_path / "sweeps" / "memories"
    for num, gain in ((0, 0.0), (7, 0.25)):
        for seed in range(3):
            make_run(
                folder / f"m{num}s{seed}",
                [(0, 0.25), (10, 0.5 + gain + seed / 64 * (num > 0))],
                settings={MASKMEM: num, "trainer.seed": seed},
            )
    return folder


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path)


def add_horizon(sweep, values=None, metric="horizon/J"):
    """A `horizon.csv` in each run: at 4 and 8 frames what `values` says for its num_maskmem."""
    for run in sweep.iterdir():
        value = (values or {0: 0.5, 7: 0.75})[int(run.name[1])]
        rows = [f"10,val,trained,{metric},{at},{value},30" for at in (4, 8)]
        rows += [f"10,val,copy_first_mask,{metric},8,0.1,30", f"0,val,trained,{metric},8,0.2,30"]
        text = "\n".join(["step,split,model,metric,at,value,count", *rows])
        (run / "horizon.csv").write_text(text)


@pytest.fixture
def results(sweep):
    return compact_results(load_runs(sweep))


def test_what_is_kept(results):
    assert list(results.columns[:4]) == ["run", "seed", "evaluation_seed", MASKMEM]
    whole = results[results["video_id"].isna()]
    # 6 runs, 2 validations, 3 metrics; objects of both, 6 videos each.
    assert (len(whole), len(results)) == (36, 36 + 72)
    first = whole[(whole["run"] == "m7s2") & (whole["metric"] == "J")]
    assert first["value"].tolist() == pytest.approx([0.25 - 1 / 16, 0.75 + 2 / 64 - 1 / 16])
    assert set(first["count"]) == {6}


def test_csv_brings_everything_back(results, tmp_path):
    path = tmp_path / "memories.csv"
    results.to_csv(path, index=False)
    back = read_results(path)
    pd.testing.assert_frame_equal(back, results, check_dtype=False)
    assert back["video_id"].dropna().iloc[0] == "000"


def test_only_finished_and_scored_runs_count(sweep):
    make_run(sweep / "late", status="failed", settings={"loss.dice": 2})
    (make_run(sweep / "broken") / "config.yaml").write_text("")
    (make_run(sweep / "unscored") / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    results = compact_results(load_runs(sweep))
    assert set(results["run"]) == {f"m{num}s{seed}" for num in (0, 7) for seed in range(3)}
    assert "loss.dice" not in results


def test_horizon_rows_come_along(sweep):
    add_horizon(sweep)
    results = compact_results(load_runs(sweep))
    rows = results[(results["metric"] == "horizon/J") & (results["run"] == "m0s0")]
    names = ["step", "at", "value", "count"]  # the last step, without the baseline
    assert rows[names].values.tolist() == [[10, 4, 0.5, 30], [10, 8, 0.5, 30]]


def test_last_step_is_that_of_each_run():
    frame = pd.DataFrame(
        {
            "run": ["a", "a", "b", "b"],
            "split": ["val", "val", "val", "test"],
            "metric": "J_and_F",
            "step": [0, 10, 5, 20],
        }
    )
    assert last_step(frame)["step"].tolist() == [10, 5]


def test_curves_hold_every_validation(results):
    part = validation_curves(results)
    assert part.loc[part["run"] == "m7s0", ["step", "value"]].values.tolist() == [
        [0, 0.25],
        [10, 0.75],
    ]


def test_settings_stand_in_order():
    assert settings_in_order([16, 0, 7, 7]) == [0, 7, 16]
    mixed = ["point+bbox+mask", "mask", "other", "point+bbox", "point", "bbox"]
    expected = ["point", "bbox", "mask", "other", "point+bbox", "point+bbox+mask"]
    assert settings_in_order(mixed) == expected


def add_test(run, *, best, score, base):
    """Test scores of the checkpoint of step `best` and of the weights of step 0, 6 videos each."""
    rows = [
        f"{step},test,{model},t{v},1,{value},{value},{value},9"
        for step, model, value in ((best, "trained", score), (0, "base", base))
        for v in range(6)
    ]
    with (run / "scores.csv").open("a") as file:
        file.write("\n".join(rows) + "\n")


def made_table(effects, *, noise=0.005, splits=("val", "test"), num_seeds=5):
    """A table as the shipped ones are, without scores by object at step 0: for each prompt type
    what it adds to J&F on each split, with a little noise by seed and video."""
    rng = np.random.default_rng(0)
    rows = []
    for types, added in {"point": [0.0] * len(splits), **effects}.items():
        for seed in range(num_seeds):
            for split, effect in zip(splits, added, strict=True):
                values = 0.5 + effect + rng.normal(0, noise, 12)
                names = {"run": f"{types}{seed}", "seed": seed, PROMPT_TYPES: types, "split": split}
                names |= {"metric": "J_and_F", "at": np.nan, "step": 300}
                if split == "val":
                    rows.append({**names, "value": values.mean(), "count": 12})
                    rows.append({**names, "value": 0.25, "count": 12, "step": 0})
                rows += [
                    {**names, "video_id": f"{v}", "object_id": "1", "value": value, "count": 1}
                    for v, value in enumerate(values)
                ]
    return pd.DataFrame(rows)


def test_questions_of_tables(results):
    assert questions("prompts", made_table({})) == [POINT]
    scored = made_table({}).assign(prompt="bbox")
    assert questions("prompts", scored) == [POINT]  # all with one prompt
    scored.loc[::2, "prompt"] = "point"
    assert questions("prompts", scored) == list(QUESTIONS["prompts"])
    assert questions("num_maskmem", results) == [Question(MASKMEM, 1, POINTERS)]
    assert questions("mine", results) == [Question(MASKMEM, 0, POINTERS)]
    assert questions("mine", made_table({"mask": (0, 0)})) == [POINT]
    assert questions("mine", results.drop(columns=MASKMEM)) == []


class TestMistakes:
    def test_a_reference_that_was_not_run(self, results):
        with pytest.raises(UserError, match="there are 0, 7"):
            differences(results, Question(MASKMEM, 5))

    def test_a_setting_that_was_not_varied(self, results):
        with pytest.raises(UserError, match=r"trainer\.x: the runs"):
            differences(results, Question("trainer.x", 5))

    def test_two_settings_at_once(self, sweep):
        for num in (0, 7):
            make_run(sweep / f"other{num}", settings={MASKMEM: num, "loss.dice": 2})
        with pytest.raises(UserError, match="several runs with one seed"):
            differences(compact_results(load_runs(sweep)), MEMORIES)

    def test_nothing_is_finished(self, tmp_path):
        make_run(tmp_path / "run", status="failed")
        with pytest.raises(UserError, match="finished"):
            compact_results(load_runs(tmp_path))

    def test_a_csv_that_is_not_there_names_the_commands(self, tmp_path):
        with pytest.raises(UserError, match=r"prompts\.csv is not there yet") as caught:
            read_results(tmp_path / "prompts.csv")
        assert "run.py sweeps/prompts.yaml" in str(caught.value)
        assert "--collect runs/sweeps/prompts" in str(caught.value)

    def test_a_csv_of_another_kind(self, tmp_path):
        (tmp_path / "r.csv").write_text("run,seed\n")
        with pytest.raises(UserError, match=r"r\.csv"):
            read_results(tmp_path / "r.csv")
