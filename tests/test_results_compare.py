"""Groups of runs beside each other."""

from pathlib import Path

from test_results import make_run

from sam2train.results import load_runs
from sam2train.results_compare import compare_groups


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
