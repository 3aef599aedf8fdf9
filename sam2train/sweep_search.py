"""Which values a sweep tries: grid, random and Bayesian search, and which trials hyperband stops.

A grid and a random search have the trials of W&B's engine. A Bayesian search has others: both model
the score with a Gaussian process, but Optuna's has another kernel and another way to choose from
it, and starts from 4 random trials. Hyperband follows W&B's rule, except that W&B's engine from
version 0.3 on counts the first score of a trial as iteration 1; here it is iteration 0, the score
of step 0.
"""

from __future__ import annotations

import difflib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.sweep_trials import Trial, is_finite

MAX_GRID_TRIALS = 10_000  # without --count; checking each takes about 2 ms
_MAX_WHOLE = 2**53  # up to here a float holds each whole number
_SEARCH_SEED = 0
_RANDOM_FIRST = 4  # finished trials before a Bayesian search trusts its model
_MAX_BANDS = 100  # iterations at which hyperband judges; W&B has as many
_MAX_SCORE = 1e100
_EDGE = 1e-9  # quantiles keep this distance from 0 and 1, where a normal distribution is infinite

# Distribution -> its settings with W&B's defaults; those with None have to be given.
_BOUNDS = {"min": None, "max": None}
_NORMAL = {"mu": 0.0, "sigma": 1.0}
_BETA = {"a": 1, "b": 1}
_Q = {"q": 1.0}  # step of the values
_DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": _BOUNDS,
    "uniform": _BOUNDS,
    "q_uniform": _BOUNDS | _Q,
    "log_uniform": _BOUNDS,
    "log_uniform_values": _BOUNDS,
    "q_log_uniform": _BOUNDS | _Q,
    "q_log_uniform_values": _BOUNDS | _Q,
    "inv_log_uniform": _BOUNDS,
    "inv_log_uniform_values": _BOUNDS,
    "normal": _NORMAL,
    "q_normal": _NORMAL | _Q,
    "log_normal": _NORMAL,
    "q_log_normal": _NORMAL | _Q,
    "beta": _BETA,
    "q_beta": _BETA | _Q,
}
_FORMS = (
    "`values: [...]`, `value: ...`, `min:` and `max:` with or without a `distribution:`, or "
    "`parameters:` of its own"
)


class MetricConfig(Section):
    """The `metric:` section. A trial's score is the last value that it logged."""

    name: str
    goal: Literal["minimize", "maximize"] = "minimize"
    target: float | None = Field(None, description="no trial starts once one has reached it")
    impute: Literal["latest", "best", "worst"] | None = Field(
        None, description="what Bayesian search takes for a trial without a result; null: worst"
    )


class HyperbandConfig(Section):
    """The `early_terminate:` section. Iterations are the scores of a trial; the first, that of
    step 0, is iteration 0."""

    type: Literal["hyperband"]
    min_iter: int | None = Field(None, ge=1)
    max_iter: int | None = Field(None, ge=1)
    s: int | None = Field(None, ge=1)
    eta: float = Field(3.0, gt=1)
    # null, not false: sweeps begun before this key was known have no value for it.
    strict: bool | None = Field(
        None, description="judge by the score at the iteration, not by the best so far"
    )

    @model_validator(mode="after")
    def _one_form(self) -> HyperbandConfig:
        if (self.max_iter is None or self.s is None) and self.min_iter is None:
            raise ValueError("hyperband needs min_iter, or both max_iter and s")
        if self.max_iter is not None and self.s is not None and self.max_iter < self.eta:
            raise ValueError(
                f"max_iter {self.max_iter} is below eta {self.eta:g}, so that no iteration is left "
                "to judge at; raise max_iter"
            )
        return self


@dataclass(frozen=True)
class Spec:
    """What one parameter is drawn from: a W&B distribution, all of its settings given."""

    distribution: str
    settings: Mapping[str, Any]

    def quantile(self, at: float) -> Any:
        """The value that a share `at` of the draws stays below, to the last bit as W&B's engine
        computes it. `at` lies in [0, 1]."""
        import numpy as np

        if self.distribution == "constant":
            return self.settings["value"]
        if "probabilities" in self.settings:
            up_to = np.cumsum(self.settings["probabilities"])
            return self.settings["values"][int(np.argmin(at >= up_to))]
        if "values" in self.settings:
            return self.settings["values"][int(self._base.ppf(at))]
        inverse = self.distribution.startswith("inv_")
        with np.errstate(all="ignore"):  # settings that overflow are refused by `read_spec`
            value = self._base.ppf(1 - at if inverse else at)
            if "log_uniform" in self.distribution:
                value = np.exp(-value if inverse else value)
            step = self.settings.get("q")
            if step:
                value = np.round(value / step) * step
        whole = self.distribution == "int_uniform" or isinstance(step, int)
        return int(value) if whole else float(value)

    def share(self, value: float) -> float:
        """The share of draws below a number: what `quantile` makes that number of."""
        import numpy as np

        if self.distribution == "int_uniform":  # the middle of the shares that give this number
            return float(self._base.cdf(value - 1) + self._base.cdf(value)) / 2
        inverse = self.distribution.startswith("inv_")
        if "log_uniform" in self.distribution:
            value = float(np.log(value)) if value > 0 else -math.inf
        share = float(self._base.cdf(-value if inverse else value))
        return 1 - share if inverse else share

    @cached_property
    def _base(self) -> Any:
        """SciPy's distribution of the value, or of its logarithm for the log-uniform ones."""
        import numpy as np
        from scipy import stats

        settings, name = self.settings, self.distribution.removeprefix("q_")
        if name == "categorical":
            return stats.randint(0, len(settings["values"]))
        if name == "int_uniform":
            return stats.randint(settings["min"], settings["max"] + 1)
        if name == "normal":
            return stats.norm(loc=settings["mu"], scale=settings["sigma"])
        if name == "log_normal":
            return stats.lognorm(s=settings["sigma"], scale=np.exp(settings["mu"]))
        if name == "beta":
            return stats.beta(a=settings["a"], b=settings["b"])
        low, high = settings["min"], settings["max"]
        if name == "inv_log_uniform_values":
            low, high = -np.log(high), -np.log(low)
        elif name == "log_uniform_values":
            low, high = np.log(low), np.log(high)
        return stats.uniform(low, high - low)


def read_spec(given: Any) -> Spec:
    """The distribution that a parameter names, or that its keys imply; ValueError if none."""
    if not isinstance(given, Mapping):
        raise ValueError(f"got {json.dumps(given)}; expected {_FORMS}")
    keys = given.keys() - {"distribution"}
    whole = all(type(given.get(end)) is int for end in ("min", "max"))
    implied = {
        frozenset({"value"}): "constant",
        frozenset({"values"}): "categorical",
        frozenset({"values", "probabilities"}): "categorical_w_probabilities",
        frozenset({"min", "max"}): "int_uniform" if whole else "uniform",
    }
    name = given.get("distribution", implied.get(frozenset(keys)))
    if name is None:
        raise ValueError(f"got {json.dumps(dict(given))}; expected {_FORMS}")
    if not isinstance(name, str) or name not in _DISTRIBUTIONS:
        near = difflib.get_close_matches(str(name), _DISTRIBUTIONS, n=1)
        known = f"did you mean {near[0]}?" if near else f"known: {', '.join(_DISTRIBUTIONS)}"
        raise ValueError(f"distribution: got {name}; {known}")
    defaults = _DISTRIBUTIONS[name]
    missing = [key for key, value in defaults.items() if value is None and key not in keys]
    if missing or keys - defaults.keys():
        raise ValueError(
            f"got {json.dumps(dict(given))}; {name} takes {' and '.join(defaults)}, nothing else"
        )
    settings = {key: given.get(key, default) for key, default in defaults.items()}
    _check_spec(name, settings)
    spec = Spec(name, settings)
    if "value" not in settings and "values" not in settings:
        try:
            finite = all(math.isfinite(spec.quantile(at)) for at in (_EDGE, 0.5, 1 - _EDGE))
        except (OverflowError, ValueError):  # an infinite or undefined value made whole
            finite = False
        if not finite:
            raise ValueError(
                f"got {json.dumps(dict(given))}; that draws numbers that are not finite; narrow it"
            )
    return spec


def _check_spec(name: str, settings: Mapping[str, Any]) -> None:
    """ValueError for settings with which nothing could be drawn."""
    for key in ("values", "probabilities"):
        if key in settings and not (isinstance(settings[key], list) and settings[key]):
            raise ValueError(f"{key}: expected a list with one value or more")
    numbers = {k: v for k, v in settings.items() if k not in ("value", "values", "probabilities")}
    numbers |= {f"probabilities[{k}]": p for k, p in enumerate(settings.get("probabilities", []))}
    for key, value in numbers.items():
        if not is_finite(value):
            raise ValueError(f"{key}: got {value!r:.60}; expected a number{_number_cure(value)}")
        if key in ("q", "sigma", "a", "b") and value <= 0:
            raise ValueError(f"{key}: got {value}; expected a number above 0")
        if abs(value) > _MAX_WHOLE and isinstance(value, int):
            raise ValueError(f"{key}: got a whole number beyond 2**53; write it as a float")
    if name == "int_uniform" and not all(type(settings[end]) is int for end in _BOUNDS):
        raise ValueError("int_uniform takes whole numbers as min and max; uniform takes others")
    if "min" in settings and settings["min"] >= settings["max"]:
        raise ValueError(
            f"min {settings['min']} is not below max {settings['max']}; raise max, or write "
            "`value:` for a single one"
        )
    if name.endswith("_values") and settings["min"] <= 0:
        raise ValueError(f"min: got {settings['min']}; expected a number above 0 for {name}")
    if "probabilities" in settings:
        chances = settings["probabilities"]
        if len(chances) != len(settings["values"]):
            raise ValueError(
                f"{len(settings['values'])} values and {len(chances)} probabilities; expected one "
                "for each value"
            )
        if min(chances) < 0 or not math.isclose(sum(chances), 1, rel_tol=1e-5):
            raise ValueError(f"probabilities: got {chances}; expected none below 0, and sum 1")


def _number_cure(value: Any) -> str:
    """How to write text that is meant as a number: W&B takes 1e-4 for text."""
    try:
        return f": W&B takes that for text; write {_number_text(float(value))}"
    except (TypeError, ValueError, OverflowError):
        return ""


def _number_text(value: float) -> str:
    return yaml.safe_dump(value).split("\n")[0]


def grid_values(spec: Spec) -> Sequence[Any]:
    """The values of one parameter of a grid; ValueError if they have no end, or too many."""
    settings = spec.settings
    if spec.distribution == "constant":
        return [settings["value"]]
    if spec.distribution == "categorical":
        return _distinct(settings["values"])
    if spec.distribution not in ("int_uniform", "q_uniform"):
        raise ValueError(
            f"a grid takes `values: [...]`, `value: ...`, or whole `min:` and `max:`, and not "
            f"{spec.distribution}; for that set method: random"
        )
    low, high, step = settings["min"], settings["max"], settings.get("q", 1)
    if (high - low) / step > MAX_GRID_TRIALS:
        raise ValueError(
            f"about {(high - low) / step:.3g} values; a grid takes up to {MAX_GRID_TRIALS:,} of a "
            "parameter; use fewer, or set method: random"
        )
    if spec.distribution == "int_uniform":
        return list(range(low, high + 1))
    import numpy as np

    return np.arange(low, high, step).tolist()


def examples(specs: Mapping[str, Spec]) -> list[dict[str, Any]]:
    """Trials that together show every value, or the ends and the middle of its range."""
    choices = {name: _examples(spec) for name, spec in specs.items()}
    first = {name: values[0] for name, values in choices.items()}
    others = [{**first, name: value} for name, values in choices.items() for value in values[1:]]
    return [first, *others]


def random_values(specs: Mapping[str, Spec], draw: int) -> dict[str, Any]:
    """The trial number `draw`, from 0, of a random search. The number alone decides what is drawn,
    so that a sweep that goes on goes on the same."""
    rng = random.Random(f"{_SEARCH_SEED}/{draw}")
    rng.getrandbits(32)  # once a seed for NumPy: sweeps begun before this go on with their draws
    return {name: spec.quantile(rng.uniform(0.0, 1.0)) for name, spec in specs.items()}


def bayes_values(
    specs: Mapping[str, Spec], metric: MetricConfig, trials: Sequence[Trial]
) -> dict[str, Any]:
    """The next trial of a Bayesian search: where Optuna's Gaussian process expects most.

    The first ones are those of a random search. The model sees a number as the share of draws below
    it, and values that are listed as categories. What is drawn follows from the trials alone, so
    that a sweep that goes on goes on the same.

    Raises:
        UserError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "method: bayes needs the package optuna, which is not installed; "
            "`pip install -r requirements.txt`, or set method: random"
        ) from error
    results = _results(metric, trials)
    varied = {name: spec for name, spec in specs.items() if spec.distribution != "constant"}
    if len(results) < _RANDOM_FIRST or not varied:
        return random_values(specs, len(trials))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        space = {
            name: optuna.distributions.CategoricalDistribution(range(len(spec.settings["values"])))
            if "values" in spec.settings
            else optuna.distributions.FloatDistribution(0, 1)
            for name, spec in varied.items()
        }
        seed = random.Random(f"{_SEARCH_SEED}/{len(trials)}").getrandbits(32)
        study = optuna.create_study(
            direction=metric.goal, sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        )
        states = optuna.trial.TrialState
        for trial in trials:
            seen = {name: _as_seen(spec, trial.values[name]) for name, spec in varied.items()}
            value = results.get(trial.name)
            state = states.RUNNING if value is None else states.COMPLETE
            study.add_trial(
                optuna.trial.create_trial(
                    state=state, value=value, params=seen, distributions=space
                )
            )
        drawn = study.ask(space).params
    finally:
        optuna.logging.set_verbosity(before)
    values = {}
    for name, spec in specs.items():
        if name not in varied:
            values[name] = spec.settings["value"]
        elif "values" in spec.settings:
            values[name] = spec.settings["values"][drawn[name]]
        else:
            values[name] = spec.quantile(min(max(drawn[name], _EDGE), 1 - _EDGE))
    return values


def trials_to_stop(
    rule: HyperbandConfig, goal: Literal["minimize", "maximize"], trials: Sequence[Trial]
) -> list[Trial]:
    """The running trials that hyperband gives up: those that at the last iteration to judge at
    which they have reached are not among the better 1/eta of all that have reached it.

    A trial counts by its best score so far, that of step 0 included, and with `strict: true` by its
    score at that iteration. Scores that are no finite numbers do not count as iterations.
    """
    sign = -1 if goal == "maximize" else 1  # from here on, lower is better
    histories = {trial.name: [sign * score for score in trial.history] for trial in trials}
    bands = _bands(rule, max(map(len, histories.values()), default=0))
    stopped = []
    for trial in trials:
        history = histories[trial.name]
        reached = [band for band in bands if band < len(history)]
        if trial.state != "running" or not reached:
            continue
        band = reached[-1]
        there = sorted(other[band] for other in histories.values() if band < len(other))
        threshold = there[int(1 / rule.eta * len(there))]
        if (history[band] if rule.strict else min(history)) > threshold:
            stopped.append(trial)
    return stopped


def _bands(rule: HyperbandConfig, longest: int) -> list[int]:
    """The iterations below `longest` at which trials are judged, in ascending order."""
    bands = []
    if rule.max_iter is not None and rule.s is not None:
        band = float(rule.max_iter)
        for _ in range(min(rule.s, _MAX_BANDS)):
            band /= rule.eta
            if band < 1:
                break
            bands.append(int(band))
        return sorted(band for band in bands if band < longest)
    band = float(rule.min_iter)
    while band < longest and len(bands) < _MAX_BANDS:
        bands.append(int(band))
        band *= rule.eta
    return bands


def _results(metric: MetricConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """Trial -> the result that a Bayesian search learns from; nothing for trials under way.

    That is the best score of a trial that finished with one. For others `metric.impute` decides:
    the worst score of all trials that ended (W&B's default), or their own latest or best.
    """
    best_of, worst_of = (max, min) if metric.goal == "maximize" else (min, max)
    ended = [trial for trial in trials if trial.state in ("finished", "stopped", "failed")]
    scores = [score for trial in ended for score in trial.history]
    results = {}
    for trial in ended if scores else ():
        if trial.state == "finished" and trial.score is not None:
            results[trial.name] = best_of(trial.history)
        elif not trial.history or metric.impute in (None, "worst"):
            results[trial.name] = worst_of(scores)
        else:
            results[trial.name] = (
                trial.history[-1] if metric.impute == "latest" else best_of(trial.history)
            )
    # The model squares scores: beyond this they would overflow.
    return {name: min(max(value, -_MAX_SCORE), _MAX_SCORE) for name, value in results.items()}


def _as_seen(spec: Spec, value: Any) -> float:
    """A value as the model sees it: its place in the list, or its share of the range."""
    if "values" in spec.settings:
        return [value_key(choice) for choice in spec.settings["values"]].index(value_key(value))
    return min(max(spec.share(value), 0.0), 1.0)


def _examples(spec: Spec) -> list[Any]:
    if spec.distribution == "constant":
        return [spec.settings["value"]]
    if "values" in spec.settings:
        return list(spec.settings["values"])
    if "min" not in spec.settings:
        return [spec.quantile(at) for at in (0.01, 0.5, 0.99)]
    low, middle, high = (spec.quantile(at) for at in (_EDGE, 0.5, 1 - _EDGE))
    if "log" not in spec.distribution or spec.distribution.endswith("_values"):
        # The ends as they are written; those of the others are exponents.
        low, high = (type(middle)(spec.settings[end]) for end in ("min", "max"))
    return [low, middle, high]


def _distinct(values: Sequence[Any]) -> list[Any]:
    seen: dict[str, Any] = {}
    for value in values:
        seen.setdefault(value_key(value), value)
    return list(seen.values())


def value_key(value: Any) -> str:
    """What tells values of a parameter apart, as in W&B's engine: 1, 1.0 and true are three."""
    return yaml.safe_dump(value)
