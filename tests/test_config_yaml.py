"""YAML 1.2 as this project reads it: what is refused, and where."""

import os
import re
import tracemalloc

import pytest

from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-05", 1e-5),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("None", "None"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-5'", "1e-5"),
        ("1e", "1e"),
        ("[1, point]", [1, "point"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(write, text, value):
    loaded = load_yaml(write(f"key: {text}\n"))["key"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_key_on_stays_text(write):
    assert load_yaml(write("on: 1\ny: 2\n")) == {"on": 1, "y": 2}


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_utf8_with_and_without_a_byte_order_mark(write, start):
    assert load_yaml(write(start + "key: größe\r\n".encode())) == {"key": "größe"}


def test_duplicate_keys_name_both_lines(write):
    path = write("train:\n  lr: 1\n  num_steps: 2\n  'lr': 3\n")
    with pytest.raises(UserError, match=r"lines 2 and 4: the key lr is there twice") as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


def test_equal_keys_of_different_sections_and_merged_keys_are_no_duplicates(write):
    text = "a: {base: &a {lr: 1, x: 1}, b: &b {<<: *a, lr: 2}}\nc: {<<: *b, x: 3}\n"
    assert load_yaml(write(text))["c"] == {"lr": 2, "x": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a mapping"),
        ("# nothing\n", "is empty; expected a mapping"),
        ("- 1\n- 2\n", r"holds \[1, 2\]; expected a mapping"),
        ("hello", 'holds "hello"; expected a mapping'),
        ("a: [1\n", r"is not valid YAML: [^<]*line 1, column 4"),
        ("a: 1\n\tb: 2\n", r"is not valid YAML: [^<]*line 2"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML: expected a single document"),
        ("1: x\n", "line 1: the key 1 is not text; put it in quotes"),
        ("a:\n  true: x\n", "line 2: the key true is not text"),
        ("? [a, b]\n: x\n", "line 1: the key of several values is not text"),
        ("a: !!python/object:os.system {}\n", "is not valid YAML: could not determine"),
        ("a: " + "9" * 5000, "is not valid YAML: .*digits"),
        ("a: " + "[" * 500, "line 1: more than 32 levels of nesting"),
        ("a: 1\x00", "is not valid YAML: .*#x0000"),
        ("a: 'b\x1b[31mc'", "is not valid YAML: .*#x001b"),
        ("größe: 1".encode("utf-16"), "byte 0 is not UTF-8; save it as UTF-8"),
        ("größe: 1".encode("latin-1"), "byte 2 is not UTF-8; save it as UTF-8"),
    ],
)
def test_unreadable_files_are_errors_with_the_path(write, content, message):
    path = write(content)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(str(path))


LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "line 4: more than 10,000 values"),
        (LAUGHS.replace("[", "{x: [").replace("]", "]}"), "line 4: more than 10,000 values"),
        ("a: &a {x: 1}\nb: &b {<<: *a, y: *a}\nc: &c [*b, *c]\n", r"line 3: \*c contains"),
        ("a: &a [1, *a]", r"line 1: \*a contains itself"),
        ("a: &a {b: {c: [*a]}}", r"\*a contains itself"),
        ("&a a: *a\nb: &b\n  - {<<: *b}\n", r"line 3: \*b contains itself"),
        ("a: " + "[" * 10_000 + "]" * 10_000, "more than 32 levels"),
        ("a: " + "{b: " * 10_000 + "1" + "}" * 10_000, "more than 32 levels"),
        ("".join(f"{' ' * k}- \n" for k in range(500)), "more than 32 levels"),
        ("- " * 5_000 + "1", "more than 32 levels"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}]\n" for k in range(1, 50)),
            "32 levels",
        ),
        ("a: [" + "1," * 10_000 + "]", "more than 10,000 values"),
        ("".join(f"a{k}: 1\n" for k in range(5_001)), "more than 10,000 values"),
        (
            f"a: &a {'x' * 200_000}\nb: [*a, *a, *a, *a, *a]\n",
            "line 2: more than 1,048,576 characters",
        ),
        ("a: " + "x" * (1 << 20), "larger than 1,048,576 bytes"),
    ],
)
def test_bombs_are_refused_before_they_take_memory(write, text, message):
    path = write(text)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            load_yaml(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert "expected" in str(caught.value) or "write the values" in str(caught.value)
    assert peak < 20e6  # bytes


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)  # 100 MB of zeros
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="larger than 1,048,576 bytes; expected the settings"):
            load_yaml(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="is no regular file; expected a YAML file"):
        load_yaml(tmp_path / "x.yaml")


def test_aliases_within_the_limits_are_read(write):
    text = "a: &a [1, 2]\nb: {x: *a, y: &s text, z: *s}\nc: [*a, *a]\n"
    assert load_yaml(write(text)) == {
        "a": [1, 2],
        "b": {"x": [1, 2], "y": "text", "z": "text"},
        "c": [[1, 2], [1, 2]],
    }
    deep = "a: " + "[" * 31 + "]" * 31  # 32 levels with the mapping
    assert load_yaml(write(deep))["a"] == eval("[" * 31 + "]" * 31)
    with pytest.raises(UserError, match="32 levels"):
        load_yaml(write("a: " + "[" * 32 + "]" * 32))
    whole = load_yaml(write("a: [" + "1," * 9_997 + "]"))  # with the mapping, the key and the list
    assert len(whole["a"]) == 9_997
    with pytest.raises(UserError, match="10,000 values"):
        load_yaml(write("a: [" + "1," * 9_998 + "]"))


def test_missing_file_names_its_neighbours(write, tmp_path):
    near = write("a: 1", "coco_point.yaml")
    with pytest.raises(UserError, match=f"no such file; did you mean {re.escape(str(near))}"):
        load_yaml(tmp_path / "coco_pont.yaml")
    with pytest.raises(UserError, match=r"YAML files in .*: coco_point\.yaml"):
        load_yaml(tmp_path / "zzz")
    with pytest.raises(UserError, match="nor the folder"):
        load_yaml(tmp_path / "none" / "x.yaml")
    with pytest.raises(UserError, match="is a folder; expected a YAML file"):
        load_yaml(tmp_path)
