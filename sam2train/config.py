"""A YAML file and `key=value` words -> one frozen, typed object, or every problem in one error."""

import ast
import difflib
import json
import re
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sam2train.errors import UserError

_INT = r"[-+]?(?:0|[1-9][0-9]*)$"
_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
_NOT_FINITE = r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"  # read, so that fields can refuse
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}
# An experiment has about 150 values in 3 levels, a few kilobytes. What is far beyond that is a
# mistake or an attack, and is refused before it takes memory.
MAX_BYTES = 1 << 20  # of a file, and of its text once every alias is written out
MAX_VALUES = 10_000  # of a file, a value counted wherever an alias repeats it
MAX_DEPTH = 32  # levels of nesting, in a file and in a dotted key
MAX_PROBLEMS = 50  # lines of one message
_MAX_WORD = 1 << 16  # characters of a word's value that are parsed; a longer one is text
_SHOWN = 80  # characters of a key or a value in a message
_LIMITS = {
    "gt": "above {}",
    "ge": "of at least {}",
    "lt": "below {}",
    "le": "of at most {}",
    "multiple_of": "divisible by {}",
    "min_length": "of length {} or more",
    "max_length": "of length {} or less",
    "pattern": "matching {}",
}


class ConfigError(UserError):
    """Every problem of a config in one message, a line each; `problems` holds the lines."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  - ".join([f"{source}: {count}", *self.problems]))


class Section(BaseModel):
    """A frozen set of typed settings; keys are read by field name or alias, unknown ones refused.

    Besides the exact type, a float field takes a whole number and text that is a number (1e-5 is
    text to PyYAML), a tuple field a list, and a `dict[str, ...]` field nested mappings, joined to
    dotted names. Nothing else is converted. Bounds of a union stand at their branch:
    `Literal["full"] | Annotated[int, Field(ge=1)]`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_by_name=True,
        validate_by_alias=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, field in cls.model_fields.items():
            if len(_branches(field.annotation)) > 1 and field.metadata:
                # pydantic would compare the bound with values of every branch: TypeError for text.
                raise TypeError(f"{cls.__name__}.{name}: put the bounds at one branch of the union")

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        for name, field in cls.model_fields.items():
            if field.alias and field.alias != name and field.alias in raw and name in raw:
                raw[field.alias] = _Twice((name, field.alias))
                del raw[name]
        return raw

    @field_validator("*", mode="before")
    @classmethod
    def _convert_field(cls, value: Any, info: Any) -> Any:
        if isinstance(value, _Twice):
            raise PydanticCustomError("given_twice", f"given twice, as {' and '.join(value)}")
        return _convert(value, cls.model_fields[info.field_name].annotation)


S = TypeVar("S", bound=Section)


class _Twice(tuple):
    """Both spellings of one field; its field validator reports them beside the other problems."""


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
                raise yaml.YAMLError(f"line {line}: the key {name} is not text; put it in quotes")
            if key.value in seen:
                lines = f"lines {seen[key.value]} and {line}"
                raise yaml.YAMLError(f"{lines}: the key {key.value} is there twice; keep one")
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
_scalar(_Loader, "int", _INT, "-+0123456789")
_scalar(_Loader, "float", f"{_FLOAT}|{_NOT_FINITE}", "-+.0123456789")
_scalar(_Loader, "merge", r"<<$", "<")
_scalar(_Dumper, "float", _FLOAT, "-+.0123456789")  # text like "1e-5" must come out in quotes
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _flow)
_Dumper.add_representer(tuple, _flow)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (UTF-8); UserError with the path for anything else."""
    path = Path(path)
    return read_yaml(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        if not path.exists():
            raise UserError(f"{path}: there is no such file; {_neighbours(path)}")
        if not path.is_file():  # opening a pipe would wait for whoever writes into it
            what = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {what}; expected a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path}: the file is larger than {MAX_BYTES:,} bytes; expected the settings of an "
            "experiment, a few kilobytes: is it the right file?"
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
        raw = _parse_yaml(text, _Loader)
    except _TooLarge as error:
        raise UserError(f"{source}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = str(error).replace('in "<unicode string>", ', "")
        raise UserError(f"{source} is not valid YAML: {where}") from error
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"holds {_show(raw)}"
        raise UserError(f"{source} {what}; expected a mapping of sections, such as `model:`")
    return raw


class _TooLarge(UserError):
    """A YAML text that would become more values, text or levels than the limits allow."""


def _parse_yaml(text: str, loader: type) -> Any:
    """The value of a YAML text within the limits; _TooLarge or what PyYAML raises for others."""
    _check_size(text, loader)
    return yaml.load(text, loader)


def _check_size(text: str, loader: type) -> None:
    """Raise _TooLarge for a text beyond the limits.

    PyYAML's events come one by one as the text is scanned, and nothing is built from them here: a
    text that would fill the memory is refused at the first event beyond a limit. An alias counts as
    what it stands for, so that ten lines of ten aliases each count as 10^10 values.
    """
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
            added = sizes.get(event.anchor, (1, 0, 0))  # PyYAML names an unknown anchor later
        else:
            continue
        if added is not None:
            held = rows[-1]
            rows[-1] = [held[0] + added[0], held[1] + added[1], max(held[2], added[2])]
        values, characters = (sum(row[k] for row in rows) for k in (0, 1))
        levels = len(rows) - 1 + rows[-1][2]
        for found, limit, what in (
            (values, MAX_VALUES, "values"),
            (characters, MAX_BYTES, "characters"),
            (levels, MAX_DEPTH, "levels of nesting"),
        ):
            if found > limit:
                line = event.start_mark.line + 1
                raise _TooLarge(
                    f"line {line}: more than {limit:,} {what}, aliases written out; expected the "
                    "settings of an experiment: shorten the list or leave the aliases out"
                )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor the folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"YAML files in {path.parent}: {', '.join(names) or 'none'}"


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> typed value from `a.b=value` and `--a.b=value`; the last of equal keys wins.

    A value is a Python literal (what `wandb agent` prints), null / true / false, a YAML
    flow list or mapping, else text. Mappings are flattened: `a={'b': 1}` is `a.b=1`.
    """
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"[^\W\d][^\s.]*(\.[^\s.]+)*", key):
            raise UserError(
                f"cannot read {word!r}; expected key=value, as in trainer.num_steps=100"
            )
        overrides |= flatten({key: _parse_value(text)})
    return overrides


def _parse_value(text: str) -> Any:
    words = {"null": None, "~": None, "true": True, "false": False}
    if text in words:
        return words[text]
    if len(text) > _MAX_WORD:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of a quoted path
            value = ast.literal_eval(text)
        # `1,2` and `{1, 2}` are Python too, but nobody who writes them means a tuple or a set.
        if _is_plain(value) and (not isinstance(value, tuple) or text[0] == "("):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if text[:1] in ("[", "{"):
        try:
            return _parse_yaml(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            pass
    return text


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def sweep_parameters(path: Path) -> dict[str, Any]:
    """Dotted key -> typed value of the file that `wandb agent` names in WANDB_SWEEP_PARAM_PATH.

    wandb 0.31 writes `wandb_version: 1` and, for each parameter, `name: {value: ...}`. It writes
    with PyYAML, so PyYAML's own rules are those that give each value the type it had.
    """
    try:
        raw = _parse_yaml(_read_text(Path(path)), yaml.SafeLoader)
        parameters = {k: v["value"] for k, v in raw.items() if k != "wandb_version"}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the sweep's parameters cannot be read from {path}: {error}") from error
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} does not hold a sweep's parameters; expected `name: {{value: ...}}` for each; "
            "unset WANDB_SWEEP_PARAM_PATH to run without them"
        ) from error
    return flatten(parameters)


def apply_overrides(
    raw: Mapping[str, Any],
    overrides: Mapping[str, Any],
    section: type[Section] | None = None,
) -> dict[str, Any]:
    """A new nested mapping with each dotted key set; sections that are absent or null are made.

    Where `section` is given, an override also takes the place of its key's other spelling.
    """
    result = _copy(raw)
    given: dict[tuple[str, ...], str] = {}
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        if len(parents) >= MAX_DEPTH:
            raise UserError(
                f"{_shorten(dotted)}: {len(parents) + 1} names joined by dots, at most {MAX_DEPTH} "
                "are read; expected section.key, such as trainer.num_steps"
            )
        inner = result
        for depth, parent in enumerate(parents, 1):
            if inner.get(parent) is None:
                inner[parent] = {}
            inner = inner[parent]
            if not isinstance(inner, dict):
                raise UserError(
                    f"cannot set {dotted}: {'.'.join(parents[:depth])} is {_show(inner)}, "
                    "which holds no keys"
                )
        spellings = _spellings(section, dotted)
        if (first := given.setdefault((*parents, *spellings), leaf)) != leaf and spellings:
            raise UserError(f"{dotted}: given twice, as {first} and {leaf}; keep one")
        for spelling in spellings:
            inner.pop(spelling, None)
        inner[leaf] = _copy(value)
    return result


def _spellings(section: type[Section] | None, dotted: str) -> list[str]:
    """Both spellings of the last part of a dotted key; none where the key is not known."""
    kind: Any = section
    for part in dotted.split("."):
        known = isinstance(kind, type) and issubclass(kind, Section)
        field = _fields(kind).get(part) if known else None
        if field is None:
            return []
        owner, kind = kind, _branches(field.annotation)[0]
    return [name for name, other in _fields(owner).items() if other is field]


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Nested -> dotted keys, in order; lists stay whole, and so do empty mappings."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def build(section: type[S], raw: Mapping[str, Any], source: str) -> S:
    """`section` made from nested values. ConfigError lists all that is wrong, under `source`."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        # A union reports each of its branches: as one field they give one and the same line.
        # A default that follows from other fields cannot fail but with them.
        errors = [
            e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"
        ]
        lines = [_problem(section, raw, e) for e in errors[:MAX_PROBLEMS]]
        if more := len(errors) - MAX_PROBLEMS:
            lines += [f"and {more:,} more"] if more > 0 else []
        raise ConfigError(source, list(dict.fromkeys(lines))) from None


def to_yaml(section: Section) -> str:
    """YAML that `load_yaml` and `build` read back to an equal object; keys in field order."""
    content = section.model_dump()
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)


def _branches(kind: Any) -> list[Any]:
    """The types that a union allows, without null; [kind] for any other type."""
    if get_origin(kind) in (Union, types.UnionType):
        return [arg for arg in get_args(kind) if arg is not type(None)]
    return [kind]


def _convert(value: Any, kind: Any) -> Any:
    """`value` as the declared type `kind` has it, or `value` itself: pydantic judges the result."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _convert(value, args[0])
    if origin in (Union, types.UnionType):
        exact = (
            b is type(value) or (get_origin(b) is Literal and value in get_args(b)) for b in args
        )
        changed = (new for b in args if (new := _convert(value, b)) is not value)
        return value if any(exact) else next(changed, value)
    if origin is Literal and value in args and type(value) is not type(args[args.index(value)]):
        raise PydanticCustomError("literal_error", "True is not 1")  # for pydantic it is
    if kind is float and isinstance(value, str) and re.match(f"{_INT}|{_FLOAT}", value):
        return float(value)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        fixed = origin is tuple and args[-1] is not ...
        kinds = args if fixed and len(args) == len(value) else [args[0]] * len(value)
        return origin(_convert(item, k) for item, k in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, args[1]) for key, item in flatten(value).items()}
    return value


def _expected(kind: Any, bounds: Sequence[Any] = ()) -> str:
    """What a field of this type and these bounds takes, in a user's words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [m for arg in args[1:] for m in getattr(arg, "metadata", [arg])]
        return _expected(args[0], [*bounds, *inner])
    if origin in (Union, types.UnionType):
        null = ["null"] if type(None) in args else []
        return " or ".join([*(_expected(b, bounds) for b in _branches(kind)), *null])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (tuple, list):
        fixed = origin is tuple and args[-1] is not ...
        each = _expected(args[0]) if len({*args} - {...}) == 1 else ", ".join(map(_expected, args))
        text = f"a list of {len(args)} items, each {each}" if fixed else f"a list, each item {each}"
    elif origin is dict:
        text = f"a mapping of names, each to {_expected(args[1])}"
    elif isinstance(kind, type) and issubclass(kind, Section):
        return "a section with keys of its own"
    else:
        text = _WORDS.get(kind, str(kind))
    limits = [
        phrase.format(getattr(bound, name))
        for bound in bounds
        for name, phrase in _LIMITS.items()
        if getattr(bound, name, None) is not None
    ]
    return " ".join([text, " and ".join(limits)]).strip()


def _problem(section: type[Section], raw: Mapping[str, Any], error: Any) -> str:
    """One line: dotted path, value as written, what was expected, a way out."""
    kind, bounds, path, value = section, (), "", raw
    *parents, last = error["loc"] or [""]
    too_short = error["type"] == "missing" and isinstance(last, int)  # an item of a fixed list
    for key in parents if too_short else error["loc"]:
        if len(branches := _branches(kind)) > 1:
            break  # the rest names a branch of the union
        kind = branches[0]
        if isinstance(kind, type) and issubclass(kind, Section):
            field = _fields(kind).get(key)
            kind, bounds = (field.annotation, field.metadata) if field else (Any, ())
        elif args := get_args(kind):
            kind, bounds = args[1 if get_origin(kind) is dict else 0], ()
        name = key if isinstance(key, int) else _shorten(key)
        path += f"[{name}]" if isinstance(key, int) else f".{name}" if path else name
        try:
            value = value[key]
        except (LookupError, TypeError):  # a default, or a name that was joined from parts
            value = error["input"]
    got, cause = f"got {_show(value)}", error.get("ctx", {}).get("error")
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key, {got}; {_suggest(path, section)}"
    if error["type"] == "missing" and not too_short:
        return f"{path}: missing; expected {_expected(kind, bounds)}"
    if error["type"] == "given_twice":
        return f"{path}: {error['msg']}; keep one"
    if error["type"] in ("value_error", "assertion_error"):
        of_section = isinstance(kind, type) and issubclass(kind, Section)
        return ": ".join(filter(None, [path, f"{cause}" if of_section else f"{got}; {cause}"]))
    finite = ", not infinite or nan" if error["type"] == "finite_number" else ""
    line = f"{path}: {got}; expected {_expected(kind, bounds)}{finite}"
    return line + _way_out(value, _branches(kind))


def _way_out(value: Any, branches: Sequence[Any]) -> str:
    choices = [c for b in branches if get_origin(b) is Literal for c in map(str, get_args(b))]
    if near := difflib.get_close_matches(_shorten(str(value)), choices, n=1):
        return f"; did you mean {near[0]}?"
    lists = [b for b in branches if get_origin(b) in (tuple, list)]
    if lists and isinstance(value, (str, int, float)):
        kinds = get_args(lists[0])
        fixed = get_origin(lists[0]) is tuple and kinds[-1] is not ...
        return f"; write [{', '.join([str(value)] * (len(kinds) if fixed else 1))}]"
    if str in branches and isinstance(value, (bool, int, float)):
        return f"; for text write \"'{value}'\" on the command line, '{value}' in a file"
    return ""


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Every spelling of every key."""
    fields = section.model_fields
    return fields | {f.alias: f for f in fields.values() if f.alias}


def _names(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in _fields(section).items():
        yield prefix + name
        kind = _branches(field.annotation)[0]
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _names(kind, f"{prefix}{name}.")


def _suggest(path: str, section: type[Section]) -> str:
    """The nearest known names of all sections, or all names of this one."""
    known = list(_names(section))
    if path in known:
        return f"write it as {path.replace('.', ': ')}, one inside the other"
    parent, _, leaf = path.rpartition(".")
    likeness = {}
    for name in known:
        its_parent, _, its_leaf = name.rpartition(".")
        ratio = difflib.SequenceMatcher(None, leaf.lower(), its_leaf).ratio()
        likeness[name] = ratio + 0.1 * (its_parent == parent)
    best = max(likeness.values())
    if best >= 0.65:
        near = [f"`{name}`" for name in known if likeness[name] > best - 0.09]
        return f"did you mean {' or '.join(near)}?"
    here = [name for name in known if name.rpartition(".")[0] == parent]
    return f"known here: {', '.join(here)}"


def _show(value: Any) -> str:
    return _shorten(json.dumps(value, ensure_ascii=False, default=str))


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
