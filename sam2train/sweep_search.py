"""Random and Bayesian search, and hyperband, by W&B's own engine: the package `sweeps`."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sam2train.errors import UserError
from sam2train.sweep_file import Sweep
from sam2train.sweep_trials import Trial

# W&B's names for the states of trials. The engine takes a run that is not over for one in flight.
_STATES = {
    "waiting": "pending",
    "interrupted": "pending",
    "running": "running",
    "finished": "finished",
    "stopped": "killed",
    "failed": "failed",
}


def examples(sweep: Sweep) -> list[dict[str, Any]]:
    """Trials that together show every value, or the ends and the middle of its range.

    Raises:
        UserError: parameters that W&B's engine does not take.
    """
    choices = {name: _choices(sweep, name) for name in sweep.specs}
    first = {name: values[0] for name, values in choices.items()}
    others = [{**first, name: value} for name, values in choices.items() for value in values[1:]]
    return [first, *others]


def next_values(sweep: Sweep, trials: Sequence[Trial], seed: int = 0) -> dict[str, Any]:
    """The values of the next trial, from what the trials so far have shown.

    The draw follows from `seed` and the number of trials: a sweep that goes on goes on the same.
    """
    with _engine(seed, len(trials)) as engine:
        drawn = engine.next_run(_engine_config(sweep), _runs(sweep, trials, engine))
    return {name: _plain(drawn.config[name]["value"]) for name in sweep.specs}


def trials_to_stop(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """The running trials that hyperband gives up."""
    with _engine(0, 0) as engine:
        stopped = engine.stop_runs(_engine_config(sweep), _runs(sweep, trials, engine))
    names = {run.name for run in stopped}
    return [trial for trial in trials if trial.name in names]


def _choices(sweep: Sweep, name: str) -> list[Any]:
    spec = sweep.specs[name]
    with _engine(0, 0):
        from sweeps.params import HyperParameter

        try:
            parameter = HyperParameter(name, dict(spec))
        except Exception as error:  # the engine has a type of its own for each form it misses
            raise UserError(
                f"{sweep.path}: parameters.{name}: W&B does not take {dict(spec)}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if "value" in spec:
            return [spec["value"]]
        if "values" in spec:
            return list(spec["values"])
        bounded = "min" in spec
        low, middle, high = (
            _plain(parameter.ppf(at))
            for at in ((1e-9, 0.5, 1 - 1e-9) if bounded else (0.01, 0.5, 0.99))
        )
    if bounded and spec.get("distribution") not in ("log_uniform", "inv_log_uniform"):
        low, high = (type(middle)(spec[end]) for end in ("min", "max"))
    return [low, middle, high]


def _engine_config(sweep: Sweep) -> dict[str, Any]:
    """The sweep with flat names: the engine's own nesting does not end."""
    config = sweep.config.model_dump(exclude_none=True, exclude={"command", "parameters"})
    return {**config, "parameters": {name: dict(spec) for name, spec in sweep.specs.items()}}


def _runs(sweep: Sweep, trials: Sequence[Trial], engine: Any) -> list[Any]:
    metric = sweep.config.metric.name
    return [
        engine.SweepRun(
            name=trial.name,
            state=engine.RunState(_STATES[trial.state]),
            config={name: {"value": value} for name, value in trial.values.items()},
            # By their aliases: under pydantic 2 the engine does not see the fields' own names.
            sampledHistory=[{metric: value} for value in trial.history],
            summaryMetrics={metric: trial.score} if trial.history else {},
        )
        for trial in trials
    ]


@contextlib.contextmanager
def _engine(seed: int, draw: int) -> Iterator[Any]:
    """The package `sweeps`, with its randomness fixed: it draws from both global generators."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic 1's names, of Gaussian processes
        try:
            import sweeps
        except ImportError as error:
            raise UserError(
                "random and Bayesian search and hyperband need W&B's package `sweeps`, which is "
                "not installed; `pip install -r requirements.txt`, or set method: grid"
            ) from error
        try:
            random.seed(f"{seed}/{draw}")
            np.random.seed(random.getrandbits(32))  # noqa: NPY002
            yield sweeps
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
