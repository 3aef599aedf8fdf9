"""Intervals: values by hand, what cannot be known, and how often the truth lies inside."""

import math

import numpy as np
import pandas as pd
import pytest

from sam2train import stats
from sam2train.errors import UserError
from sam2train.stats import Interval, mean_interval, paired_bootstrap, seed_difference


def scores(values, *, objects=1, **columns) -> pd.DataFrame:
    """A score for each video and object, from (videos,) or (videos, objects) values."""
    values = np.reshape(values, (-1, objects))
    rows = [
        {"video_id": f"v{v}", "object_id": str(o + 1), "J_and_F": values[v, o], **columns}
        for v in range(len(values))
        for o in range(objects)
    ]
    return pd.DataFrame(rows)


def test_mean_interval_by_hand():
    # Mean 2, standard deviation 1, so 1 / sqrt(3) times the 97.5 % quantile of t with 2 degrees.
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.value, found.num) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(found.high - 2)
    assert found.text() == "2.000 ± 2.484 (3 seeds)"


def test_one_value_has_no_interval_and_says_so():
    found = mean_interval([0.5])
    assert not found.known
    assert found.text() == "0.500 (1 seed: no interval)"


@pytest.mark.parametrize("values", [[], [0.1, math.nan]])
def test_a_mean_of_nothing_or_nan_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_text_shows_signs_and_uneven_sides():
    uneven = Interval(0.012, -0.003, 0.020, 12, "video")
    assert uneven.text(sign=True) == "+0.012 [-0.003, +0.020] (12 videos)"
    assert mean_interval([0.1, 0.1]).text(sign=True) == "+0.100 ± 0.000 (2 seeds)"


def test_equal_seeds_are_paired():
    first, second = {0: 0.1, 1: 0.5, 2: 0.9}, {2: 1.0, 0: 0.2, 1: 0.6}
    found = seed_difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)
    assert found.unit == "paired seed"


def test_other_seeds_give_welchs_interval():
    from scipy import stats

    first, second = {0: 0.1, 1: 0.2, 2: 0.25}, {3: 0.4, 4: 0.9}
    found = seed_difference(first, second)
    reference = stats.ttest_ind([*second.values()], [*first.values()], equal_var=False)
    assert (found.low, found.high) == pytest.approx(reference.confidence_interval(0.95))
    assert found.num == 2


def test_a_single_seed_on_one_side_has_no_interval():
    found = seed_difference({0: 0.1, 1: 0.3}, {5: 0.5})
    assert found.value == pytest.approx(0.3)
    assert not found.known


def test_seeds_without_any_spread():
    found = seed_difference({0: 0.5, 1: 0.5}, {2: 0.75, 3: 0.75})
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


def test_bootstrap_of_a_constant_gain_is_exact():
    first = scores(np.linspace(0.1, 0.9, 12))
    found = paired_bootstrap(first, first.assign(J_and_F=first["J_and_F"] + 0.125))
    assert (found.low, found.value, found.high) == pytest.approx((0.125, 0.125, 0.125))
    assert (found.num, found.unit) == (12, "video")


def test_bootstrap_does_not_see_how_hard_a_video_is():
    rng = np.random.default_rng(0)
    gain = rng.normal(0.05, 0.01, 12)
    easy, hard = np.full(12, 0.5), rng.uniform(0, 1, 12)
    found = [paired_bootstrap(scores(s), scores(s + gain)) for s in (easy, hard)]
    assert found[0].low == pytest.approx(found[1].low)
    assert found[0].low > 0.03


def test_bootstrap_gives_the_reported_mean_over_objects():
    # Video 0 has three objects, the others one: an object counts once, as in the reported score.
    first = pd.concat([scores([0.0, 0.0, 0.0], objects=3), scores(np.zeros(6)).iloc[1:]])
    second = first.assign(J_and_F=(first["video_id"] == "v0").astype(float))
    assert paired_bootstrap(first, second).value == pytest.approx(3 / 8)


def test_an_object_without_a_score_does_not_count():
    first, second = scores(np.zeros(7)), scores(np.full(7, 0.5))
    first.loc[6, "J_and_F"] = second.loc[6, "J_and_F"] = math.nan
    found = paired_bootstrap(first, second)
    assert (found.value, found.num) == (0.5, 6)
    with pytest.raises(UserError, match="nothing to compare"):
        paired_bootstrap(first[6:], second[6:])


def test_bootstrap_averages_the_seeds_of_a_group():
    one, two = scores(np.zeros(6)), scores(np.full(6, 0.2))
    found = paired_bootstrap(scores(np.zeros(6)), pd.concat([one, two]))
    assert found.value == pytest.approx(0.1)


def test_bootstrap_is_repeatable_and_turns_its_sign():
    rng = np.random.default_rng(3)
    first, second = scores(rng.uniform(size=10)), scores(rng.uniform(size=10))
    there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert there == paired_bootstrap(first, second)
    assert back.value == pytest.approx(-there.value)
    assert back.low == pytest.approx(-there.high, abs=0.02)


def test_few_videos_have_no_interval():
    found = paired_bootstrap(scores(np.zeros(4)), scores(np.ones(4)))
    assert (found.value, found.known) == (1.0, False)
    assert found.text() == "1.000 (4 videos: no interval)"
    assert found.text(sign=True) == "needs more than 4 videos"  # no difference without its interval


def test_other_videos_are_refused_by_name():
    with pytest.raises(UserError, match="object 1 of video v5"):
        paired_bootstrap(scores(np.zeros(5)), scores(np.zeros(6)))


def test_coverage_of_the_bootstrap(monkeypatch):
    """A dozen videos: the 95 % interval holds the truth about as often as it says."""
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 999)
    rng = np.random.default_rng(1)
    zeros, hits = scores(np.zeros(12)), 0
    for _ in range(120):
        found = paired_bootstrap(zeros, scores(rng.normal(0.1, 0.2, 12)))
        hits += found.low <= 0.1 <= found.high
    assert 0.90 <= hits / 120 <= 0.99


def test_coverage_of_three_seeds():
    rng = np.random.default_rng(2)
    found = [mean_interval(rng.normal(0.4, 0.02, 3)) for _ in range(1000)]
    assert 0.93 <= np.mean([i.low <= 0.4 <= i.high for i in found]) <= 0.97
