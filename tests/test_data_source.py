import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sam2train.data_source import natural_key

# Natural order


def test_numbers_in_names_count_as_numbers():
    ordered = ["1", "2", "10", "a", "A2", "a10", "b", "frame_2b", "frame_10", "frame_10_1"]
    for seed in range(5):
        mixed = np.random.default_rng(seed).permutation(ordered).tolist()
        assert sorted(mixed, key=natural_key) == ordered


@given(
    st.text("abXY_-. é²٣", max_size=5),
    st.lists(st.integers(0, 10**12), unique=True, max_size=8),
    st.integers(0, 14),
    st.text("ab_.-", max_size=3),
)
def test_frames_of_one_pattern_sort_by_their_number(prefix, numbers, width, suffix):
    files = [f"{prefix}{number:0{width}}{suffix}" for number in numbers]
    expected = [f"{prefix}{number:0{width}}{suffix}" for number in sorted(numbers)]
    assert sorted(files, key=natural_key) == expected


@given(st.lists(st.text(max_size=8), max_size=8))
def test_any_names_have_an_order_that_ignores_case(files):
    keys = sorted(map(natural_key, files))  # TypeError where text met a number
    assert [natural_key(name) for name in sorted(files, key=natural_key)] == keys
    assert all(natural_key(name.casefold()) == natural_key(name) for name in files)
