"""The traps of YAML, the command line and `wandb agent`; and each message a user can get."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from sam2train.config import (
    ConfigError,
    Section,
    apply_overrides,
    build,
    flatten,
    parse_overrides,
    sweep_parameters,
    to_yaml,
)
from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError

# No deadline: the time of one example says more about the machine than about the code.
few = settings(deadline=None, max_examples=50)


class Data(Section):
    path: str = "train.json"
    note: str | None = None
    image_size: tuple[int, int] = (512, 512)
    prompts: tuple[Literal["point", "bbox", "mask"], ...] = ("point",)
    names: list[str] = Field(default_factory=list)
    include_center: bool = Field(False, alias="include_center_point")
    num_workers: int = Field(0, ge=0)


class Model(Section):
    gradient: Literal["full", "detached"] | Annotated[int, Field(ge=1)] = "full"
    version: Literal[1, 2] = 1
    num_maskmem: int = Field(7, ge=0, le=16)
    side: int | None = Field(None, ge=32, multiple_of=32)


class Train(Section):
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    rates: dict[str, float] = Field(default_factory=dict)
    dropout: float | None = Field(None, ge=0, lt=1)
    num_steps: int = Field(300, ge=0)
    mode: Literal["online", "offline", "disabled"] | None = None
    project: str = Field("demo", pattern="^[a-z]+$", max_length=8)

    @field_validator("num_steps")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("expected an even number")
        return value


class Config(Section):
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    train: Train = Field(default_factory=Train)

    @model_validator(mode="after")
    def _side_fits(self) -> "Config":
        if self.model.side is not None and self.data.image_size != (self.model.side,) * 2:
            raise ValueError("data.image_size and model.side differ")
        return self


def of(dotted: dict[str, Any]) -> Config:
    return build(Config, apply_overrides({}, dotted), "x.yaml")


def problem(key: str, value: Any) -> str:
    """The one line that an error has for one wrong value."""
    with pytest.raises(ConfigError) as caught:
        of({key: value})
    (line,) = caught.value.problems
    assert str(caught.value) == f"x.yaml: 1 problem\n  - {line}"
    return line


# --- YAML -----------------------------------------------------------------------------------------


def test_infinity_is_read_and_refused_by_a_field(write):
    assert load_yaml(write("key: -.inf"))["key"] == -float("inf")
    assert "not infinite or nan" in problem("train.lr", load_yaml(write("key: .nan"))["key"])


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("None", None),
        ("null", None),
        ("True", True),
        ("true", True),
        ("false", False),
        ("1e-05", 1e-5),
        ("-3", -3),
        ("['point', 'bbox']", ["point", "bbox"]),
        ("[point, bbox]", ["point", "bbox"]),
        ("[1e-3, 2]", [1e-3, 2]),
        ("(1, 2)", (1, 2)),
        ("[]", []),
        ("'2024'", "2024"),
        ("007", "007"),
        ("yes", "yes"),
        ("", ""),
        ("a=b", "a=b"),
        ("# a", "# a"),
        ("a: b", "a: b"),
        ("1,2", "1,2"),
        ("{1, 2}", "{1, 2}"),
        ("[1", "[1"),
        ("...", "..."),
        ("1j", "1j"),
        ("b'x'", "b'x'"),
        ("1if 1else 2", "1if 1else 2"),
        (r"C:\data\new", r"C:\data\new"),
        (r"'C:\data'", r"C:\data"),
        ("[" * 300, "[" * 300),
    ],
)
def test_values_of_words(text, value):
    for word in (f"a.b={text}", f"--a.b={text}"):
        parsed = parse_overrides([word])["a.b"]
        assert parsed == value
        assert type(parsed) is type(value)


def test_nested_parameters_are_flattened():
    assert parse_overrides(["--train={'lr': 1e-05, 'opt': {'name': 'adam'}}"]) == {
        "train.lr": 1e-5,
        "train.opt.name": "adam",
    }
    assert parse_overrides(["train={lr: 2, mode: null}"]) == {"train.lr": 2, "train.mode": None}
    assert parse_overrides(["train={}"]) == {"train": {}}


def test_the_last_of_equal_overrides_wins():
    words = ["train.lr=1", "--train.lr=2", "train={'lr': 3}", "--data.path=x"]
    assert parse_overrides(words) == {"train.lr": 3, "data.path": "x"}


@pytest.mark.parametrize(
    "word", ["lr", "--lr", "=3", "--=3", "a..b=1", ".a=1", "a.=1", "-a=1", "a b=1", "3=1", ""]
)
def test_words_that_are_no_override(word):
    with pytest.raises(UserError, match="expected key=value") as caught:
        parse_overrides([word])
    assert repr(word) in str(caught.value)


FIELDS = {
    "data.image_size": st.tuples(st.integers(), st.integers()).map(list),
    "data.prompts": st.lists(st.sampled_from(["point", "bbox", "mask"])),
    "data.names": st.lists(st.text()),
    "data.note": st.none() | st.text(alphabet="äxyz/_ .", min_size=1).map(lambda s: f"a{s}"),
    "data.include_center": st.booleans(),
    "model.gradient": st.integers(1) | st.sampled_from(["full", "detached"]),
    "model.num_maskmem": st.integers(0, 16),
    "train.lr": st.floats(0, exclude_min=True, allow_infinity=False) | st.integers(1, 2**53),
    "train.betas": st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2).map(list),
    "train.dropout": st.none() | st.floats(0, 1, exclude_max=True),
    "train.mode": st.sampled_from(["online", "offline", "disabled", None]),
}


def typed(config: Config) -> dict[str, Any]:
    """Dotted key -> (value, its type): 1, 1.0 and True are told apart."""
    return {key: (value, type(value)) for key, value in flatten(config.model_dump()).items()}


@few
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_what_wandb_prints_comes_back_typed(values):
    words = [f"--{key}={value}" for key, value in values.items()]
    assert typed(of(parse_overrides(words))) == typed(of(values))


# --- what wandb agent writes ----------------------------------------------------------------------


def write_as_wandb_does(path: Path, parameters: dict[str, Any]) -> Path:
    content = yaml.safe_dump({k: {"value": v} for k, v in parameters.items()}, sort_keys=False)
    path.write_text("wandb_version: 1" + ("\n\n" + content if parameters else ""))
    return path


def test_sweep_parameters_keep_their_types(tmp_path):
    written = {
        "train.lr": 1e-5,
        "data.note": "007",
        "data.path": "1e-5",  # PyYAML leaves this text without quotes
        "train.mode": None,
        "data.prompts": ["point", "bbox"],
        "model": {"num_maskmem": 3, "gradient": "full"},
    }
    read = sweep_parameters(write_as_wandb_does(tmp_path / "config.yaml", written))
    assert read == flatten(written)
    assert of(read).data.path == "1e-5"
    assert sweep_parameters(write_as_wandb_does(tmp_path / "none.yaml", {})) == {}


def test_sweep_parameters_are_what_the_installed_wandb_writes(tmp_path):
    config_util = pytest.importorskip("wandb.sdk.lib.config_util")
    path = tmp_path / "sweep-1" / "config-2.yaml"
    parameters = {"train.lr": 1e-5, "data.note": "yes", "model": {"num_maskmem": 3}}
    config_util.save_config_file_from_dict(
        str(path), {k: {"value": v} for k, v in parameters.items()}
    )
    assert sweep_parameters(path) == flatten(parameters)


@pytest.mark.parametrize("content", ["", "- 1\n", "train.lr: 3\n", "train.lr: {desc: 1}\n"])
def test_other_files_are_no_sweep_parameters(write, content):
    with pytest.raises(UserError, match=r"does not hold a sweep's parameters.*SWEEP_PARAM_PATH"):
        sweep_parameters(write(content))


def test_unreadable_sweep_parameters(write, tmp_path):
    for path in (tmp_path / "none.yaml", write("a: [1\n"), write(b"\xff", "b.yaml")):
        with pytest.raises(UserError, match=f"cannot be read from {re.escape(str(path))}"):
            sweep_parameters(path)


# --- overrides into a mapping ---------------------------------------------------------------------


def test_apply_overrides_leaves_its_input_alone():
    raw = {"train": {"lr": 1, "rates": {"a": 1}}, "data": None}
    result = apply_overrides(
        raw, {"train.lr": 2, "train.rates.b": 3, "data.path": "x", "new.a.b": 4}
    )
    assert result == {
        "train": {"lr": 2, "rates": {"a": 1, "b": 3}},
        "data": {"path": "x"},
        "new": {"a": {"b": 4}},
    }
    assert raw == {"train": {"lr": 1, "rates": {"a": 1}}, "data": None}


def test_an_override_takes_the_place_of_the_other_spelling():
    raw = {"data": {"include_center_point": True}}
    changed = apply_overrides(raw, {"data.include_center": False}, Config)
    assert changed["data"] == {"include_center": False}
    assert build(Config, changed, "x.yaml").data.include_center is False
    assert len(apply_overrides(raw, {"data.include_center": False})["data"]) == 2
    assert apply_overrides(raw, {"data.unknown.x": 5}, Config)["data"]["include_center_point"]
    both = {"data.include_center": False, "data.include_center_point": True}
    with pytest.raises(UserError, match="given twice, as include_center and include_center_point"):
        apply_overrides({}, both, Config)


def test_override_into_a_value_is_an_error():
    with pytest.raises(UserError, match=r"cannot set train\.lr\.x: train\.lr is 0\.5"):
        apply_overrides({"train": {"lr": 0.5}}, {"train.lr.x": 1})
    with pytest.raises(UserError, match=r'data is "text", which holds no keys'):
        apply_overrides({"data": "text"}, {"data.path": 1})


def test_flatten_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": {"c": [1]}, "d": {}}, "e": None}) == {
        "a.b.c": [1],
        "a.d": {},
        "e": None,
    }


@few
@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_flatten_undoes_apply_overrides(values):
    assert flatten(apply_overrides({}, values)) == values


@pytest.mark.parametrize(
    "word",
    [
        ".".join(["a"] * 33) + "=1",
        ".".join(["a"] * 100_000) + "=1",
        ".".join(["train"] * 20) + "=" + "{'a': " * 20 + "1" + "}" * 20,
        ".".join(["train"] * 20) + "={" + ".".join(["a"] * 20) + ": 1}",
    ],
)
def test_a_key_of_too_many_names(word):
    with pytest.raises(UserError, match="names joined by dots, at most 32 are read") as caught:
        apply_overrides({}, parse_overrides([word]), Config)
    assert len(str(caught.value)) < 300
    dotted = ".".join(["a"] * 32)
    assert flatten(apply_overrides({}, parse_overrides([f"{dotted}=1"]))) == {dotted: 1}


@pytest.mark.parametrize(
    "text",
    [
        "-" * 60_000 + "1",
        "(" * 60_000,
        "1+" * 30_000 + "1",
        "[" * 60_000,
        "{'a':" * 10_000,
        "not " * 10_000 + "1",
        "x." * 20_000,
        f"'{'x' * 100_000}'",
        "{a: &a [*a]}",
    ],
    ids=lambda text: text[:5],
)
def test_values_that_nobody_can_parse_stay_text(text):
    assert parse_overrides([f"a.b={text}"]) == {"a.b": text}


def test_a_thousand_problems_make_a_short_message():
    raw = {f"key_{k}": 1 for k in range(5_000)} | {"k" * 500_000: "v" * 500_000}
    with pytest.raises(ConfigError) as caught:
        build(Config, raw, "x.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 50 + 1
    assert lines[-1] == "  - and 4,951 more"
    with pytest.raises(ConfigError) as caught:
        build(Config, {"k" * 500_000: "v" * 500_000, "train": {"mode": "o" * 500_000}}, "x.yaml")
    assert len(str(caught.value)) < 1_500


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("train.lr", 1, 1.0),
        ("train.lr", "1e-5", 1e-5),
        ("train.lr", "1e-05", 1e-5),
        ("train.dropout", "0.5", 0.5),
        ("train.dropout", 0, 0.0),
        ("train.betas", ["1e-1", 1], (0.1, 1.0)),
        ("train.rates", {"a": 1, "b": "2e0"}, {"a": 1.0, "b": 2.0}),
        ("train.rates", {"trunk": {"0": 1}, "neck*": 2}, {"trunk.0": 1.0, "neck*": 2.0}),
        ("data.image_size", [1, 2], (1, 2)),
        ("data.prompts", [], ()),
        ("data.names", ("a", "b"), ["a", "b"]),
        ("data.note", "1e-5", "1e-5"),
        ("model.gradient", 3, 3),
        ("model.gradient", "detached", "detached"),
    ],
)
def test_conversions(key, value, result):
    built = of({key: value})
    for name in key.split("."):
        built = getattr(built, name)
    assert built == result
    assert type(built) is type(result)
    if isinstance(result, tuple | list):
        assert [type(item) for item in built] == [type(item) for item in result]
    if isinstance(result, dict):
        assert all(type(item) is float for item in built.values())


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("train.num_steps", "300", ['got "300"', "a whole number of at least 0"]),
        ("train.num_steps", True, ["got true", "a whole number"]),
        ("train.num_steps", 4.0, ["got 4.0", "a whole number"]),
        ("train.num_steps", None, ["got null", "a whole number"]),
        ("train.num_steps", -2, ["got -2", "of at least 0"]),
        ("train.num_steps", "010", ['got "010"', "a whole number"]),
        ("train.num_steps", 3, ["got 3; expected an even number"]),
        ("train.lr", True, ["got true", "a number above 0"]),
        ("train.lr", 0, ["got 0", "a number above 0"]),
        ("train.lr", "-1e-3", ['got "-1e-3"', "a number above 0"]),
        ("train.lr", "fast", ['got "fast"', "a number above 0"]),
        ("train.lr", "010", ['got "010"', "a number above 0"]),
        ("train.lr", float("inf"), ["got Infinity", "not infinite or nan"]),
        ("train.dropout", 1, ["a number of at least 0 and below 1 or null"]),
        ("train.betas", [0.9], ["got [0.9]", "a list of 2 items, each a number"]),
        ("train.betas", [1, 2, 3], ["got [1, 2, 3]", "a list of 2 items, each a number"]),
        ("train.betas", 0.9, ["got 0.9", "a list of 2 items", "write [0.9, 0.9]"]),
        ("train.rates", 3, ["got 3", "a mapping of names, each to a number"]),
        (
            "train.mode",
            "ofline",
            ["one of online, offline, disabled or null", "did you mean offline?"],
        ),
        ("train.project", "Ab", ["text of length 8 or less and matching ^[a-z]+$"]),
        ("train.project", "a" * 90, [f'got "{"a" * 76}...;', "of length 8 or less"]),
        ("data.path", 2024, ["got 2024", "expected text", """"'2024'" on the command line"""]),
        ("data.path", None, ["got null; expected text"]),
        ("data.prompts", "point", ['got "point"', "a list, each item one of", "write [point]"]),
        ("data.include_center", "yes", ['got "yes"; expected true or false']),
        ("data.include_center", 1, ["got 1; expected true or false"]),
        ("data.names", "a", ["a list, each item text", "write [a]"]),
        (
            "model.gradient",
            "ful",
            ["one of full, detached or a whole number of at least 1", "full?"],
        ),
        ("model.gradient", 0, ["got 0", "one of full, detached or a whole number of at least 1"]),
        ("model.gradient", True, ["got true", "one of full, detached or a whole number"]),
        ("model.version", True, ["got true; expected one of 1, 2"]),
        ("model.version", 1.0, ["got 1.0; expected one of 1, 2"]),
        ("model.side", 40, ["got 40", "a whole number of at least 32 and divisible by 32 or null"]),
        ("model", None, ["got null; expected a section with keys of its own"]),
        ("model", 3, ["got 3; expected a section with keys of its own"]),
    ],
)
def test_messages_for_wrong_values(key, value, parts):
    line = problem(key, value)
    assert line.startswith(f"{key}: ")
    for part in parts:
        assert part in line
    assert "Input" not in line


def test_unions_keep_what_they_allow():
    class Mixed(Section):
        a: float | str
        b: Literal["1e-5"] | float

    mixed = build(Mixed, {"a": "1e-5", "b": "1e-5"}, "x.yaml")
    assert (mixed.a, mixed.b) == ("1e-5", "1e-5")
    assert build(Mixed, {"a": 1.5, "b": "1e-4"}, "x.yaml").b == 1e-4


def test_items_are_named_by_their_place():
    assert problem("data.prompts", ["point", "bxo"]) == (
        'data.prompts[1]: got "bxo"; expected one of point, bbox, mask'
    )
    assert problem("train.rates.trunk.neck", "x") == (
        'train.rates.trunk.neck: got "x"; expected a number'
    )


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("data.num_worker", "did you mean `data.num_workers`?"),
        ("data.num-workers", "did you mean `data.num_workers`?"),
        ("model.num_workers", "did you mean `data.num_workers`?"),
        ("num_steps", "did you mean `train.num_steps`?"),
        ("dta", "did you mean `data`?"),
        ("data.include_centre_point", "did you mean `data.include_center_point`?"),
        ("model.xyz", "known here: model.gradient, model.version, model.num_maskmem, model.side"),
        ("xyz.abc", "known here: data, model, train"),
    ],
)
def test_unknown_keys_name_the_nearest(key, advice):
    line = problem(key, 3)
    assert line.startswith(f"{key.split('.')[0] if key == 'xyz.abc' else key}: unknown key, got ")
    assert line.endswith(advice)


def test_dotted_key_in_a_file():
    with pytest.raises(ConfigError, match=r"train\.lr: unknown key, got 1; write it as train: lr"):
        build(Config, {"train.lr": 1}, "x.yaml")


def test_all_problems_come_at_once():
    raw = {"data": {"path": 1, "shufle": 2}, "train": {"lr": -1, "num_steps": 3}, "modl": {}}
    with pytest.raises(ConfigError) as caught:
        build(Config, raw, "exp.yaml")
    assert str(caught.value).startswith("exp.yaml: 5 problems\n")
    keys = [line.split(":")[0] for line in caught.value.problems]
    assert sorted(keys) == ["data.path", "data.shufle", "modl", "train.lr", "train.num_steps"]


def test_missing_key_says_what_is_expected():
    class Needs(Section):
        steps: int = Field(ge=1)

    with pytest.raises(ConfigError, match="steps: missing; expected a whole number of at least 1"):
        build(Needs, {}, "x.yaml")


def test_the_own_section_comes_first():
    class Pair(Section):
        train: Data = Field(default_factory=Data)
        val: Data = Field(default_factory=Data)

    for own in ("train", "val"):
        with pytest.raises(ConfigError, match=f"did you mean `{own}.image_size`\\?$"):
            build(Pair, {own: {"imagesize": 1}}, "x.yaml")


def test_rule_across_sections():
    with pytest.raises(ConfigError) as caught:
        of({"model.side": 64})
    assert caught.value.problems == ("data.image_size and model.side differ",)


def test_top_that_is_no_mapping():
    with pytest.raises(ConfigError, match="expected a section"):
        build(Config, [1], "x.yaml")


# --- sections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["include_center", "include_center_point"])
def test_both_spellings_are_read(spelling):
    assert of({f"data.{spelling}": True}).data.include_center is True
    assert Data(**{spelling: True}).include_center is True
    assert problem(f"data.{spelling}", 1).startswith(f"data.{spelling}: got 1")


def test_both_spellings_at_once_are_an_error_beside_the_others():
    data = {"include_center": True, "include_center_point": True, "path": 3}
    with pytest.raises(ConfigError) as caught:
        build(Config, {"data": data}, "x.yaml")
    path, twice = caught.value.problems
    assert path.startswith("data.path: got 3")
    assert twice.endswith("given twice, as include_center and include_center_point; keep one")
    with pytest.raises(ValidationError, match="given twice"):
        Data(include_center=True, include_center_point=True)


def test_sections_are_frozen_and_default_values_are_checked():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.lr = 2.0

    class Wrong(Section):
        steps: int = Field(0, ge=1)

    with pytest.raises(ConfigError, match="steps: got 0; expected a whole number of at least 1"):
        build(Wrong, {}, "x.yaml")


def test_bounds_of_a_union_must_stand_at_a_branch():
    with pytest.raises(TypeError, match=r"Wrong\.gradient: put the bounds at one branch"):

        class Wrong(Section):
            gradient: Literal["full"] | int = Field("full", ge=1)


# --- back to YAML ---------------------------------------------------------------------------------


def test_resolved_config_as_text():
    assert to_yaml(Train(lr=1e-5, rates={"a.b": 1}, mode="offline")) == (
        "lr: 1.0e-05\nbetas: [0.9, 0.999]\nrates:\n  a.b: 1.0\ndropout: null\n"
        "num_steps: 300\nmode: offline\nproject: demo\n"
    )


TRICKY = ["yes", "on", "010", "0x10", "1e-5", "1_0", "null", "", "<<", "=", "a: b", "# a", "1:30"]
TRICKY += ["a\x85b", "a\nb ", " ", "\x00", "\ufeff", "größe", "~", ".inf", "a" * 300]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_reads_back(write, text):
    content = to_yaml(Data(path=text, names=[text, text]))
    assert load_yaml(write(content)) == yaml.safe_load(content)
    assert build(Data, load_yaml(write(content)), "x") == Data(path=text, names=[text, text])


TEXT = st.text() | st.sampled_from(TRICKY)


@few
@given(
    st.fixed_dictionaries({}, optional=FIELDS),
    TEXT,
    st.lists(TEXT),
    st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False)),
)
def test_resolved_config_reads_back_equal(tmp_path_factory, values, path, names, rates):
    config = of(values | {"data.path": path, "data.names": names, "train.rates": rates})
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = build(Config, load_yaml(file), str(file))
    assert typed(again) == typed(config)
    # Other readers of the file use PyYAML with its YAML 1.1 rules.
    assert typed(build(Config, yaml.safe_load(file.read_bytes()), "x")) == typed(config)


def test_import_is_light():
    heavy = "print([m for m in ('torch', 'wandb', 'numpy') if m in sys.modules])"
    command = [sys.executable, "-c", f"import sys, sam2train.config; {heavy}"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
