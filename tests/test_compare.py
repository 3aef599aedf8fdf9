"""`--runs` and `--compare`: what a person reads, in 100 columns."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_results import make_old, make_run

from sam2train import figures, results
from sam2train.compare import collect_results, compare_groups, compare_runs, show_runs
from sam2train.errors import UserError
from sam2train.results import load_runs


class TestCompareGroups:
    """Groups of runs beside the first: over seeds and videos where there are scores by object."""

    def groups(self, folder, **settings):
        for num in (1, 7):
            for seed in range(3):
                make_run(
                    folder / f"{num}_{seed}",
                    [(0, 0.25), (10, 0.25 + num / 16 + seed / 64)],
                    settings={"model.num_maskmem": num, "trainer.seed": seed},
                    **settings,
                )
        runs = load_runs(folder)
        return [runs[runs["model.num_maskmem"] == num] for num in (1, 7)]

    def test_with_objects(self, tmp_path):
        table = compare_groups(self.groups(tmp_path))
        assert table["text"][0] == "0.328 ± 0.039 (3 seeds x 6 videos)"
        assert table["difference"].tolist() == ["", "+0.375 ± 0.000 (3 paired seeds x 6 videos)"]
        assert table["p"][1] == 0

    def test_without_objects_over_seeds(self, tmp_path):
        table = compare_groups(self.groups(tmp_path, num_videos=0))
        assert table["text"][0] == "0.328 ± 0.039 (3 seeds)"
        assert table["difference"][1] == "+0.375 ± 0.000 (3 paired seeds)"
        assert table["p"].isna().all()

    def test_a_metric_without_scores_by_object(self, tmp_path):
        table = compare_groups(self.groups(tmp_path), "loss")
        assert table["text"][0] == "0.328 ± 0.039 (3 seeds)"

    def test_other_videos(self, tmp_path):
        groups = self.groups(tmp_path)
        for place in groups[1]["path"]:
            path = Path(place) / "scores.csv"
            path.write_text(path.read_text().replace(",005,", ",other,"))
        table = compare_groups(groups)
        assert table["difference"][1] == "+0.375 ± 0.000 (3 paired seeds)"


def printed(show, what) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show(what, console)
    text = console.file.getvalue()
    messages = (
        "unreadable: ",
        "odd: ",
        "A, ",
        "B, ",
        "left out: ",
        "wrote ",
        "|",
    )  # whole, so that their paths can be copied
    lines = [line for line in text.splitlines() if not line.startswith(messages)]
    assert max(map(len, lines), default=0) <= 100
    return text


def row(text: str, start: str) -> list[str]:
    """The words of the first line that begins so."""
    lines = [line for line in text.splitlines() if line.strip().startswith(start)]
    assert lines, text
    return lines[0].split()


@pytest.fixture(autouse=True)
def tmp_path(tmp_path, monkeypatch):
    """The current folder, `.`, so that paths are as short as a user's."""
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.fixture
def pair(tmp_path):
    """Two runs that differ in num_maskmem; b ends 0.125 higher, on every video."""
    a = make_run(tmp_path / "a", [(0, 0.25), (10, 0.5)])
    b = make_run(tmp_path / "b", [(0, 0.25), (10, 0.625)], settings={"model.num_maskmem": 1})
    return a, b


class TestRuns:
    def test_best_first_and_without_score_last(self, tmp_path):
        folder = tmp_path / "runs" / "small"
        make_run(folder / "low", [(0, 0.25), (10, 0.125)])
        make_run(folder / "high", [(0, 0.25), (10, 0.5)])
        (make_run(folder / "none") / "metrics.jsonl").write_text("")
        text = printed(show_runs, tmp_path / "runs")
        assert [text.index(name) for name in (" high ", " low ", " none ")] == sorted(
            text.index(name) for name in (" high ", " low ", " none ")
        )
        assert " ".join(row(text, "low")) == "low 0 finished 10/20 0.250 0.125 0.250 0.00M 0:00:10"
        assert str(folder) in text.splitlines()[0]

    def test_seeds_are_summed_up_with_their_interval(self, tmp_path):
        for seed in range(2):
            make_run(
                tmp_path / f"s{seed}",
                [(0, 0.25), (10, 0.5 + seed / 64)],
                settings={"trainer.seed": seed},
            )
        make_run(tmp_path / "z", settings={"model.num_maskmem": 1})
        text = printed(show_runs, tmp_path)
        # 12.706 times half of the distance of two values.
        assert "num_maskmem=7  0.508 ± 0.099 (2 seeds x 6 videos)" in text
        assert "num_maskmem=1  0.375 (1 seed: no interval)" in text

    def test_many_settings_leave_single_seeds_out(self, tmp_path):
        settings = {f"loss.term{k}": 1 for k in range(9)}
        for seed in range(2):
            make_run(tmp_path / f"s{seed}", settings={"trainer.seed": seed})
        make_run(tmp_path / "z", settings=settings)
        text = printed(show_runs, tmp_path)
        assert "(2 seeds x 6 videos)" in text
        assert "term1" not in text

    def test_a_killed_and_a_broken_run_are_marked(self, tmp_path):
        killed = make_run(tmp_path / "killed", status="running")
        make_old(killed, results.QUIET + 60)
        (make_run(tmp_path / "broken") / "config.yaml").write_text("{")
        (make_run(tmp_path / "odd") / "summary.json").write_text("{")
        text = printed(show_runs, tmp_path)
        assert row(text, "killed")[2] == "crashed"
        assert "--resume" in text
        assert row(text, "broken")[1] == "unreadable"
        assert f"unreadable: {tmp_path / 'broken' / 'config.yaml'}" in text
        assert f"odd: {tmp_path / 'odd' / 'summary.json'}: " in text
        assert row(text, "odd")[3] == "20/20"  # what the rows of metrics.jsonl tell

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            show_runs(tmp_path / "nowhere", Console())


class TestCompare:
    def test_settings_and_scores(self, pair):
        text = printed(compare_runs, pair)
        assert row(text, "model.num_maskmem") == ["model.num_maskmem", "7", "1"]
        assert "dataset.prompt_types" not in text
        needs = "needs more than 1 paired seed"
        assert "+0.250 ± 0.000" in text  # a, since its step 0
        assert " ".join(row(text, "B  J&F")) == f"B J&F {needs} +0.125 ± 0.000 {needs}"
        assert "0.500 at step 10" in text

    def test_the_interval_is_over_videos(self, tmp_path):
        gains = np.array([-0.25, 0.25, -0.125, 0.125, 0.0, 0.0])
        a = make_run(tmp_path / "a", gains=gains)
        b = make_run(tmp_path / "b", settings={"model.num_maskmem": 1})
        line = " ".join(row(printed(compare_runs, [a, b]), "B  J&F"))
        assert line.startswith("B J&F needs more than 1 paired seed +0.000 [-0.")

    def test_seeds_make_one_side(self, tmp_path):
        runs = [
            make_run(
                tmp_path / f"{num}_{seed}",
                [(0, 0.25), (10, 0.25 + num / 16 + seed / 64)],
                settings={"model.num_maskmem": num, "trainer.seed": seed},
            )
            for num in (1, 4)
            for seed in range(2)
        ]
        text = printed(compare_runs, runs)
        assert [line.split()[0] for line in text.splitlines()[2:6]] == ["A", "A", "B", "B"]
        same = "+0.188 ± 0.000"
        assert " ".join(row(text, "B  J&F")) == f"B J&F {same} 0.000 {same} {same}"
        assert "(2 paired seeds x 6 videos)" in text
        assert "p, Holm of 1" in text

    def test_several_comparisons_are_corrected(self, tmp_path):
        rng = np.random.default_rng(0)
        runs = [
            make_run(
                tmp_path / f"{num}_{seed}",
                gains=rng.normal(num / 16, 0.05, 6),
                settings={"model.num_maskmem": num, "trainer.seed": seed},
            )
            for num in (0, 1, 2, 4)
            for seed in range(3)
        ]
        text = printed(compare_runs, runs)
        assert "p, Holm of 3" in text
        alone = printed(compare_runs, [*runs[:3], *runs[-3:]])
        # D J&F +0.100 ± 0.050 p: the smallest of three counts three times
        corrected, p = float(row(text, "D  J&F")[5]), float(row(alone, "B  J&F")[5])
        assert corrected == pytest.approx(3 * p, abs=0.002)
        assert 0.001 < p < 0.2

    def test_a_seed_that_was_run_twice_counts_once(self, tmp_path):
        for name, num, seed, score in (
            ("a", 7, 0, 0.5),
            ("a_again", 7, 0, 0.25),
            ("b", 7, 1, 0.375),
            ("c", 1, 0, 0.5),
            ("d", 1, 1, 0.5),
        ):
            settings = {"model.num_maskmem": num, "trainer.seed": seed}
            make_run(tmp_path / name, [(0, 0.25), (10, score)], settings=settings)
        text = printed(compare_runs, [Path(n) for n in ("a", "a_again", "b", "c", "d")])
        assert "+0.125 ± 0.000" in text
        assert "(2 paired seeds x 6 videos)" in text

    def test_nothing_but_the_seed(self, tmp_path):
        runs = [make_run(tmp_path / f"{s}", settings={"trainer.seed": s}) for s in range(2)]
        text = printed(compare_runs, runs)
        assert "The settings are the same." in text
        assert "J&F of all: 0.375 ± 0.000 (2 seeds x 6 videos)" in text

    def test_without_scores_by_object_the_mean_is_over_seeds(self, tmp_path):
        runs = [
            make_run(tmp_path / f"{s}", num_videos=0, settings={"trainer.seed": s})
            for s in range(2)
        ]
        assert "J&F of all: 0.375 ± 0.000 (2 seeds)" in printed(compare_runs, runs)

    def test_what_is_missing_is_said_and_no_bare_difference_printed(self, pair):
        _, b = pair
        (b / "scores.csv").unlink()
        text = printed(compare_runs, pair)
        assert f"{b / 'scores.csv'}: no such file" in text
        assert "needs scores.csv of B" in text
        assert "0.125" not in text

    def test_few_videos(self, tmp_path):
        runs = [make_run(tmp_path / n, num_videos=3, settings={"x.y": n}) for n in "ab"]
        assert "needs more than 3 videos" in printed(compare_runs, runs)

    def test_other_videos(self, tmp_path):
        a, b = (
            make_run(tmp_path / n, num_videos=k, settings={"x.y": n})
            for n, k in (("a", 6), ("b", 7))
        )
        assert "scored on different objects" in " ".join(printed(compare_runs, [a, b]).split())

    def test_other_rules_of_scoring_are_warned_of(self, tmp_path):
        a, b = (
            make_run(tmp_path / p, settings={"evaluation.frame_policy": p})
            for p in ("all", "davis")
        )
        assert "Careful" in printed(compare_runs, [a, b])

    def test_other_prompts_are_warned_of(self, tmp_path):
        """Runs are scored with the prompts they were trained with, unless they say otherwise."""
        for own in (None, ["mask"]):
            a, b = (
                make_run(
                    tmp_path / f"{own}_{kind}",
                    settings={"dataset.prompt_types": [kind], "evaluation.prompt_types": own},
                )
                for kind in ("mask", "point")
            )
            text = printed(compare_runs, [a, b])
            assert ("under different dataset.prompt_types" in text) == (own is None)


class TestCollect:
    def test_a_sweep_becomes_a_table_and_a_picture(self, tmp_path):
        folder = tmp_path / "runs" / "sweeps" / "num_maskmem"
        for num in (1, 7):
            for seed in range(2):
                make_run(
                    folder / f"{num}_{seed}",
                    [(0, 0.25), (10, 0.25 + num / 16)],
                    settings={"model.num_maskmem": num, "trainer.seed": seed},
                )
        make_run(folder / "late", status="failed")
        text = printed(collect_results, folder)
        assert f"left out: {folder / 'late'}, failed at step 20" in text
        assert "| 7 | 0.688 ± 0.000 | +0.375 ± 0.000 |" in text
        said = "Shown in J&F: num_maskmem 7 is higher than 1 (over seeds and videos; 1 comparison;"
        assert said in text
        assert "| 7 | 0.437 ± 0.000 | +0.375 ± 0.000 |" in text  # gained since step 0
        assert "Shown in J&F gained since step 0: num_maskmem 7 is higher than 1" in text
        written = sorted(path.name for path in (tmp_path / "experiments/results").iterdir())
        assert written == ["num_maskmem.csv", "num_maskmem.png"]

        picture = tmp_path / "experiments" / "results" / "num_maskmem.png"
        picture.unlink()
        again = printed(collect_results, None)  # from the table alone
        assert picture.is_file()
        assert again.splitlines()[-12:] == text.splitlines()[-12:]

    def test_a_sweep_without_a_question_has_a_table_only(self, tmp_path):
        make_run(tmp_path / "runs" / "sweeps" / "learning_rate" / "1")
        text = printed(collect_results, tmp_path / "runs" / "sweeps" / "learning_rate")
        assert text == "wrote experiments/results/learning_rate.csv: 1 runs, 21 rows\n"

    def test_nothing_to_collect(self, tmp_path):
        with pytest.raises(UserError, match="name the folder of a sweep"):
            collect_results(None, Console())


class TestMistakes:
    def test_one_run_or_the_same_twice(self, pair):
        for given in (pair[:1], [pair[0], pair[0]]):
            with pytest.raises(UserError, match="two different runs"):
                compare_runs(given, Console())

    def test_a_folder_that_is_no_run(self, pair, tmp_path):
        with pytest.raises(UserError, match="is no run"):
            compare_runs([pair[0], tmp_path], Console())

    def test_no_folder(self, pair, tmp_path):
        with pytest.raises(UserError, match="is no folder"):
            compare_runs([pair[0], tmp_path / "x"], Console())

    def test_a_run_that_cannot_be_read(self, pair):
        (pair[1] / "config.yaml").write_text("")
        with pytest.raises(UserError, match=r"config\.yaml is empty"):
            compare_runs(pair, Console())


NASTY = "[/red]\x1b[2J\u202e$x_"
TOLD = r"[/red]\x1b[2J\u202e$x_"


def test_names_and_values_of_a_strangers_runs_are_shown_as_they_are(tmp_path):
    a = make_run(tmp_path / f"a{NASTY}", settings={"dataset.data_path": NASTY})
    b = make_run(tmp_path / "b", status=NASTY)
    for text in (
        printed(show_runs, tmp_path),
        printed(compare_runs, [a, b]),
    ):
        assert TOLD in text.replace("\n", "")
        assert text.replace("\n", "").isprintable()


def test_a_dollar_sign_in_a_name_does_not_stop_a_picture(tmp_path):
    for name in ("a$\\frac$", "b$"):
        make_run(tmp_path / name)
    curves = results.load_curves(results.load_runs(tmp_path))
    figures.curves(curves, "run", title="$\\frac$").savefig(tmp_path / "x.png")
