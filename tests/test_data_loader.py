"""The order of clips: by seed and place alone, each once an epoch."""

from itertools import islice

import pytest

from sam2train.data_loader import ClipSampler


def test_each_epoch_visits_every_clip_once():
    drawn = list(islice(ClipSampler(5, shuffle=True, seed=0), 20))
    for epoch in range(4):
        of_epoch = drawn[5 * epoch : 5 * epoch + 5]
        assert {e for e, _ in of_epoch} == {epoch}
        assert sorted(index for _, index in of_epoch) == list(range(5))
    orders = {tuple(index for _, index in drawn[5 * e : 5 * e + 5]) for e in range(4)}
    assert len(orders) > 1


def test_without_shuffling_the_order_is_that_of_the_videos():
    drawn = list(islice(ClipSampler(3, shuffle=False, seed=0), 5))
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_a_sampler_goes_on_at_its_place(start):
    whole = list(islice(ClipSampler(5, shuffle=True, seed=2), 20))
    rest = ClipSampler(5, shuffle=True, seed=2, start=start)
    assert list(islice(rest, 20 - start)) == whole[start:]
    assert list(islice(rest, 3)) == whole[start : start + 3]  # a second iteration starts anew


def test_another_seed_gives_another_order():
    orders = {tuple(islice(ClipSampler(8, shuffle=True, seed=seed), 8)) for seed in range(5)}
    assert len(orders) == 5
