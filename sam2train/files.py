"""Files: written whole or not at all, read strictly, named, sorted and hashed in one way."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gc
import hashlib
import io
import json
import math
import os
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sam2train.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def resolve_path(path: str | Path) -> Path:
    """A relative path from the current folder, else from the repository, else as it is.

    Raises:
        UserError: a name that no file can have.
    """
    if fault := name_fault(path):
        raise UserError(f"{shorten(str(path))}: {fault}; expected the path of a file or folder")
    path = Path(path).expanduser()
    in_repository = REPOSITORY / path
    return in_repository if not path.exists() and in_repository.exists() else path


def name_fault(path: str | Path) -> str | None:
    """Why no file can have a name like this; None for any other."""
    try:
        os.fspath(path).encode()
        os.lstat(Path(path).expanduser())
    except UnicodeEncodeError:
        return "has half a character (a lone surrogate)"
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as problem:  # too long, or links in a circle
        return problem.strerror
    except (ValueError, RuntimeError) as problem:  # NUL, or ~somebody who is not here
        return str(problem)
    return None


def shorten(text: str) -> str:
    """The text, cut to what a message can show."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


_MAX_SHOWN = 80  # characters of a key or a value in a message


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, for the new content of `path`.

    The block writes a file there. When it ends without an error, that file is flushed to the disk
    and takes the name `path`: whoever reads `path`, also after a power cut, finds the old content
    or the new one. After an error the temporary file is deleted. Missing folders are made.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:_NAME_KEPT]}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        with naming(path):
            yield partial
            _flush(partial)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # an error in the block is raised all the same
            partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows and some network disks flush no folders
        _flush(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError in the block the path of the file where it has none: what `write` raises on
    a full disk does not say where."""
    try:
        yield
    except OSError as problem:
        if problem.filename is None and problem.errno is not None:
            problem.filename = str(path)
        raise


_PARTIAL_SUFFIX = ".part"
_NAME_KEPT = 50  # characters, 200 bytes in UTF-8 at most: file systems allow 255 for the whole name


def _flush(path: Path) -> None:
    """Wait until the disk holds the file, or the folder's list of names."""
    number = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sweep_partials(folder: Path) -> None:
    """Delete what killed processes left of unfinished files: `replacing` takes it away otherwise.

    For the folders of a run where the run starts, as nobody else writes there.
    """
    for partial in Path(folder).glob(f".*{_PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` as `replacing` does."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` with the text in UTF-8, as `replacing` does."""
    write_bytes(path, text.encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Replace the file at `path` with a CSV, as `replacing` does; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_regular_file(path: Path, expected: str) -> bytes:
    """The bytes of a file that has some.

    Args:
        expected: what the message asks for, such as "expected a COCO dataset".

    Raises:
        UserError: no file, an empty one, or one that cannot be read.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; {expected}")
        if not path.is_file():  # opening a pipe would wait until another program writes into it
            what = "is a folder" if path.is_dir() else "is no regular file"
            raise UserError(f"{path}: {what}; {expected}")
        raw = path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror}); {expected}") from None
    if not raw.strip():
        raise UserError(f"{path}: the file is empty; {expected}")
    return raw


def read_json(path: Path, expected: str, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file (UTF-8, with or without a byte order mark).

    Args:
        expected: what the message asks for, such as "expected a COCO dataset".
        optional: a file that is not there gives an empty object.

    Raises:
        UserError: no file, one that cannot be read, or one that holds something else.
    """
    path = Path(path)
    with contextlib.suppress(OSError):  # which reading it says, too
        if optional and not path.exists():
            return {}
    return json_object(read_regular_file(path, expected), path, expected)


def json_object(
    raw: bytes, path: Path, expected: str, *, key_of_list: str | None = None
) -> dict[str, Any]:
    """The object in the bytes of a JSON file; see `read_json`.

    Args:
        key_of_list: where the file holds a list, the object returned has it under this key; None
            refuses a list.
    """
    try:
        content = _parse_json(raw)
    except UnicodeDecodeError as problem:
        fault = f"byte {problem.start} is not UTF-8"
        raise UserError(f"{path}: the file is not valid JSON ({fault}); {expected}") from None
    except RecursionError:
        fault = "it is nested too deeply"
        raise UserError(f"{path}: the file is not valid JSON ({fault}); {expected}") from None
    except ValueError as problem:
        raise UserError(f"{path}: the file is not valid JSON ({problem}); {expected}") from None
    if isinstance(content, list) and key_of_list is not None:
        return {key_of_list: content}
    if not isinstance(content, dict):
        kind = "null" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path}: the top level is {kind}, not an object; {expected}")
    return content


def _parse_json(raw: bytes) -> Any:
    """What the bytes hold. Large files are read by orjson where it is installed, in a third of the
    time, unless they have something that only Python reads, such as NaN."""
    if len(raw) >= _LARGE_JSON:
        collects = gc.isenabled()
        gc.disable()  # it would look at all that is read so far, again and again
        try:
            import orjson

            return orjson.loads(raw.removeprefix(codecs.BOM_UTF8))
        except (ImportError, ValueError):
            pass
        finally:
            if collects:
                gc.enable()
    return json.loads(raw.decode("utf-8-sig"))


_LARGE_JSON = 1 << 20


def check_regular(path: Path) -> None:
    """UserError for a folder, a pipe or a device where a file is to be read: opening a pipe would
    wait for whoever writes into it. One that is not there passes; reading it says so."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"{path}: cannot be read, it is {what}; expected a file")


def natural_key(name: str) -> tuple[str | int, ...]:
    """Sorts as people count: frame_2 before frame_10. Upper and lower case are one."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts))


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hash_of_rest(file)


def hash_of_rest(file: BinaryIO) -> str:
    """sha256 of an open file from its place on, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest came with Python 3.11
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_end(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a file, fewer where it is shorter."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - num_bytes))
        return file.read(num_bytes)


# torch writes zips without compression: the content of a file that torch wrote is no larger than
# the file.
# The factor leaves room for a file that somebody compressed, the constant for a small one.
MAX_UNPACKED_FACTOR = 8
MAX_UNPACKED_BYTES = 1 << 26


MORE_ALLOWED = "SAM2TRAIN_LIMITS=10 in the environment allows ten times as much"


def size_limit(usual: int) -> int:
    """`usual`, times the number in the environment variable SAM2TRAIN_LIMITS where that is set: for
    those who trust a file that is larger than any of its kind should be. No file can set it.

    Raises:
        UserError: it is no number of 1 or more.
    """
    text = os.environ.get("SAM2TRAIN_LIMITS", "1")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 1 <= factor <= 1e6:
        raise UserError(
            f"SAM2TRAIN_LIMITS={printable(text)[:_MAX_SHOWN]}; expected a number from 1 to 1e6, by "
            "which the limits of sizes are multiplied"
        )
    return int(usual * factor)


def check_unpacked_size(path: Path) -> None:
    """Raise UserError where a zip says that it unpacks to far more than it takes on disk.

    Nothing is unpacked: the sizes stand in the zip's directory, and torch takes memory by them. A
    file that is no zip passes.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = os.path.getsize(path)
    limit = size_limit(max(MAX_UNPACKED_FACTOR * size, MAX_UNPACKED_BYTES))
    if unpacked > limit:
        raise UserError(
            f"{path}: has {size:,} bytes and unpacks to {unpacked:,}, more than the {limit:,} that "
            "this program reads of such a file; torch compresses no checkpoint: where is it from? "
            f"{MORE_ALLOWED}"
        )


def printable(text: object, *, lines: bool = False) -> str:
    """The text with escapes, such as \\x1b, for characters that a terminal acts on or does not
    show.

    These are control characters (colours, cursor movements, window titles), marks that turn the
    direction of writing, spaces of no width and bytes that are not UTF-8. What rich reads in square
    brackets is left as it is: print it as a `rich.text.Text` or with markup=False.

    Args:
        lines: keep line breaks, for a message of several lines; an id or a name has none.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode()
        for c in str(text)
    )


# Windows takes these for devices, whatever suffix they have.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
_DEVICES |= {f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"}
MAX_FILE_NAME = 120  # bytes in UTF-8: room for a prefix and a suffix within the usual 255


def file_name(text: object, taken: set[str] | None = None) -> str:
    """A name for a file or folder on Linux, macOS and Windows; most texts stay as they are.

    Separators, control characters and what Windows forbids become `_`, and so does a dot or space
    at an end: a name never hides a file or leads out of its folder. What is longer than
    `MAX_FILE_NAME` ends in a hash of the text.

    Args:
        taken: names of the same folder so far, in the form in which file systems compare them; the
            new one is added. A text whose name is taken, also with other capitals, gets a hash.
    """
    text = str(text)
    name = "".join(c if c.isprintable() and c not in '<>:"/\\|?*' else "_" for c in text)
    name = re.sub(r"^[. ]|[. ]$", "_", name) or "_"
    if name.partition(".")[0].rstrip().upper() in _DEVICES:
        name = f"_{name}"
    if len(name.encode()) > MAX_FILE_NAME:
        name = _with_hash(name, text)
    if taken is None:
        return name
    candidate, count = name, 0
    while (key := unicodedata.normalize("NFC", candidate.casefold())) in taken:
        # Equal texts, such as the ids 1 and "1", differ by the count.
        candidate, count = _with_hash(name, f"{text}/{count}" if count else text), count + 1
    taken.add(key)
    return candidate


def _with_hash(name: str, text: str) -> str:
    """The name, cut to make room, with 8 digits of the text's sha256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return name.encode()[: MAX_FILE_NAME - 9].decode(errors="ignore").rstrip(". ") + f"-{digest}"
