"""Figures: the numbers that are drawn, and that nothing of matplotlib's state moves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_results import make_run

from sam2train import figures
from sam2train.ablation import MASKMEM, POINTERS, PROMPT_TYPES, Question, compact_results
from sam2train.errors import UserError
from sam2train.pictures import read_picture
from sam2train.results import load_curves, load_runs


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    """1, 4 and 7 memories with 0 and 16 pointers, two seeds; J&F grows with both."""
    folder = tmp_path_factory.mktemp("memories")
    for num in (1, 4, 7):
        for pointers in (0, 16):
            for seed in range(2):
                run = make_run(
                    folder / f"{num}_{pointers}_{seed}",
                    [(0, 0.25), (10, 0.25 + num / 32 + pointers / 128 + seed / 64)],
                    settings={
                        "model.num_maskmem": num,
                        "model.max_obj_ptrs_in_encoder": pointers,
                        "trainer.seed": seed,
                    },
                )
                rows = [f"10,val,trained,horizon/J,{at},{num / at},9" for at in (8, 16, 32)]
                text = "\n".join(["step,split,model,metric,at,value,count", *rows])
                (run / "horizon.csv").write_text(text)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for types in (["mask"], ["point", "bbox"], ["point"]):
        for seed in range(2):
            make_run(
                folder / f"{'_'.join(types)}_{seed}",
                [(0, 0.25), (10, 0.5 + seed / 8)],
                settings={"dataset.prompt_types": types, "trainer.seed": seed},
            )
    return folder


def legend(figure) -> list[str]:
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return [text.get_text() for one in legends for text in one.texts]


POINT, MEMORIES = Question(PROMPT_TYPES, "point"), Question(MASKMEM, 1, POINTERS)


def means(axes) -> list[list[float]]:
    return [list(container[0].get_ydata()) for container in axes.containers]


def test_curves_draw_each_run_their_mean_and_step_0(prompts):
    data = load_curves(load_runs(prompts)).assign(half=lambda d: d["run"].str[:4])
    figure = figures.curves(data, "half", title="Prompts")
    (axes,) = figure.axes
    assert legend(figure)[0] == "step 0, mean"
    assert sorted(legend(figure)[1:]) == ["mask, mean of 2", "poin, mean of 4"]
    dashed = axes.lines[0]
    assert set(dashed.get_ydata()) == {0.25}
    thick = [line for line in axes.lines[1:] if line.get_linewidth() == 2]
    assert [list(line.get_ydata()) for line in thick] == [[0.25, 0.5625]] * 2
    assert len(axes.lines) == 1 + 2 + 6


def test_curves_end_with_their_first_run(tmp_path):
    make_run(tmp_path / "a", [(0, 0.2), (10, 0.3), (20, 0.4)])
    make_run(tmp_path / "b", [(0, 0.2), (10, 0.5)], settings={"trainer.seed": 1})
    (axes,) = figures.curves(load_curves(load_runs(tmp_path))).axes
    (mean,) = [line for line in axes.lines if line.get_linewidth() == 2]
    assert list(mean.get_xdata()) == [0, 10]
    assert list(mean.get_ydata()) == pytest.approx([0.2, 0.4])


def test_a_little_noise_is_not_drawn_as_a_slope(tmp_path):
    make_run(tmp_path / "a", [(0, 0.400), (10, 0.401)])
    (axes,) = figures.curves(load_curves(load_runs(tmp_path)), "run").axes
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(0.05)


def test_prompts_stand_in_their_order_with_step_0_beside(prompts):
    figure = figures.ablation_scores(compact_results(load_runs(prompts)), POINT)
    left, right = figure.axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["point", "mask", "point\n+ bbox"]
    assert legend(figure) == ["step 0", "last step"]
    assert means(left) == [[0.5625] * 3]
    (hollow,) = [line for line in left.lines if line.get_label() == "step 0"]
    assert list(hollow.get_ydata()) == [0.25] * 3
    assert means(right) == [[0, 0]]  # the differences to point
    assert "minus that of point" in right.get_ylabel()
    assert "over seeds and videos" in left.get_title(loc="left")


def test_error_bars_are_the_intervals_over_seeds_and_videos(prompts):
    results = compact_results(load_runs(prompts))
    left, right = figures.ablation_scores(results, POINT).axes
    bars = left.containers[0][2][0].get_segments()
    half = 12.7062 * 0.0625  # two seeds, 1/8 apart, the same on all videos
    assert bars[0][:, 1] == pytest.approx([0.5625 - half, 0.5625 + half], abs=1e-4)
    # Videos that differ widen the bar; those of differences stay, since videos are paired.
    objects = results["video_id"].notna()
    easy = results["video_id"].where(objects, "0").astype(int) / 16 * objects
    left, right = figures.ablation_scores(results.assign(value=results["value"] + easy), POINT).axes
    wide = left.containers[0][2][0].get_segments()[0][:, 1]
    assert wide[1] - wide[0] > 2 * half * 1.001
    apart = right.containers[0][2][0].get_segments()[0][:, 1]
    assert apart == pytest.approx([0, 0], abs=1e-9)


def test_memories_are_two_series(memories):
    figure = figures.ablation_scores(compact_results(load_runs(memories)), MEMORIES)
    left, right = figure.axes
    assert legend(figure) == ["step 0", "without object pointers", "16 object pointers"]
    assert [t.get_text() for t in left.get_xticklabels()] == ["1", "4", "7"]
    expected = [0.25 + num / 32 + 1 / 128 for num in (1, 4, 7)]
    assert means(left)[0] == pytest.approx(expected, abs=1e-4)
    assert means(left)[1] == pytest.approx([v + 0.125 for v in expected], abs=1e-4)
    assert means(right)[0] == pytest.approx([3 / 32, 6 / 32], abs=1e-4)


def test_memories_without_a_second_setting(memories):
    results = compact_results(load_runs(memories))
    results = results[results[POINTERS] == 0].drop(columns=POINTERS)
    assert legend(figures.ablation_scores(results, MEMORIES)) == ["step 0", "last step"]


def test_splits_are_series(prompts):
    results = compact_results(load_runs(prompts))
    test = results[results["video_id"].notna() & (results["step"] > 0)].assign(split="test")
    figure = figures.ablation_scores(pd.concat([results, test]), POINT)
    assert legend(figure) == ["step 0", "validation", "test"]
    assert len(means(figure.axes[1])) == 2


def test_a_single_seed_has_a_dot_and_no_bar(memories):
    results = compact_results(load_runs(memories))
    left, _ = figures.ablation_scores(results[results["seed"] == 0], MEMORIES).axes
    (bars,) = left.containers[0][2]
    assert all(np.isnan(segment).any() or not len(segment) for segment in bars.get_segments())
    assert len(means(left)[0]) == 3


def test_horizon_has_a_panel_for_each_number_of_pointers(memories):
    figure = figures.horizon(compact_results(load_runs(memories)), title="Horizon")
    assert [a.get_title(loc="left") for a in figure.axes] == [
        "without object pointers",
        "16 object pointers",
    ]
    lines = [bars[0] for bars in figure.axes[0].containers]
    assert [bars.get_label() for bars in figure.axes[0].containers] == ["1", "4", "7"]
    assert list(lines[1].get_xdata()) == [8, 16, 32]
    assert list(lines[1].get_ydata()) == [0.5, 0.25, 0.125]
    # Settings stand beside each other, and no band covers another.
    assert lines[0].get_xdata()[0] < 8 < lines[2].get_xdata()[0]
    assert not any("FillBetween" in type(item).__name__ for item in figure.axes[0].collections)
    assert "over seeds, on these videos" in figure.get_suptitle()


def test_horizon_has_a_row_for_each_curve(memories):
    results = compact_results(load_runs(memories))
    returns = results[results["metric"] == "horizon/J"].assign(
        metric="horizon/recall_after_absence", value=0.75
    )
    figure = figures.horizon(pd.concat([results, returns]))
    labels = [(axes.get_ylabel(), axes.get_xlabel()) for axes in figure.axes]
    assert [label[0] for label in labels] == ["J", "", "found again (J > 0.5)", ""]
    assert "away" in labels[3][1]
    assert list(figure.axes[2].containers[0][0].get_ydata()) == [0.75] * 3


def test_a_score_far_below_is_written_not_drawn_to_scale(memories):
    results = compact_results(load_runs(memories))
    results["value"] = 0.5 + results["value"] / 8
    none = results[results[MASKMEM] == 1].assign(**{MASKMEM: 0, "value": 0.0625})
    none["run"] += "n"
    left, right = figures.ablation_scores(pd.concat([results, none]), MEMORIES).axes
    assert [text.get_text() for text in left.texts] == ["0.062,\nbelow"]
    assert left.get_ylim()[0] > 0.4
    assert right.texts[0].get_text().endswith(",\nbelow")
    near = none.assign(value=0.5)
    left, right = figures.ablation_scores(pd.concat([results, near]), MEMORIES).axes
    assert not left.texts
    assert left.get_ylim()[0] < 0.5


def test_mask_sizes_add_up_and_count_the_empty_ones():
    figure = figures.mask_sizes({"train": [0.0, 0.01, 0.02, 0.5], "val": [0.1, 1.0]})
    assert legend(figure) == ["train: 3, 1 empty", "val: 2"]
    filled = [p for p in figure.axes[0].patches if p.get_fill()]
    assert len(filled) == 2
    for patch in filled:
        heights = np.unique(patch.get_xy()[:, 1])
        assert heights.max() <= 2 / 3 + 1e-9


def test_nothing_to_draw_is_said(memories):
    results = compact_results(load_runs(memories))[:0]
    for draw in (lambda: figures.ablation_scores(results, POINT), lambda: figures.horizon(results)):
        with pytest.raises(UserError, match="nothing to draw"):
            draw()


def test_no_curve_and_no_mask_is_said(memories):
    (axes,) = figures.curves(load_curves(load_runs(memories)[:0])).axes
    assert axes.texts[0].get_text() == "no J&F yet"
    with pytest.raises(UserError, match="nothing to draw"):
        figures.mask_sizes({"train": [0.0]})


def test_many_series_differ_in_colour_or_marker():
    styles = figures._styles(14)
    assert len({(style["color"], style["marker"]) for style in styles}) == 14


def test_the_state_of_matplotlib_stays(memories):
    code = (
        "import sys, matplotlib\n"
        "from pathlib import Path\n"
        "from sam2train import figures\n"
        "from sam2train.results import load_curves, load_runs\n"
        "before = matplotlib.rcParams.copy()\n"
        f"figures.curves(load_curves(load_runs(Path({str(memories)!r})))).savefig('a.png')\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=memories,
        env={"PYTHONPATH": str(root), "PATH": "", "MPLCONFIGDIR": str(memories)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_csv_is_drawn_beside_itself(memories, prompts, tmp_path):
    for folder, names in ((memories, ["m.png", "m_horizon.png"]), (prompts, ["p.png"])):
        path = tmp_path / f"{names[0][0]}.csv"
        compact_results(load_runs(folder)).to_csv(path, index=False)
        written = figures.draw_results(path)
        assert [picture.name for picture in written] == names
        assert all(read_picture(picture).shape[1] > 600 for picture in written)


def test_presence_has_a_bar_for_each_frame_that_shows_an_object():
    rows = [("a", "1", t, 0.1 * (t != 1)) for t in range(3)] + [("b", "1", 0, 0.2)]
    masks = pd.DataFrame(rows, columns=["video_id", "object_id", "frame", "area"])
    (axes,) = figures.presence(masks).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    bars = [(bar.get_x() + 0.5, bar.get_y() + 0.4) for bar in axes.patches]
    assert [x for x, _ in bars] == [0, 2, 0]
    assert bars[0][1] == bars[1][1] < bars[2][1]
    with pytest.raises(UserError, match="nothing to draw"):
        figures.presence(masks[:0])


def test_parameters_name_the_modules_by_size():
    counts = {"total": 3e6, "trainable": 1e6, "memory_encoder": 1e6, "image_encoder": 2e6}
    run = {"run": "one", **{f"params/{name}": count for name, count in counts.items()}}
    run |= {"trainable/memory_encoder": 1e6, "trainable/image_encoder": 5e5}
    (axes,) = figures.parameters({**run, "params/other": np.nan}).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["memory_encoder", "image_encoder"]
    whole, trained = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (whole, trained) == ([1e6, 2e6], [1e6, 5e5])
    assert axes.get_title(loc="left") == "one: 1.00 M of 3.00 M are trained"
    with pytest.raises(UserError, match="no parameter counts"):
        figures.parameters({"path": "runs/x"})


def test_a_sortable_table_escapes_its_cells():
    text = figures.sortable(pd.DataFrame({"run": ["<b>"], "last": [0.12345]})).data
    assert "&lt;b&gt;" in text
    assert "0.123<" in text
    assert 'querySelectorAll("#sort' in text
