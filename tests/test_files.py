"""Files are written whole or not at all, read strictly, sorted and hashed in one way."""

import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam2train import files
from sam2train.errors import UserError
from sam2train.files import (
    REPOSITORY,
    file_hash,
    natural_key,
    read_json,
    replacing,
    resolve_path,
    write_bytes,
    write_rows,
    write_text,
)


def test_written_whole_with_folders_and_nothing_left_over(tmp_path):
    path = tmp_path / "new" / "folder" / "note.txt"
    write_text(path, "erste Zeile\nπ\n")
    assert path.read_bytes() == "erste Zeile\nπ\n".encode()
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # the block wrote nothing
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_disk_has_the_content_before_the_name_and_the_name_before_the_end(
    tmp_path, monkeypatch
):
    """A power cut after `replacing` finds the new file, one before it the old file."""
    calls = []
    flush, replace = os.fsync, os.replace

    def spy_flush(number):
        kind = "folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file"
        calls.append((f"flush {kind}", (tmp_path / "a").exists()))
        flush(number)

    def spy_replace(source, target):
        calls.append(("rename", (tmp_path / "a").exists()))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", spy_flush)
    monkeypatch.setattr(files.os, "replace", spy_replace)
    write_text(tmp_path / "a", "content")
    assert calls == [("flush file", False), ("rename", False), ("flush folder", True)]


@pytest.mark.parametrize("name", ["x" * 250 + ".json", "é" * 125, "🙂" * 60])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    write_text(tmp_path / name, "content")
    assert (tmp_path / name).read_text() == "content"


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "ours", "content")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_rows(tmp_path):
    rows = [{"step": 1, "name": "a,b"}, {"step": 2, "name": None}]
    write_rows(tmp_path / "rows.csv", iter(rows), ["step", "name"])
    assert (tmp_path / "rows.csv").read_bytes() == b'step,name\n1,"a,b"\n2,\n'
    with pytest.raises(ValueError, match="other"):  # a column nobody announced
        write_rows(tmp_path / "rows.csv", [{"other": 1}], ["step"])
    assert (tmp_path / "rows.csv").read_bytes() == b'step,name\n1,"a,b"\n2,\n'


def test_a_folder_that_cannot_be_made(tmp_path):
    write_text(tmp_path / "file", "content")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "note.txt", "content")


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


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text("")
    assert resolve_path("run.py").samefile(tmp_path / "run.py")  # the current folder comes first
    assert resolve_path("sam2train/model.py") == REPOSITORY / "sam2train" / "model.py"
    assert str(resolve_path("nowhere.pt")) == "nowhere.pt"


def test_file_hash(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(tmp_path / "abc") == expected


@pytest.mark.parametrize("raw", [b'{"a": [1, null]}', b'\xef\xbb\xbf{"a": [1, null]}\r\n'])
def test_json(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    assert read_json(tmp_path / "x.json", "expected a summary") == {"a": [1, None]}


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a": 1', "line 1 column 8"),
        (b'{"a": 1}\n{"a": 2}', "Extra data: line 2"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"\x00" * 8, "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "top level is a list"),
        (b"null", "top level is null"),
        (b'"text"', "top level is a str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_json_that_is_none(tmp_path, raw, fault):
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    for optional in (False, True):
        with pytest.raises(UserError) as caught:
            read_json(path, "expected a summary", optional=optional)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert fault in message
        assert message.endswith("; expected a summary")


def test_json_where_no_file_can_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file; expected a summary"):
        read_json(tmp_path / "x.json", "expected a summary")
    assert read_json(tmp_path / "x.json", "expected a summary", optional=True) == {}
    with pytest.raises(UserError, match="is a folder; expected"):
        read_json(tmp_path, "expected a summary", optional=True)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no regular file; expected"):
        read_json(tmp_path / "pipe.json", "expected a summary")
