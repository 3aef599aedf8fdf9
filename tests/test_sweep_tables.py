"""What a local sweep shows at its end; the rest of it is tested in `test_sweep`."""

import io
import itertools

from rich.console import Console
from small_sweep import SEEDS
from test_results import make_run

from sam2train import sweep_tables
from sam2train.sweep_file import load_sweep
from sam2train.sweep_trials import Trial


def test_the_ranking_is_over_seeds_and_videos_where_trials_kept_scores(small, tmp_path):
    settings = load_sweep(small({**SEEDS, "model.num_maskmem": {"values": [1, 7]}}))
    trials = []
    for num, seed in itertools.product((1, 7), (0, 1, 2)):
        folder = make_run(tmp_path / f"{num}_{seed}", [(0, 0.25), (10, num / 16 + seed / 64)])
        values = {"model.num_maskmem": num, "trainer.seed": seed}
        trial = Trial(folder.name, folder.name, values, folder, "finished", seed)
        trial.look("val/J_and_F")
        trials.append(trial)
    console = Console(file=io.StringIO(), width=200)
    sweep_tables.show_results(settings, trials, tmp_path, console)
    text = console.file.getvalue()
    assert text.index("0.453 ± 0.039 (3 seeds x 6 videos)") < text.index("0.078 ± 0.039 (3 see")
    assert "-0.375 ± 0.000 (3 paired seeds x 6 videos)" in text
    assert "p, Holm of 1" in text
    for trial in trials:  # without scores by object, over seeds
        (trial.folder / "scores.csv").unlink()
    console = Console(file=io.StringIO(), width=200)
    sweep_tables.show_results(settings, trials, tmp_path, console)
    assert "-0.375 ± 0.000 (3 paired seeds)" in console.file.getvalue()
    assert "Holm" not in console.file.getvalue()
