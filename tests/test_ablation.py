"""Compact results: what is kept, that it comes back from CSV, and what it says."""

import pandas as pd
import pytest
from test_results import make_run

from sam2train.ablation import (
    MASKMEM,
    POINTERS,
    Question,
    brief,
    compact_results,
    differences,
    horizon_sentences,
    last_step,
    markdown,
    read_results,
    readable,
    sentences,
    settings_in_order,
    validation_curves,
    verdict,
)
from sam2train.errors import UserError
from sam2train.results import load_runs

MEMORIES = Question(MASKMEM, 0, POINTERS)


@pytest.fixture
def sweep(tmp_path):
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
    # 6 runs, 2 validations, 3 metrics; objects of the last step only, 6 videos each.
    assert (len(whole), len(results)) == (36, 36 + 36)
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


class TestDifferences:
    def test_both_intervals(self, results):
        zero, seven = differences(results, MEMORIES).to_dict("records")
        assert zero["J_and_F"] == "0.500 ± 0.000 (3 seeds)"
        assert zero["difference"] != zero["difference"]
        assert seven["difference"] == pytest.approx(0.25 + 1 / 64, abs=1e-4)
        # Gains of 0.25, 0.266, 0.281: 1/64 of spread, times 4.303 / sqrt(3).
        assert seven["over_seeds"] == "+0.266 ± 0.039 (3 paired seeds)"
        assert seven["high"] - seven["low"] == pytest.approx(2 * 0.0388, abs=1e-4)
        assert seven["over_videos"] == "+0.266 ± 0.000 (6 videos)"

    def test_without_scores_by_video(self, results):
        table = differences(results[results["video_id"].isna()], MEMORIES)
        assert table["over_videos"].iloc[1] == "no scores by video"

    def test_within_another_setting(self, sweep):
        for num in (0, 7):
            make_run(
                sweep / f"p{num}",
                [(0, 0.25), (10, 0.5 - num / 16)],
                settings={MASKMEM: num, POINTERS: 0},
            )
        table = differences(compact_results(load_runs(sweep)), MEMORIES)
        assert table[[POINTERS, MASKMEM]].values.tolist() == [[0, 0], [0, 7], [16, 0], [16, 7]]
        assert table["difference"].iloc[1] == pytest.approx(-7 / 16)
        text = sentences(table, MEMORIES)
        assert "- max_obj_ptrs_in_encoder 0: **num_maskmem 7** against 0: J&F needs" in text
        assert text.splitlines()[0].endswith("against 0: J&F needs more than 1 paired seed.")
        assert text.splitlines()[1].endswith("+0.266 ± 0.039 (3 paired seeds), higher.")

    def test_as_a_table_for_people(self, results):
        table = readable(differences(results, MEMORIES), MEMORIES)
        assert markdown(table).splitlines() == [
            "| num_maskmem | J&F | against 0, over seeds | against 0, over videos |",
            "| --- | --- | --- | --- |",
            "| 0 | 0.500 ± 0.000 (3 seeds) |  |  |",
            "| 7 | 0.766 ± 0.039 (3 seeds) | +0.266 ± 0.039 (3 paired seeds) "
            "| +0.266 ± 0.000 (6 videos) |",
        ]

    def test_as_a_small_table(self, results):
        table = pd.concat(
            differences(results, Question(MASKMEM, 0)).assign(**{POINTERS: many})
            for many in (0, 16)
        )
        lines = markdown(brief(table, MEMORIES)).splitlines()
        assert lines[0] == (
            "| num_maskmem | J&F, max_obj_ptrs_in_encoder 0 | against 0, max_obj_ptrs_in_encoder 0 "
            "| J&F, max_obj_ptrs_in_encoder 16 | against 0, max_obj_ptrs_in_encoder 16 |"
        )
        assert lines[2] == "| 0 | 0.500 ± 0.000 (3 seeds) |  | 0.500 ± 0.000 (3 seeds) |  |"
        assert lines[3].count("| 0.766 ± 0.039 (3 seeds) | +0.266 ± 0.039 ") == 2

    def test_a_single_value_says_so(self, results):
        only = differences(results[results[MASKMEM] == 0], MEMORIES)
        assert "nothing to compare" in sentences(only, MEMORIES)


class TestHorizon:
    def test_the_far_end_is_told(self, sweep):
        add_horizon(sweep)
        text = horizon_sentences(compact_results(load_runs(sweep)), MEMORIES)
        assert text == (
            "- J at 5 to 8 frames: 0.500 with num_maskmem 0, 0.750 with 7; "
            "+0.250 ± 0.000 (3 paired seeds), higher."
        )

    def test_nothing_was_measured(self, results):
        assert "say nothing" in horizon_sentences(results, MEMORIES)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.2, ", higher"),
        (-0.2, -0.1, ", lower"),
        (-0.1, 0.1, ", no difference shown"),
        (float("nan"), float("nan"), ""),
    ],
)
def test_verdicts(low, high, word):
    assert verdict(low, high) == word


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
