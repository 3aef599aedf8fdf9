"""A W&B sweep file: read, checked, and turned into the words that run a trial; and what people see
of its trials: a table while they run, a line each in a log, and the ranking at the end.

A sweep file may come from anybody. Here a trial is always this Python and this repository's run.py;
the file chooses an experiment and settings, and each is checked before the first trial.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from sam2train.config import ConfigError, Section, build, flatten, parse_overrides
from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment, load_experiment, smoke_settings
from sam2train.files import REPOSITORY, resolve_path
from sam2train.machine import cell, say
from sam2train.sweep_search import (
    MAX_GRID_TRIALS,
    HyperbandConfig,
    MetricConfig,
    Spec,
    bayes_values,
    grid_values,
    random_values,
    read_spec,
    value_key,
)
from sam2train.sweep_trials import Trial

if TYPE_CHECKING:
    import pandas as pd

_SEED_NAME = "trainer.seed"
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}
# What `wandb agent` puts in the place of a whole item of `command:`.
_ARGS = {"${args}": "--{}={}", "${args_no_hyphens}": "{}={}"}
_MACROS = ("${env}", "${interpreter}", "${program}", *_ARGS)
_REFERENCE = re.compile(r"\$[{(A-Za-z_]")  # ${envvar:NAME}, ${NAME}, $(command), $NAME
_UNPRINTABLE = "holds a character that does not print, such as a line break; take it out"


class SweepConfig(Section):
    """A sweep file: the keys of W&B that this project can follow."""

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
    """A sweep file that has been read and checked. The `values` of a trial are by dotted name."""

    path: Path
    config: SweepConfig
    specs: Mapping[str, Spec]  # by dotted name, sorted
    nesting: Mapping[str, tuple[str, ...]]  # dotted name -> the keys that lead to it in the file
    extra: tuple[str, ...] = ()  # words behind each trial's command

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def varying(self) -> list[str]:
        """The parameters that are no constants; all of them if every one is."""
        names = [name for name, spec in self.specs.items() if spec.distribution != "constant"]
        return names or list(self.specs)

    @property
    def short_names(self) -> dict[str, str]:
        """Dotted name -> its last part, where that says which one is meant."""
        leaves = [name.split(".")[-1] for name in self.specs]
        clear = len({*leaves}) == len(leaves)
        return dict(zip(self.specs, leaves if clear else self.specs, strict=True))

    @property
    def _words(self) -> tuple[str, ...]:
        """What follows run.py in each trial, macros as they stand in the file."""
        command = self.config.command
        return (*command[command.index("${program}") + 1 :], *self.extra)

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
        """The words that run a trial: those of `wandb agent`, with this Python and this run.py."""
        words = [sys.executable, str(REPOSITORY / "run.py")]
        for item in self._words:
            if item in _ARGS:
                pairs = self.arguments(values).items()
                words += [_ARGS[item].format(name, value) for name, value in pairs]
            else:
                words.append(item)
        return words

    def experiment(self, values: Mapping[str, Any]) -> Experiment:
        """The settings of a trial; UserError for what is wrong with them."""
        path = resolve_path(next(filter(_is_experiment, self._words)))
        settings = parse_overrides([w for w in self._words if "=" in w]) | flatten(values)
        if "--smoke" in self._words:
            settings = smoke_settings(path, settings)
        return load_experiment(path, settings)

    def fixed_settings(self) -> dict[str, Any]:
        """What must not change while the sweep goes on; a grid may grow. JSON can hold it."""
        config = self.config.model_dump(mode="json")
        free = ("description", "project", "entity", "run_cap", "name")
        free += ("parameters",) if config["method"] == "grid" else ()
        fixed = {name: value for name, value in config.items() if name not in free}
        return {**fixed, "extra": list(self.extra)}

    def next_values(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """The values of the trial that a random or Bayesian search makes after these."""
        if self.config.method == "random":
            return random_values(self.specs, len(trials))
        return bayes_values(self.specs, self.config.metric, trials)


def is_sweep(raw: Mapping[str, Any]) -> bool:
    """Whether the content of a YAML file is a sweep's rather than an experiment's."""
    return "method" in raw and "parameters" in raw


def load_sweep(path: Path, extra: Sequence[str] = ()) -> Sweep:
    """The sweep in a file.

    Args:
        extra: further words for every trial, such as trainer.num_steps=20.

    Raises:
        UserError: what is wrong with it. `check_values` checks the values of its parameters.
    """
    load_yaml(path)  # refuses what is no mapping of text keys, and keys that are there twice
    try:
        # With PyYAML's own rules, YAML 1.1, as W&B reads it: the same values for both.
        raw = yaml.safe_load(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        line = f"W&B cannot read it: {error}; put the value in quotes"
        raise ConfigError(str(path), [line]) from error
    if problems := list(_value_problems(raw)):
        raise ConfigError(str(path), problems)
    config = build(SweepConfig, raw, str(path))
    problems = [*_command_problems(config)]
    specs: dict[str, Spec] = {}
    nesting: dict[str, tuple[str, ...]] = {}
    for keys, given in _leaves(config.parameters):
        name = ".".join(keys)
        if name in nesting:
            problems.append(f"parameters: {name} is there twice, dotted and nested; keep one")
        nesting[name] = keys
        try:
            specs[name] = read_spec(given)
            if config.method == "grid":
                grid_values(specs[name])
        except ValueError as error:
            problems.append(f"parameters.{name}: {error}")
    if not nesting:
        problems.append("parameters: nothing is varied; expected dotted names of settings")
    problems += [f"{word!r}: {_UNPRINTABLE}" for word in extra if not word.isprintable()]
    clashes = nesting.keys() & parse_overrides([w for w in extra if "=" in w]).keys()
    problems += [f"{name} is varied by the sweep; leave it out here" for name in sorted(clashes)]
    if problems:
        raise ConfigError(str(path), problems)
    return Sweep(path, config, specs, nesting, tuple(extra))


def grid(sweep: Sweep, count: int | None = None) -> list[dict[str, Any]]:
    """The trials of a grid in W&B's order: names sorted, the last one varies fastest.

    Args:
        count: trials that the user asked for. Where the grid has more than MAX_GRID_TRIALS, only
            these are made.

    Raises:
        UserError: more than MAX_GRID_TRIALS, and nobody said how many of them.
    """
    choices = [grid_values(spec) for spec in sweep.specs.values()]
    size = math.prod(map(len, choices))
    if size > MAX_GRID_TRIALS:
        size = min(filter(None, (size, count, sweep.config.run_cap)))
        if size > MAX_GRID_TRIALS and not count:
            raise UserError(
                f"{sweep.path}: the grid has {math.prod(map(len, choices)):,} trials; expected up "
                f"to {MAX_GRID_TRIALS:,}; take values out, or say with --count N how many to run"
            )
    trials = itertools.islice(itertools.product(*choices), size)
    return [dict(zip(sweep.specs, values, strict=True)) for values in trials]


def in_grid(sweep: Sweep, values: Mapping[str, Any]) -> bool:
    """Whether a trial with these values is one of the grid's."""
    return values.keys() == sweep.specs.keys() and all(
        value_key(values[name]) in map(value_key, grid_values(spec))
        for name, spec in sweep.specs.items()
    )


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
                problems[f"{name}: {value!r} is text to W&B; write {number}"] = None
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


def _value_problems(raw: Any) -> Iterator[str]:
    """The texts that no sweep file may hold, wherever they stand; `load_yaml` has limited how many
    values there are."""
    waiting: list[tuple[str, Any]] = [("", raw)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key in value:
                yield from _text_problems(f"the key {key!r:.60}", key, keys=True)
            pairs = [(f"{path}.{key}" if path else str(key), v) for key, v in value.items()]
            waiting += [pair for pair in reversed(pairs) if pair[0] != "description"]
        elif isinstance(value, list):
            waiting += [(f"{path}[{k}]", v) for k, v in reversed(list(enumerate(value)))]
        elif not (re.fullmatch(r"command\[\d+\]", path) and value in _MACROS):
            yield from _text_problems(path, value)


def _text_problems(path: str, value: Any, *, keys: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        if not value.isprintable():
            yield f"{path}: {value!r:.60} {_UNPRINTABLE}"
        elif path.startswith("command[") and value.startswith("${") and "envvar" not in value:
            yield f"{path}: {value} is not known here; run.py reads {' or '.join(_ARGS)}"
        elif _REFERENCE.search(value):
            yield (
                f"{path}: {value!r:.60} refers to the environment; a trial's words stand in logs "
                "and in W&B, so nothing is filled in here; write the value, or leave it out"
            )
    elif keys or not (value is None or isinstance(value, (bool, int, float))):
        kind = "a date" if isinstance(value, date) else f"a {type(value).__name__}"
        yield f"{path}: W&B reads {value!s:.60} as {kind}; put it in quotes"


def _command_problems(config: SweepConfig) -> Iterator[str]:
    """What makes `command:` and `program:` anything else than run.py with an experiment."""
    ours = "expected `${env}, ${interpreter}, ${program}, experiments/NAME.yaml, ${args}`"
    if Path(config.program) != Path("run.py") and (
        Path(config.program).resolve() != (REPOSITORY / "run.py").resolve()
    ):
        yield f"program: got {config.program}; a trial is this project's own: expected run.py"
    command = list(config.command)
    start = command.index("${program}") if "${program}" in command else 0
    for item in command[:start]:
        if item not in ("${env}", "${interpreter}"):
            yield (
                f"command: {item!r} before ${{program}}; a trial is this Python and this run.py, "
                f"with nothing around them: {ours}"
            )
    if command[:start] not in (["${env}", "${interpreter}"], ["${interpreter}"]):
        yield f"command: got {' '.join(command[: start + 1])!r:.80} at its start; {ours}"
    words = command[start + 1 :]
    for word in words:
        if word in _ARGS or word == "--smoke" or _is_experiment(word):
            continue
        try:
            parse_overrides([word])
        except UserError:
            yield (
                f"command: {word!r:.60} behind ${{program}}; expected an experiment, "
                f"{' or '.join(_ARGS)}, --smoke or settings as key=value; leave it out"
            )
    if sum(word in _ARGS for word in words) != 1:
        yield f"command: expected {' or '.join(_ARGS)} once; it gives a trial its parameters"
    named = [word for word in words if _is_experiment(word)]
    if not named:
        yield "command: no experiment; put experiments/NAME.yaml before ${args}"
    elif len(named) > 1:
        yield f"command: {' and '.join(named)} are two experiments; keep one"


def _is_experiment(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and "=" not in word and not word.startswith("-")


def _leaves(parameters: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[Any]:
    """(keys, spec) of each parameter, sorted by name at every depth, as W&B's engine does."""
    for key, spec in sorted(parameters.items()):
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            yield from _leaves(spec["parameters"], (*above, key))
        else:
            yield (*above, key), spec


# What people see of the trials


def live_table(sweep: Sweep, trials: Sequence[Trial], total: int, jobs: int, rows: int) -> Table:
    """Trials with parameters, state, step, metric and time left; those that matter now if not all
    fit into `rows`."""
    left = _time_left(trials, total, jobs)
    states = Counter(trial.state for trial in trials)
    order = ("finished", "stopped", "running", "failed", "interrupted")
    counts = ", ".join(f"{states[state]} {state}" for state in order if states[state])
    title = f"{sweep.name}: {counts or 'nothing yet'} of {total}"
    title = cell(title + (f"; about {left} left" if left else ""), "table.title")
    table = Table("trial", title=title, title_justify="left")
    for name in sweep.varying:
        table.add_column(cell(sweep.short_names[name]), overflow="fold")
    for heading in ("state", "step", sweep.config.metric.name, "left"):
        table.add_column(cell(heading), justify="right")
    ranks = {"running": 0, "failed": 1, "interrupted": 1, "finished": 2, "stopped": 2}
    urgent = sorted(trials, key=lambda trial: (ranks.get(trial.state, 3), trial.name))
    for trial in sorted(urgent[: max(rows, 3)], key=lambda trial: trial.name):
        style = _STYLES.get(trial.state, "dim")
        table.add_row(
            trial.name,
            *(cell(show_value(trial.values.get(name))) for name in sweep.varying),
            cell(trial.state, style),
            f"{trial.step}/{trial.num_steps}",
            "" if trial.score is None else f"{trial.score:.3f}",
            _show_seconds(trial.seconds_left) if trial.state == "running" else "",
        )
    return table


def trial_line(sweep: Sweep, trial: Trial) -> str:
    """One trial in one line, for a log."""
    names = sweep.short_names
    values = " ".join(f"{names[n]}={show_value(trial.values.get(n))}" for n in sweep.varying)
    score = "" if trial.score is None else f"  {sweep.config.metric.name} {trial.score:.3f}"
    after = f"  {_show_seconds(trial.seconds)}" if trial.state != "running" else ""
    return f"trial {trial.name}  {values}  {trial.state}{score}{after}"


def _time_left(trials: Sequence[Trial], total: int, jobs: int) -> str:
    """For the whole sweep, from what finished trials took and running ones take; "" if unknown."""
    known = [trial.seconds for trial in trials if trial.state == "finished"]
    running = [trial for trial in trials if trial.state == "running" and trial.seconds_left]
    known = known or [trial.seconds + trial.seconds_left for trial in running]
    if not known:
        return ""
    waiting = total - sum(trial.over or trial.state == "running" for trial in trials)
    left = sum(trial.seconds_left for trial in running)
    return _show_seconds((left + waiting * sum(known) / len(known)) / jobs)


def _show_seconds(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(min(seconds, 1e9))))


def results_frame(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """One row a trial: trial, state, each parameter, seed, the metric, and more."""
    import pandas as pd

    rows = []
    for trial in trials:
        values = {name: trial.values.get(name) for name in sweep.specs if name != _SEED_NAME}
        for name, value in values.items():
            if not (value is None or isinstance(value, (bool, int, float))):
                values[name] = show_value(value)
        row = {"trial": trial.name, "state": trial.state, **values, "seed": trial.seed}
        row[sweep.config.metric.name] = trial.score
        row |= {"baseline/J_and_F": trial.baseline, "step": trial.step}
        row |= {"num_steps": trial.num_steps, "seconds": round(trial.seconds, 1)}
        rows.append({**row, "run_id": trial.run_id, "path": str(trial.folder)})
    return pd.DataFrame(rows)


def _ranking(sweep: Sweep, trials: Sequence[Trial]) -> pd.DataFrame:
    """Finished trials with a score, grouped over seeds, best first.

    Columns: the parameters as text; mean; text, difference and p of `compare_groups`, the
    difference from the best.
    """
    import pandas as pd

    from sam2train.compare import compare_groups

    names = [name for name in sweep.varying if name != _SEED_NAME]
    groups: dict[str, list[dict[str, Any]]] = {}  # the values -> their runs
    shown: dict[str, dict[str, str]] = {}
    for trial in trials:
        if trial.state == "finished" and trial.score is not None:
            values = {name: trial.values.get(name) for name in names}
            group = json.dumps(values)
            row = {"path": str(trial.folder), "seed": trial.seed, "last": trial.score}
            groups.setdefault(group, []).append(row)
            shown[group] = {name: show_value(value) for name, value in values.items()}
    if not groups:
        return pd.DataFrame()
    frames = {group: pd.DataFrame(rows) for group, rows in groups.items()}
    means = {g: frame.groupby("seed")["last"].mean().mean() for g, frame in frames.items()}
    order = sorted(means, key=means.get, reverse=sweep.config.metric.goal != "minimize")
    parameters = pd.DataFrame([shown[group] for group in order], columns=names)
    parameters["mean"] = [means[group] for group in order]
    metric = sweep.config.metric.name.removeprefix("val/")
    compared = compare_groups([frames[group] for group in order], metric)
    return pd.concat([parameters, compared], axis=1)


def show_results(sweep: Sweep, trials: Sequence[Trial], folder: Path, console: Console) -> None:
    """Print the ranking, what failed and why, and where everything is."""
    metric = sweep.config.metric.name
    table = _ranking(sweep, trials)
    if len(table):
        num = int(table["p"].notna().sum())
        title = f"{metric}, mean and 95 % interval"
        shown = Table(title=cell(title, "table.title"), title_justify="left")
        names = [name for name in sweep.varying if name != _SEED_NAME]
        headings = ["", *(sweep.short_names[name] for name in names), "score", "to the best"]
        for heading in headings + [f"p, Holm of {num}"] * (num > 0):
            shown.add_column(cell(heading))
        for rank, row in enumerate(table.to_dict("records"), start=1):
            cells = [cell(row[name]) for name in names] + [row["text"], row["difference"]]
            if num:
                cells.append("" if math.isnan(row["p"]) else f"{row['p']:.3f}")
            shown.add_row(str(rank), *cells)
        console.print(shown)
        if num:
            say(console, "the best was chosen by these scores, so its lead is probably too large")
    elif any(trial.state == "finished" and not trial.diverged for trial in trials):
        say(console, f"no trial logged {metric}; `metric: name:` takes names of metrics.jsonl")
    if early := [trial.name for trial in trials if trial.state == "stopped"]:
        say(console, f"stopped early, not ranked: {', '.join(early)}")
    if broken := [trial.name for trial in trials if trial.state == "finished" and trial.diverged]:
        say(console, f"the last {metric} is no finite number, not ranked: {', '.join(broken)}")
    for trial in trials:
        if trial.state == "failed":
            trial.say_failure(console)
    say(console, f"wrote {folder / 'results.csv'}; the runs: python run.py --runs {folder}")
