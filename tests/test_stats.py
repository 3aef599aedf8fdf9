"""Intervals: values by hand, what cannot be known, and how often the truth lies inside."""

import math

import interval_coverage
import numpy as np
import pandas as pd
import pytest

from sam2train import stats
from sam2train.errors import UserError
from sam2train.stats import (
    Interval,
    crossed_difference,
    crossed_gains,
    crossed_mean,
    holm,
    mean_interval,
    paired_bootstrap,
    seed_difference,
)


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


@pytest.mark.parametrize(
    ("low", "high", "claim"),
    [(-0.076, 0.241, "not shown"), (0.01, 0.2, "shown"), (-0.2, -0.01, "a loss is shown")],
)
def test_a_verdict_follows_from_the_interval(low, high, claim):
    text = Interval(0.072, low, high, 12, "video").verdict()
    assert text == f"+0.072, 95 % {low:+.3f}..{high:+.3f}: {claim} on 12 videos"
    unknown = Interval(0.072, math.nan, math.nan, 2, "video").verdict()
    assert unknown == "an interval needs 5 videos, not 2"


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


def crossed(by_seed, **columns):
    """seed -> its scores by video (and object), as rows with the seed."""
    return pd.concat(scores(values, seed=seed, **columns) for seed, values in by_seed.items())


class TestOverSeedsAndVideos:
    def test_seeds_alone_differ(self):
        # Each seed has one score on all videos: Student's interval of three seeds.
        found = crossed_mean(crossed({s: np.full(6, 0.25 * s) for s in (1, 2, 3)}))
        reference = mean_interval([0.25, 0.5, 0.75])
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
        assert found.text() == "0.500 ± 0.621 (3 seeds x 6 videos)"

    def test_videos_alone_differ(self):
        values = [0.0, 0.1, 0.2, 0.4, 0.8]
        found = crossed_mean(crossed({s: np.array(values) for s in range(3)}))
        reference = mean_interval(values)
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high))

    def test_components_by_hand(self):
        # Rows -1 and 1, columns -2, -1, 0, 1, 2, and a rest of +-0.5: by the two-way table the
        # squared errors are 2 / 2 = 1 of seeds, 10 / (5 * 4) = 0.5 of videos, 0.25 * 10 / (5 * 4 *
        # 2 * 1) = 0.0625 of the rest; t is 12.7062 with 1 degree and 2.7764 with 4. All of the rest
        # but 1 / 16 of it is taken from the videos, nothing from the seeds (1 - 1 / 1).
        rest = np.array([1, -1, 1, -1, 0]) * 0.5
        rest[-1] = 0
        columns = np.arange(-2.0, 3.0)
        found = crossed_mean(crossed({0: columns - 1 + rest, 1: columns + 1 - rest}))
        left = 0.25 * 8 / (5 * 4 * 2)
        weights = 1.0, (0.5 - 15 / 16 * left) ** 2
        t = (weights[0] * 12.7062 + weights[1] * 2.77645) / sum(weights)
        assert found.value == pytest.approx(0)
        assert found.high == pytest.approx(t * math.sqrt(1 + 0.5 - left), rel=1e-5)

    def test_p_is_where_the_interval_ends_at_zero(self):
        from scipy import stats

        values = [0.1, 0.3, 0.2, 0.6]
        found = crossed_mean(crossed({s: np.full(5, v) for s, v in enumerate(values)}))
        assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
        rng = np.random.default_rng(0)
        rows = crossed({s: rng.normal(0.2, 0.3, 8) for s in range(4)})
        p = crossed_mean(rows).p
        assert 0.001 < p < 0.5
        assert crossed_mean(rows, level=1 - p).low == pytest.approx(0, abs=1e-9)

    def test_p_of_no_and_of_every_difference(self):
        zeros, ones = (crossed({s: np.full(5, v) for s in (0, 1)}) for v in (0.0, 1.0))
        assert crossed_difference(zeros, zeros).p == 1
        assert crossed_difference(zeros, ones).p == 0
        assert (
            crossed_difference(zeros, ones).text(sign=True).startswith("+1.000 ± 0.000 (2 paired")
        )

    def test_an_object_counts_once(self):
        # Video 0 has three objects with 1, six videos have one object with 0.
        first = pd.concat([scores([1.0] * 3, objects=3), scores(np.zeros(7)).iloc[1:]])
        rows = pd.concat([first.assign(seed=s) for s in (0, 1)])
        assert crossed_mean(rows).value == pytest.approx(3 / 9)

    def test_equal_seeds_are_paired(self):
        # What a seed does to both sides falls out of their difference; the order does not matter.
        rng = np.random.default_rng(0)
        luck, video = rng.normal(0, 0.3, 3), rng.normal(0, 0.3, 6)
        first = crossed({s: video + luck[s] for s in (0, 1, 2)})
        second = crossed({s: video + luck[s] + 0.125 for s in (2, 0, 1)})
        found = crossed_difference(first, second)
        assert (found.low, found.high) == pytest.approx((0.125, 0.125))
        assert found.text(sign=True) == "+0.125 ± 0.000 (3 paired seeds x 6 videos)"

    def test_other_seeds_give_welchs_interval(self):
        sides = {0: 0.1, 1: 0.2, 2: 0.25}, {3: 0.4, 4: 0.9}
        frames = [crossed({s: np.full(5, v) for s, v in side.items()}) for side in sides]
        found, reference = crossed_difference(*frames), seed_difference(*sides)
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
        assert found.text(sign=True).endswith("(2 seeds x 5 videos)")

    def test_videos_are_paired_where_seeds_are_not(self):
        video = np.linspace(0, 1, 6)
        first = crossed(dict.fromkeys((0, 1), video))
        found = crossed_difference(first, crossed(dict.fromkeys((2, 3), video + 0.5)))
        assert (found.low, found.high) == pytest.approx((0.5, 0.5))

    def test_a_seed_that_was_run_twice_counts_once(self):
        rows = crossed({0: np.zeros(5), 1: np.ones(5)})
        again = crossed({1: np.zeros(5)})
        assert crossed_mean(pd.concat([rows, again])).value == pytest.approx(0.25)

    def test_what_is_missing_is_said(self):
        one_seed = crossed({0: np.zeros(6)})
        assert crossed_mean(one_seed).text(sign=True) == "needs more than 1 seed"
        few = crossed({s: np.zeros(4) for s in range(3)})
        assert crossed_difference(few, few).text(sign=True) == "needs more than 4 videos"
        assert math.isnan(crossed_mean(few).p)

    def test_an_object_without_a_score_in_one_seed_is_left_out(self):
        rows = crossed({0: np.array([0.0] * 5 + [1.0]), 1: np.array([0.0] * 5 + [math.nan])})
        found = crossed_mean(rows)
        assert (found.value, found.num_videos) == (0.0, 5)
        with pytest.raises(UserError, match="nothing to compare"):
            crossed_mean(rows.assign(J_and_F=math.nan))
        with pytest.raises(UserError, match="no object has a J_and_F"):
            crossed_mean(rows[:0])

    def test_other_objects_are_refused_by_name(self):
        five, six = (crossed({s: np.zeros(num) for s in (0, 1)}) for num in (5, 6))
        for pair in ((five, six), (five, six.assign(seed=six["seed"] + 2))):
            with pytest.raises(UserError, match="object 1 of video v5"):
                crossed_difference(*pair)
        with pytest.raises(UserError, match="object 1 of video v5"):
            crossed_mean(crossed({0: np.zeros(5), 1: np.zeros(6)}))

    def test_gains_and_their_difference_by_hand(self):
        # From 0.25 and 0.5 to 0.5 on both sides: gains of 0.25 and 0, so -0.25 apart.
        start, better = (crossed({s: np.full(5, v) for s in (0, 1)}) for v in (0.25, 0.5))
        gains = crossed_gains(start, better), crossed_gains(better, better)
        assert set(gains[0]["J_and_F"]) == {0.25}
        assert len(gains[0]) == 10
        assert crossed_difference(*gains).value == -0.25
        assert crossed_mean(gains[0]).value == 0.25
        with pytest.raises(UserError, match="seeds 1: scored once only"):
            crossed_gains(start[start["seed"] == 0], better)


def test_holm_by_hand():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    corrected = holm([math.nan, 0.02, 0.03])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.04, 0.04])
    assert holm([]) == []


@pytest.mark.parametrize("num_videos", [12, 60])
@pytest.mark.parametrize("num_seeds", [(3,), (5,), (10,), (5, 5)], ids=str)
def test_coverage_over_seeds_and_videos(num_seeds, num_videos):
    """Seeds, videos, or both vary, with and without a rest, objects within videos: the 95 %
    interval holds the truth about as often as it says."""
    kinds = [kind for kind in interval_coverage.KINDS if kind != "seed > video"]
    found = {
        kind: interval_coverage.coverage(kind, num_seeds, num_videos, repeats=3000)
        for kind in kinds
    }
    assert all(0.93 <= share <= 0.975 for share in found.values()), found


@pytest.mark.parametrize("other", [interval_coverage.satterthwaite, interval_coverage.bootstrap])
def test_what_was_tried_in_its_place_is_too_narrow(other):
    settings = {"method": other, "most": 1, "repeats": 1000}
    assert interval_coverage.coverage("both", (3,), 60, **settings) < 0.935
    assert interval_coverage.coverage("both", (3,), 60, most=1, repeats=1000) > 0.935
