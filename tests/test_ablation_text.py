"""What is said of an ablation: tables, sentences, Markdown."""

import numpy as np
import pandas as pd
import pytest
from test_ablation import (
    MEMORIES,
    POINT,
    add_horizon,
    add_test,
    made_table,
    make_sweep,
)
from test_results import make_run

from sam2train.ablation import (
    GAIN,
    MASKMEM,
    POINTERS,
    PROMPT,
    PROMPT_TYPES,
    Question,
    compact_results,
    differences,
)
from sam2train.ablation_text import (
    brief,
    conclusion,
    horizon_sentences,
    markdown,
    readable,
    sentences,
)
from sam2train.results import load_runs


@pytest.fixture
def sweep(tmp_path):
    return make_sweep(tmp_path)


@pytest.fixture
def results(sweep):
    return compact_results(load_runs(sweep))


class TestDifferences:
    def test_all_three_intervals(self, results):
        zero, seven = differences(results, MEMORIES).to_dict("records")
        assert zero["J_and_F"] == "0.500 ± 0.000 (3 seeds x 6 videos)"
        assert zero["difference"] != zero["difference"]
        assert seven["difference"] == pytest.approx(0.25 + 1 / 64, abs=1e-4)
        # Gains of 0.25, 0.266, 0.281: 1/64 of spread, times 4.303 / sqrt(3); videos do not differ.
        assert seven["over_both"] == "+0.266 ± 0.039 (3 paired seeds x 6 videos)"
        assert seven["high"] - seven["low"] == pytest.approx(2 * 0.0388, abs=1e-4)
        assert seven["over_seeds"] == "+0.266 ± 0.039 (3 paired seeds)"
        assert seven["over_videos"] == "+0.266 ± 0.000 (6 videos)"
        assert seven["start"] == 0.25
        assert sorted(seven["seeds"]) == pytest.approx([0.75, 0.765625, 0.78125], abs=1e-4)

    def test_without_scores_by_video_nothing_is_claimed(self, results):
        table = differences(results[results["video_id"].isna()], MEMORIES)
        assert (
            table["over_videos"].iloc[1] == table["over_both"].iloc[1] == "needs scores by object"
        )
        assert table["J_and_F"].iloc[1] == "0.766 ± 0.039 (3 seeds)"
        assert conclusion(table, MEMORIES).startswith("No claim about the J&F by num_maskmem")
        assert "+0.266 ± 0.039 (3 paired seeds)" in markdown(brief(table, MEMORIES))

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
        lines = sentences(table, MEMORIES).splitlines()
        start = "- max_obj_ptrs_in_encoder 0: **num_maskmem 7** against 0: J&F "
        assert lines[0] == f"{start}needs more than 1 paired seed on validation."
        assert "+0.266 ± 0.039 (3 paired seeds x 6 videos) on validation, p 0.001, hi" in lines[1]
        assert "max_obj_ptrs_in_encoder 16: num_maskmem 7 is higher than 0" in lines[-1]
        assert "No other difference is shown." in lines[-1]

    def test_as_a_table_for_people(self, results):
        table = readable(differences(results, MEMORIES), MEMORIES)
        assert markdown(table).splitlines() == [
            "| split | num_maskmem | J&F | against 0 | p, Holm of 1 | against 0, over seeds "
            "| against 0, over videos |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| validation | 0 | 0.500 ± 0.000 (3 seeds x 6 videos) |  |  |  |  |",
            "| validation | 7 | 0.766 ± 0.039 (3 seeds x 6 videos) "
            "| +0.266 ± 0.039 (3 paired seeds x 6 videos) | 0.001 "
            "| +0.266 ± 0.039 (3 paired seeds) | +0.266 ± 0.000 (6 videos) |",
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
        assert lines[2] == "| 0 | 0.500 ± 0.000 |  | 0.500 ± 0.000 |  |"
        assert lines[3].count("| 0.766 ± 0.039 | +0.266 ± 0.039 ") == 2

    def test_a_single_value_says_so(self, results):
        only = differences(results[results[MASKMEM] == 0], MEMORIES)
        assert "nothing to compare" in sentences(only, MEMORIES)


class TestClaims:
    """What is shown: on the test videos, after Holm's correction, with validation agreeing."""

    def test_both_splits_agree(self):
        table = differences(made_table({"mask": (0.03, 0.02), "bbox": (0, 0)}), POINT)
        text = conclusion(table, POINT)
        assert text.startswith(
            "Shown in J&F: prompt_types mask is higher than point (over seeds and videos; 4 "
            "comparisons, corrected by Holm; p up to 0.05). No other difference is shown."
        )
        assert "test scores are those of the checkpoint that was best on validation." in text

    def test_the_splits_change_sign(self):
        """Each split alone is far from 0, as an interval over seeds or videos would say."""
        effects = {"mask": (0.037, -0.010), "point+bbox": (-0.029, 0.015)}
        table = differences(made_table(effects), POINT)
        assert (table["corrected"].dropna() < 0.05).all()
        said = sentences(table, POINT)
        assert said.count(", no difference shown.") == 2
        assert "higher" not in said
        assert "lower" not in said
        assert "No difference in J&F is shown between the values of prompt_types" in said

    def test_validation_alone_is_not_enough(self):
        table = differences(made_table({"mask": (0.03, 0.0005)}), POINT)
        assert table["corrected"].dropna().iloc[0] < 0.001
        assert "No difference in J&F is shown" in conclusion(table, POINT)

    def test_without_test_videos_validation_decides(self):
        table = differences(made_table({"mask": (0.03,)}, splits=("val",)), POINT)
        text = conclusion(table, POINT)
        assert "mask is higher than point (over seeds and videos; 1 comparison; p up to" in text
        assert text.endswith("last step on validation videos, which chose no checkpoint.")

    def test_many_comparisons_hide_what_one_would_show(self):
        """A p value that passes alone, and not as one of five."""
        results = made_table({"mask": (0.0,)}, splits=("val",), noise=0.05)
        for added in np.linspace(0, 0.1, 101):  # until it is just shown
            shift = np.where(results[PROMPT_TYPES] == "mask", added, 0)
            moved = results.assign(value=results["value"] + shift)
            found = differences(moved, POINT)["p"].iloc[1]
            if found < 0.04:
                break
        assert 0.01 < found < 0.04
        assert "Shown" in conclusion(differences(moved, POINT), POINT)
        others = made_table({f"other{k}": (0.0,) for k in range(4)}, splits=("val",), noise=0.05)
        many = pd.concat([moved, others[others[PROMPT_TYPES] != "point"]])
        table = differences(many, POINT)
        assert table["corrected"].min() >= 5 * found * 0.999
        assert "No difference in J&F is shown" in conclusion(table, POINT)
        assert "5 comparisons, corrected by Holm" in conclusion(table, POINT)

    def test_test_scores_stand_beside_validation(self):
        effects = {"mask": (0.037, -0.010)}
        lines = markdown(brief(differences(made_table(effects), POINT), POINT)).splitlines()
        assert lines[0] == (
            "| prompt_types | J&F, validation | against point, validation | J&F, test "
            "| against point, test |"
        )
        mask = lines[3].split(" | ")
        assert mask[2].startswith("+0.03")
        assert mask[4].startswith("-0.01")


class TestGain:
    def test_by_hand(self, tmp_path):
        """From 0.25 to 0.5 and from 0.375 to 0.5: no difference, a gain that is 0.125 less; on test
        0.25 to 0.625 and 0.5 to 0.5."""
        for num, start, base, score in ((0, 0.25, 0.25, 0.625), (7, 0.375, 0.5, 0.5)):
            for seed in range(2):
                run = make_run(
                    tmp_path / f"m{num}s{seed}",
                    [(0, start), (10, 0.5)],
                    settings={MASKMEM: num, "trainer.seed": seed},
                )
                add_test(run, best=10, score=score, base=base)
        results = compact_results(load_runs(tmp_path))
        plain = differences(results, MEMORIES)
        assert plain["split"].tolist() == ["val", "val", "test", "test"]
        assert plain["difference"].dropna().tolist() == [0, -0.125]
        gains = differences(results, MEMORIES, gain=True)
        assert gains["mean"].tolist() == [0.25, 0.125, 0.375, 0]
        assert gains["difference"].dropna().tolist() == [-0.125, -0.375]
        assert gains["over_both"].iloc[1] == "-0.125 ± 0.000 (2 paired seeds x 6 videos)"
        assert "num_maskmem 7 is lower than 0" in conclusion(gains, MEMORIES, GAIN)
        assert "J&F gained since step 0, test" in brief(gains, MEMORIES, GAIN)

    def test_where_step_0_was_the_best_nothing_is_gained(self, tmp_path):
        for num in (0, 7):
            run = make_run(tmp_path / f"m{num}", settings={MASKMEM: num})
            add_test(run, best=0, score=0.5, base=0.5)
        gains = differences(compact_results(load_runs(tmp_path)), MEMORIES, gain=True)
        assert gains.loc[gains["split"] == "test", "mean"].tolist() == [0, 0]

    def test_without_objects_at_step_0_no_claim(self):
        """As in the tables of before these rows were kept: validation's gains over seeds alone."""
        gains = differences(made_table({"mask": (0.037, -0.010)}), POINT, gain=True)
        assert set(gains["split"]) == {"val"}
        assert gains["difference"].iloc[1] == pytest.approx(0.037, abs=0.003)
        assert gains["low"].isna().all()
        text = conclusion(gains, POINT, GAIN)
        assert text.startswith("No claim about the J&F gained since step 0 by prompt_types")
        assert "(5 paired seeds)" in markdown(brief(gains, POINT, GAIN))


class TestTrainedByScored:
    """The same question for the objects of each prompt that was scored."""

    def test_a_table_of_trained_by_scored(self):
        table = made_table({"mask": (0.3, 0.3)})
        table[PROMPT] = ["point", "mask"] * (len(table) // 2)
        table.loc[table[PROMPT] == "mask", "value"] += 0.1
        whole = table.iloc[:1].assign(video_id=float("nan"), prompt="")
        question = Question(PROMPT_TYPES, "point", PROMPT)
        rows = differences(pd.concat([whole, table]), question)
        assert len(rows) == 2 * 2 * 2  # splits, prompts that were scored, prompts of the training
        by_prompt = rows.groupby(PROMPT)["mean"].mean()
        assert by_prompt["mask"] - by_prompt["point"] == pytest.approx(0.1, abs=0.02)
        assert rows["difference"].dropna().to_numpy() == pytest.approx(0.3, abs=0.02)
        assert "prompt mask: prompt_types mask is higher than point" in conclusion(rows, question)


class TestHorizon:
    def test_the_far_end_is_told(self, sweep):
        add_horizon(sweep)
        text = horizon_sentences(compact_results(load_runs(sweep)), MEMORIES)
        assert text == (
            "- J at 5 to 8 frames: 0.500 with num_maskmem 0, 0.750 with 7; "
            "+0.250 ± 0.000 (3 paired seeds), these videos only."
        )

    def test_nothing_was_measured(self, results):
        assert "say nothing" in horizon_sentences(results, MEMORIES)
