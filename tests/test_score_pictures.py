"""Figures of scores: what is drawn of which numbers."""

import numpy as np
import pytest

from sam2train.score_pictures import horizon_figure, matrix_figure


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_heat_map_has_its_numbers(tmp_path):
    panels = {"one": [[0.1, 0.2], [0.3, 0.4]], "two": [[0.5, 0.6], [0.7, 0.8]]}
    figure = matrix_figure(["1 click", "mask"], ["clean", "0.1"], panels, title="J&F")
    left, right, _bar = figure.axes
    assert texts(left) == ["0.100", "0.200", "0.300", "0.400"]
    assert texts(right) == ["0.500", "0.600", "0.700", "0.800"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1 click", "mask"]
    limits = {axes.images[0].get_clim() for axes in (left, right)}
    assert limits == {(0.1, 0.8)}  # a colour means the same in both
    figure.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 5000


def rows(values):
    return [
        {"metric": "horizon/J", "at": at, "value": value, "count": 3}
        for at, value in values.items()
    ]


def test_curves_and_what_is_not_asked():
    frames = [{"object_score": None, "visible": 1}]
    figure = horizon_figure({"a": rows({1: 0.9, 2: 0.7})}, {"a": frames})
    held, found, scores = figure.axes
    assert held.lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.7]]
    assert texts(held) == ["n=3", "n=3"]
    for axes in (found, scores):
        assert texts(axes) == ["nothing vanishes in these videos"]


def test_the_object_score_as_a_roc():
    frames = [
        {"object_score": score, "visible": visible}
        for score, visible in [(3, 1), (2, 1), (-1, 1), (1, 0), (-2, 0), (-3, 0)]
    ]
    shares = {"absence_recall": 2 / 3, "false_absences": 1 / 3}
    single = [
        {"metric": f"horizon/{name}", "at": None, "value": value, "count": 3}
        for name, value in shares.items()
    ]
    figure = horizon_figure({"a": rows({1: 0.9}) + single}, {"a": frames})
    curve, mark, _chance = figure.axes[2].lines
    assert "AUC 0.89" in curve.get_label()  # 8 of 9 pairs are in order
    assert "recall of absence 0.667 (n=3)\nfalse absences 0.333 (n=3)" in curve.get_label()
    false, true = np.array(curve.get_xydata()).T
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert mark.get_xydata()[0] == pytest.approx([1 / 3, 2 / 3])


def test_frames_of_one_kind_have_their_share_without_a_curve():
    frames = [{"object_score": score, "visible": 1} for score in (3, 2, -1)]
    share = {"metric": "horizon/false_absences", "at": None, "value": 1 / 3, "count": 3}
    figure = horizon_figure({"a": [*rows({1: 0.9}), share]}, {"a": frames})
    axes = figure.axes[2]
    assert texts(axes) == ["nothing vanishes in these videos"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["a\nfalse absences 0.333 (n=3)"]
