"""A W&B sweep file -> its trials as `wandb agent` would run them, checked before the first one."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from sam2train.config import (
    ConfigError,
    Section,
    build,
    flatten,
    parse_overrides,
)
from sam2train.config_yaml import load_yaml
from sam2train.experiment import SMOKE, Experiment, load_experiment
from sam2train.files import REPOSITORY, resolve_path

# What `wandb agent` puts in the place of a whole item of `command:`.
_ARGS = {"${args}": "--{}={}", "${args_no_hyphens}": "{}={}"}
_FORMS = (
    "`values: [...]`, `value: ...`, `min:` and `max:` with or without a `distribution:`, or "
    "`parameters:` of its own"
)


class MetricConfig(Section):
    """The `metric:` section; a trial's score is the last value that it logged."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = Field(None, description="no trial starts once one has reached it")
    impute: Literal["latest", "best", "worst"] | None = None


class HyperbandConfig(Section):
    """The `early_terminate:` section; iterations are the scores a trial has logged, from 0."""

    type: Literal["hyperband"]
    min_iter: int | None = Field(None, ge=1)
    max_iter: int | None = Field(None, ge=1)
    s: int | None = Field(None, ge=1)
    eta: float = Field(3.0, gt=1)

    @model_validator(mode="after")
    def _one_form(self) -> HyperbandConfig:
        if self.min_iter is None and (self.max_iter is None or self.s is None):
            raise ValueError("hyperband needs min_iter, or both max_iter and s")
        return self


class SweepConfig(Section):
    """A sweep file: W&B's keys, those that this project can follow."""

    name: str | None = None
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    program: str = "run.py"
    method: Literal["grid", "random", "bayes"]
    run_cap: int | None = Field(None, ge=1, description="trials in all")
    metric: MetricConfig
    early_terminate: HyperbandConfig | None = None
    command: tuple[str, ...]
    parameters: dict


@dataclass(frozen=True)
class Sweep:
    """A sweep file that has been read; `values` of a trial are by dotted name."""

    path: Path
    config: SweepConfig
    specs: Mapping[str, Mapping[str, Any]]  # dotted name -> what W&B draws it from, sorted
    nesting: Mapping[str, tuple[str, ...]]  # dotted name -> the keys that lead to it in the file
    extra: tuple[str, ...] = ()  # words behind each trial's command

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def experiment_path(self) -> Path:
        words = [word for word in self.config.command if word.endswith((".yaml", ".yml"))]
        return resolve_path(words[0])

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as W&B hands them to a trial: top name -> value, nested ones a mapping."""
        nested: dict[str, Any] = {}
        for name, value in values.items():
            *parents, leaf = self.nesting[name]
            inner = nested
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[leaf] = value
        return nested

    def command(self, values: Mapping[str, Any]) -> list[str]:
        """The words that run a trial: `wandb agent`'s, but for `python`, which is this one."""
        words = []
        for item in self.config.command:
            if item in _ARGS:
                pairs = self.arguments(values).items()
                words += [_ARGS[item].format(name, value) for name, value in pairs]
            elif item != "${env}":  # /usr/bin/env finds `python`; this one is found
                words.append(_macro(item))
        return words + list(self.extra)

    def experiment(self, values: Mapping[str, Any]) -> Experiment:
        """The settings of a trial; UserError for what is wrong with them."""
        words = (*map(_macro, self.config.command), *self.extra)
        fixed = [word for word in words if "=" in word]
        settings = parse_overrides(fixed) | flatten(values)
        return load_experiment(
            self.experiment_path, SMOKE | settings if "--smoke" in words else settings
        )


def is_sweep(raw: Mapping[str, Any]) -> bool:
    """Whether the content of a YAML file is a sweep's rather than an experiment's."""
    return "method" in raw and "parameters" in raw


def load_sweep(path: Path, extra: Sequence[str] = ()) -> Sweep:
    """The sweep in a file.

    Args:
        extra: further words for every trial, such as trainer.num_steps=20.

    Raises:
        UserError: what is wrong with it; its values are looked at by `check_values`.
    """
    raw = load_yaml(path)
    # W&B reads YAML 1.1: what differs from 1.2 would reach the trials as something else.
    try:
        problems = list(_differences(raw, yaml.safe_load(path.read_text("utf-8-sig"))))
    except (ValueError, yaml.YAMLError) as error:
        problems = [f"W&B cannot read it: {error}; put the value in quotes"]
    if problems:
        raise ConfigError(str(path), problems)
    config = build(SweepConfig, raw, str(path))
    problems = list(_command_problems(config))
    specs: dict[str, Any] = {}
    nesting: dict[str, tuple[str, ...]] = {}
    for keys, spec in _leaves(config.parameters):
        name = ".".join(keys)
        if name in specs:
            problems.append(f"parameters: {name} is there twice, dotted and nested; keep one")
        elif problem := _spec_problem(spec, config.method):
            problems.append(f"parameters.{name}: {problem}")
        specs[name], nesting[name] = spec, keys
    if not specs:
        problems.append("parameters: nothing is varied; expected dotted names of settings")
    clashes = specs.keys() & parse_overrides([w for w in extra if "=" in w]).keys()
    problems += [f"{name} is varied by the sweep; leave it out here" for name in sorted(clashes)]
    if problems:
        raise ConfigError(str(path), problems)
    return Sweep(path, config, specs, nesting, tuple(extra))


def grid(sweep: Sweep) -> list[dict[str, Any]]:
    """All trials of a grid, in W&B's order: names sorted, the last one varies fastest."""
    choices = [_distinct(_grid_values(spec)) for spec in sweep.specs.values()]
    return [dict(zip(sweep.specs, values, strict=True)) for values in itertools.product(*choices)]


def check_values(sweep: Sweep, trials: Sequence[Mapping[str, Any]]) -> list[Experiment]:
    """The experiments of the trials; ConfigError with all that is wrong with any of them."""
    problems: dict[str, None] = {}
    experiments = []
    for values in trials:
        try:
            experiment = sweep.experiment(values)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        experiments.append(experiment)
        settings = flatten(experiment.model_dump())
        for name, value in values.items():
            if isinstance(value, str) and isinstance(settings.get(name), (int, float)):
                number = yaml.safe_dump(settings[name]).split("\n")[0]
                line = f"{name}: {value!r} is text; W&B would keep it so: write {number}"
                problems[line] = None
    if problems:
        raise ConfigError(str(sweep.path), list(problems))
    return experiments


def show_value(value: Any) -> str:
    """A value in a table: words of a list joined by "+", numbers short."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return "+".join(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _macro(item: str) -> str:
    fixed = {"${interpreter}": sys.executable, "${program}": str(REPOSITORY / "run.py")}
    if item in fixed:
        return fixed[item]
    # As in wandb, a variable that is not set leaves its name.
    return re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda m: os.environ.get(m[1], m[1]), item)


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """A line for each value that YAML 1.2 and PyYAML's 1.1 read differently."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and len(ours) == len(theirs):
        for (key, value), (other, their_value) in zip(ours.items(), theirs.items(), strict=True):
            if key != other:
                yield f"{path or 'the top'}: W&B reads the key {key} as {other}; put it in quotes"
            yield from _differences(value, their_value, f"{path}.{key}" if path else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for k, (value, their_value) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(value, their_value, f"{path}[{k}]")
    elif type(ours) is not type(theirs) or ours != theirs:
        kind = "the text" if isinstance(theirs, str) else type(theirs).__name__
        cure = yaml.safe_dump(ours, default_flow_style=True).split("\n")[0]
        if isinstance(theirs, bool):
            cure += f", or {str(theirs).lower()} where a switch is meant"
        yield f"{path}: W&B reads YAML 1.1, and this as {kind} {theirs}; write {cure}"


def _command_problems(config: SweepConfig) -> Iterator[str]:
    known = ("${env}", "${interpreter}", "${program}", *_ARGS)
    for item in config.command:
        if item.startswith("${") and item not in known and "envvar:" not in item:
            yield f"command: {item} is not known here; run.py reads {' or '.join(_ARGS)}"
    if not any(item in _ARGS for item in config.command):
        yield f"command: no {' or '.join(_ARGS)}; without it no trial would get its parameters"
    if not any(item.endswith((".yaml", ".yml")) for item in config.command):
        yield "command: no experiment; put experiments/NAME.yaml before ${args}"
    if Path(config.program).name != "run.py" or "${program}" not in config.command:
        yield f"program: got {config.program}; expected run.py, and ${{program}} in the command"


def _leaves(parameters: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[Any]:
    """(keys, spec) of each parameter, sorted by name at every depth, as W&B's engine does."""
    for key, spec in sorted(parameters.items()):
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            yield from _leaves(spec["parameters"], (*above, key))
        else:
            yield (*above, key), spec


def _spec_problem(spec: Any, method: str) -> str | None:
    if not isinstance(spec, Mapping):
        return f"got {json.dumps(spec, default=str)}; expected {_FORMS}"
    if "values" in spec and not (isinstance(spec["values"], list) and spec["values"]):
        return "values: expected a list with one value or more"
    if method == "grid":
        try:
            _grid_values(spec)
        except (KeyError, TypeError, ValueError):
            return (
                f"got {json.dumps(dict(spec), default=str)}; a grid takes `values: [...]`, "
                "`value: ...`, or whole `min:` and `max:`; for anything else set method: random"
            )
    return None


def _grid_values(spec: Mapping[str, Any]) -> list[Any]:
    """The values of one parameter; KeyError or TypeError for what has no finite number of them."""
    kind = spec.get("distribution")
    keys = spec.keys() - {"distribution"}
    if keys == {"value"} and kind in (None, "constant"):
        return [spec["value"]]
    if keys == {"values"} and kind in (None, "categorical"):
        return spec["values"]
    if kind == "q_uniform" and keys <= {"min", "max", "q"}:
        import numpy as np

        return np.arange(spec["min"], spec["max"], spec.get("q", 1.0)).tolist()
    if keys == {"min", "max"} and kind in (None, "int_uniform") and spec["min"] < spec["max"]:
        return list(range(spec["min"], spec["max"] + 1))
    raise KeyError(kind)


def _distinct(values: Sequence[Any]) -> list[Any]:
    seen: dict[str, Any] = {}
    for value in values:
        # As W&B's engine tells values apart: 1, 1.0 and true are three.
        seen.setdefault(yaml.safe_dump(value), value)
    return list(seen.values())
