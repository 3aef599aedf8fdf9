"""Files are written whole or not at all, read strictly, sorted and hashed in one way."""

import os
import stat
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam2train import files
from sam2train.config_yaml import load_yaml
from sam2train.data_rle import decode_segmentation
from sam2train.errors import UserError
from sam2train.files import (
    MAX_FILE_NAME,
    REPOSITORY,
    file_hash,
    file_name,
    natural_key,
    printable,
    read_json,
    replacing,
    resolve_path,
    size_limit,
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


# Names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("dog 1/größe_日本.png", "dog 1/größe_日本.png"),
        (7, "7"),
        ("", ""),
        ("[/red][bold]:cat:", "[/red][bold]:cat:"),
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("\x9b31m", r"\x9b31m"),  # an escape sequence in one character
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\r\nb\tc\x00", r"a\r\nb\tc\x00"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),  # shows as abcexe.jpg
        ("a\u2066b\u200b\ufeff", r"a\u2066b\u200b\ufeff"),
        ("a\u2028b\x85", r"a\u2028b\x85"),
        ("\udcff.png", r"\udcff.png"),  # a byte that is not UTF-8, as Python reads file names
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_messages_keep_their_lines():
    assert printable("a\nb\r\x1b[2J", lines=True) == "a\nb\\r\\x1b[2J"


@given(st.text())
def test_anything_is_printable_and_can_be_written(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dog-1_größe.日本 2", "dog-1_größe.日本 2"),
        (7, "7"),
        ("", "_"),
        (".", "_"),
        ("..", "__"),
        ("../../etc/passwd", "_._.._etc_passwd"),
        (".hidden", "_hidden"),
        ("name.", "name_"),
        (" name ", "_name_"),
        ('a/b\\c:d*e?f"g<h>i|j', "a_b_c_d_e_f_g_h_i_j"),
        ("a\x00b\nc\x1b[0m", "a_b_c_[0m"),
        ("\u202egpj", "_gpj"),
        ("\udcff", "_"),
        ("CON", "_CON"),
        ("con.txt", "_con.txt"),
        ("Lpt1 .a.b", "_Lpt1 .a.b"),
        ("COM¹", "_COM¹"),
        ("CONSOLE", "CONSOLE"),
        ("x" * 120, "x" * 120),
        # printf "%0.sx" $(seq 300) | sha256sum
        ("x" * 300, "x" * 111 + "-0d4e2ca9"),
    ],
)
def test_names_of_files(text, name):
    assert file_name(text) == name
    taken = set()
    assert file_name(text, taken) == name
    assert len(taken) == 1


def test_names_that_a_file_system_takes_for_one_are_told_apart():
    texts = ["Cat", "cat", "CAT", "a/b", "a_b", "a:b", 1, "1", "é", "e\u0301", "straße", "STRASSE"]
    texts += ["", "_", "..", "__", "x" * 300, "X" * 300, 1, "1"]
    taken = set()
    names = [file_name(text, taken) for text in texts]
    assert names[0] == "Cat"
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in names}) == len(texts)
    again = set()
    assert [file_name(text, again) for text in texts] == names


@given(st.lists(st.text(max_size=400)))
def test_any_texts_give_names_for_one_folder(texts):
    taken = set()
    names = [file_name(text, taken) for text in texts]
    assert len({name.casefold() for name in names}) == len(texts)
    for name in names:
        assert 0 < len(name.encode()) <= MAX_FILE_NAME + 9
        assert os.path.basename(name) == name
        assert name.isprintable()
        assert name[0] not in ". "
        assert name[-1] not in ". "
        assert not set(name) & set('<>:"/\\|?*')


@pytest.mark.parametrize(
    "text", ["..", "", "x" * 300, "🙂" * 100, "a\x00b", "CON", "\udcff", "a/b"]
)
def test_the_file_system_takes_them(tmp_path, text):
    path = tmp_path / f"step_000100_{file_name(text, set())}.png"
    write_text(path, "content")
    assert list(tmp_path.iterdir()) == [path]


def test_partial_files_of_killed_saves_are_swept_up(tmp_path):
    for name in (".last.pt.123.part", ".summary.json.9.part", "last.pt", ".hidden", "x.part"):
        (tmp_path / name).touch()
    files.sweep_partials(tmp_path)
    files.sweep_partials(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", ".hidden", "x.part"}


def test_limits_of_sizes_are_multiplied_by_the_environment_alone(tmp_path, monkeypatch):
    path = tmp_path / "large.yaml"
    path.write_text("values: [" + "1, " * 12_000 + "1]\n")
    corners = [value for k in range(120_000) for value in (k % 7, k % 5)]
    for read in (lambda: load_yaml(path), lambda: decode_segmentation([corners], (8, 8))):
        monkeypatch.delenv("SAM2TRAIN_LIMITS", raising=False)
        with pytest.raises((UserError, ValueError), match="SAM2TRAIN_LIMITS=10"):
            read()
        monkeypatch.setenv("SAM2TRAIN_LIMITS", "2")
        assert read() is not None


@pytest.mark.parametrize("text", ["", "many", "nan", "inf", "1e400", "0", "-3", "0.5"])
def test_a_multiple_that_is_no_number_is_an_error(monkeypatch, text):
    monkeypatch.setenv("SAM2TRAIN_LIMITS", text)
    with pytest.raises(UserError, match=r"SAM2TRAIN_LIMITS=.*expected a number"):
        size_limit(10)
