"""YAML text <-> plain values: version 1.2, each key once, within limits of size and depth."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sam2train.errors import UserError
from sam2train.files import MORE_ALLOWED, shorten, size_limit

INT = r"[-+]?(?:0|[1-9][0-9]*)$"
FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
_NOT_FINITE = r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"  # read, so that fields can refuse

# An experiment has about 150 values in 3 levels, a few kilobytes. What is far beyond that is a
# mistake or an attack, and is refused before it takes memory.
MAX_BYTES = 1 << 20  # of a file, and of its text once every alias is written out
MAX_VALUES = 10_000  # of a file, a value counted wherever an alias repeats it
MAX_DEPTH = 32  # levels of nesting, in a file and in a dotted key


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core scalars, text keys, each key once. 010 and 0x10 stay text, and no int field
    takes text; merge keys (`<<: *base`) work."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Not in construct_mapping: merged keys stand there next to those that override them.
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                name = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise yaml.YAMLError(
                    f"line {line}: the key {shorten(name)} is not text; put it in quotes"
                )
            if key.value in seen:
                lines = f"lines {seen[key.value]} and {line}"
                raise yaml.YAMLError(
                    f"{lines}: the key {shorten(key.value)} is there twice; keep one"
                )
            seen[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """What YAML 1.1 and YAML 1.2 readers take for the same values."""


def _scalar(dialect: type, tag: str, pattern: str, first: str) -> None:
    """Plain text that matches is a `tag`; `first` holds the characters that it can begin with."""
    tag = f"tag:yaml.org,2002:{tag}"
    dialect.add_implicit_resolver(tag, re.compile(pattern), [*first] or [""])


def _flow(dumper: _Dumper, items: Sequence[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes U+0085 as it is and reads it back as a space, unless the text is in quotes.
    quotes = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, quotes)


_scalar(_Loader, "bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_scalar(_Loader, "null", r"(?:~|null|Null|NULL)$", "~nN")
_scalar(_Loader, "null", r"$", "")
_scalar(_Loader, "int", INT, "-+0123456789")
_scalar(_Loader, "float", f"{FLOAT}|{_NOT_FINITE}", "-+.0123456789")
_scalar(_Loader, "merge", r"<<$", "<")
_scalar(_Dumper, "float", FLOAT, "-+.0123456789")  # text like "1e-5" must come out in quotes
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _flow)
_Dumper.add_representer(tuple, _flow)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (UTF-8); UserError with the path for anything else."""
    path = Path(path)
    return read_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file (UTF-8) of at most `MAX_BYTES`; UserError with the path for others."""
    try:
        if not path.exists():
            raise UserError(f"{path}: there is no such file; {_neighbours(path)}")
        if not path.is_file():  # opening a pipe would wait until another program writes into it
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {what}; expected a YAML file")
        with path.open("rb") as file:
            content = file.read(size_limit(MAX_BYTES) + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > size_limit(MAX_BYTES):
        raise UserError(
            f"{path}: the file is larger than {size_limit(MAX_BYTES):,} bytes; expected the "
            f"settings of an experiment, a few kilobytes: is it the right file? {MORE_ALLOWED}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text"
        ) from error


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in a YAML 1.2 text; UserError under the name `source` for anything else."""
    try:
        raw = parse_yaml(text)
    except _TooLarge as error:
        raise UserError(f"{source}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = str(error).replace('in "<unicode string>", ', "")
        raise UserError(f"{source} is not valid YAML: {where}") from error
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds {quote(raw)}"
        raise UserError(f"{source} {what}; expected a mapping of sections, such as `model:`")
    return raw


class _TooLarge(UserError):
    """A YAML text that would become more values, text or levels than the limits allow."""


def parse_yaml(text: str, loader: type = _Loader) -> Any:
    """The value of a YAML text; UserError beyond the limits, else what PyYAML raises."""
    _check_size(text, loader)
    return yaml.load(text, loader)


def _check_size(text: str, loader: type) -> None:
    """Raise _TooLarge for a text beyond the limits.

    PyYAML's events come one by one as the text is scanned, and nothing is built from them here: a
    text that would fill the memory is refused at the first event beyond a limit. An alias counts as
    what it stands for, so that ten lines of ten aliases each count as 10^10 values.
    """
    max_values, max_characters = size_limit(MAX_VALUES), size_limit(MAX_BYTES)
    sizes: dict[str, tuple[int, int, int]] = {}  # anchor -> values, characters and levels below it
    open_anchors: list[str | None] = []
    # A row each open list or mapping: values, characters and levels of what it holds so far.
    rows = [[0, 0, 0]]
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            sizes.pop(event.anchor, None)  # YAML allows a second anchor of the same name
            rows.append([1, 0, 0])
            added = None
        elif isinstance(event, yaml.CollectionEndEvent):
            values, characters, levels = rows.pop()
            added = (values, characters, levels + 1)
            if anchor := open_anchors.pop():
                sizes[anchor] = added
        elif isinstance(event, yaml.ScalarEvent):
            added = (1, len(event.value), 0)
            if event.anchor:
                sizes[event.anchor] = added
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in open_anchors:
                line = event.start_mark.line + 1
                raise _TooLarge(f"line {line}: *{event.anchor} contains itself; write the values")
            added = sizes.get(event.anchor, (1, 0, 0))  # PyYAML reports an unknown anchor later
        else:
            continue
        if added is not None:
            held = rows[-1]
            rows[-1] = [held[0] + added[0], held[1] + added[1], max(held[2], added[2])]
        values, characters = (sum(row[k] for row in rows) for k in (0, 1))
        levels = len(rows) - 1 + rows[-1][2]
        for found, limit, what in (
            (values, max_values, "values"),
            (characters, max_characters, "characters"),
            (levels, MAX_DEPTH, "levels of nesting"),
        ):
            if found > limit:
                line = event.start_mark.line + 1
                raise _TooLarge(
                    f"line {line}: more than {limit:,} {what}, aliases written out; expected the "
                    "settings of an experiment: shorten the list or leave the aliases out. "
                    f"{MORE_ALLOWED}, but for nesting"
                )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor the folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"YAML files in {path.parent}: {', '.join(names) or 'none'}"


def dump_yaml(content: Any) -> str:
    """YAML that `read_yaml` and PyYAML's YAML 1.1 read back as the same values."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)


def quote(value: Any) -> str:
    """A value as JSON, cut to what a message can show."""
    return shorten(json.dumps(value, ensure_ascii=False, default=str))
