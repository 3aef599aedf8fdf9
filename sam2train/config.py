"""A YAML file and `key=value` words -> one frozen, typed object, or every problem in one error."""

import ast
import difflib
import re
import types
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sam2train.config_yaml import (
    FLOAT,
    INT,
    MAX_DEPTH,
    dump_yaml,
    parse_yaml,
    quote,
    read_text,
    shorten,
)
from sam2train.errors import UserError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
}
MAX_PROBLEMS = 50  # lines of one message
_MAX_WORD = 1 << 16  # characters of a word's value that are parsed; a longer one is text
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


def one_of(name: Any, known: Collection[str]) -> Any:
    """The name, for the validator of a field; ValueError for one that is unknown."""
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"expected one of {', '.join(known)}{hint}")


class _Twice(tuple):
    """Both spellings of one field; its field validator reports them beside the other problems."""


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
        # `1,2` and `{1, 2}` are Python, too, but a user who writes them does not mean a tuple or a
        # set.
        if _is_plain(value) and (not isinstance(value, tuple) or text[0] == "("):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    if text[:1] in ("[", "{"):
        try:
            return parse_yaml(text)
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
        raw = parse_yaml(read_text(Path(path)), yaml.SafeLoader)
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
                f"{shorten(dotted)}: {len(parents) + 1} names joined by dots, at most {MAX_DEPTH} "
                "are read; expected section.key, such as trainer.num_steps"
            )
        inner = result
        for depth, parent in enumerate(parents, 1):
            if inner.get(parent) is None:
                inner[parent] = {}
            inner = inner[parent]
            if not isinstance(inner, dict):
                raise UserError(
                    f"cannot set {dotted}: {'.'.join(parents[:depth])} is {quote(inner)}, "
                    "which holds no keys"
                )
        spellings = _key_spellings(section, dotted)
        if (first := given.setdefault((*parents, *spellings), leaf)) != leaf and spellings:
            raise UserError(f"{dotted}: given twice, as {first} and {leaf}; keep one")
        for spelling in spellings:
            inner.pop(spelling, None)
        inner[leaf] = _copy(value)
    return result


def _key_spellings(section: type[Section] | None, dotted: str) -> list[str]:
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
        # A default that is computed from other fields fails only where they fail. pydantic also
        # reports a list with a wrong item as too short; the message on the item is enough.
        found = error.errors(include_url=False)
        parents = {e["loc"][:end] for e in found for end in range(len(e["loc"]))}
        errors = [
            e
            for e in found
            if e["type"] != "default_factory_not_called"
            and not (e["type"] == "too_short" and e["loc"] in parents)
        ]
        lines = [_problem(section, raw, e) for e in errors[:MAX_PROBLEMS]]
        if more := len(errors) - MAX_PROBLEMS:
            lines += [f"and {more:,} more"] if more > 0 else []
        raise ConfigError(source, list(dict.fromkeys(lines))) from None


def to_yaml(section: Section) -> str:
    """YAML that `load_yaml` and `build` read back to an equal object; keys in field order."""
    return dump_yaml(section.model_dump())


def _branches(kind: Any) -> list[Any]:
    """The types that a union allows, without null; [kind] for any other type."""
    if get_origin(kind) in (Union, types.UnionType):
        return [arg for arg in get_args(kind) if arg is not type(None)]
    return [kind]


def _convert(value: Any, kind: Any) -> Any:
    """`value` as the declared type `kind` has it, or `value` itself where it cannot be converted;
    pydantic then checks the result."""
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
    if kind is float and isinstance(value, str) and re.match(f"{INT}|{FLOAT}", value):
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
        name = key if isinstance(key, int) else shorten(key)
        path += f"[{name}]" if isinstance(key, int) else f".{name}" if path else name
        try:
            value = value[key]
        except (LookupError, TypeError):  # a default, or a name that was joined from parts
            value = error["input"]
    got, cause = f"got {quote(value)}", error.get("ctx", {}).get("error")
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
    if near := difflib.get_close_matches(shorten(str(value)), choices, n=1):
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


def described_keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Each key by its dotted name, as the code has it: what it takes, its default, its meaning."""
    for name, field in section.model_fields.items():
        kind = _branches(field.annotation)[0]
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from described_keys(kind, f"{prefix}{name}.")
            continue
        taken = _expected(field.annotation, field.metadata).replace(str(2**63), "2^63")
        if field.is_required():
            default = "required"
        elif field.default_factory_takes_validated_data:
            default = "see there"
        else:
            default = parse_back(field.get_default(call_default_factory=True))
        also = f" (or {field.alias})" if field.alias else ""
        yield prefix + name + also, taken, default, " ".join((field.description or "").split())


def parse_back(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(parse_back, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


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
