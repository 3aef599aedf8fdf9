"""Random and Bayesian search, and hyperband: the values they draw and the trials they stop."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sweep import SEEDS, problems, run

from sam2train.errors import UserError
from sam2train.sweep_file import load_sweep
from sam2train.sweep_search import (
    HyperbandConfig,
    MetricConfig,
    bayes_values,
    examples,
    random_values,
    read_spec,
    trials_to_stop,
)
from sam2train.sweep_trials import Trial

# Drawn by W&B's engine, sweeps 0.2.0, after random.seed("0/7") and one getrandbits(32).
DRAWN = {
    "a": ({"min": 1, "max": 9}, 5),
    "b": ({"min": 0.5, "max": 9}, 6.952486982721654),
    "c": ({"values": [1, "x", [2]]}, "x"),
    "d": ({"values": [1, 2, 3], "probabilities": [0.2, 0.5, 0.3]}, 3),
    "e": ({"distribution": "q_uniform", "min": 0.05, "max": 3, "q": 0.1}, 0.4),
    "f": ({"distribution": "log_uniform", "min": -4, "max": -1}, 0.02765335892233673),
    "g": ({"distribution": "log_uniform_values", "min": 1e-5, "max": 0.01}, 3.708939430709591e-05),
    "h": ({"distribution": "q_log_uniform", "min": 0, "max": 3}, 4.0),
    "i": ({"distribution": "q_log_uniform_values", "min": 1, "max": 30, "q": 2}, 12),
    "j": ({"distribution": "inv_log_uniform", "min": 1, "max": 3}, 0.1294168134923601),
    "k": ({"distribution": "inv_log_uniform_values", "min": 0.1, "max": 3}, 2.065337455198307),
    "l": ({"distribution": "normal"}, 2.289624843229843),
    "m": ({"distribution": "q_normal", "mu": 3, "sigma": 2, "q": 0.5}, 1.5),
    "n": ({"distribution": "log_normal", "mu": 1}, 6.571931327979549),
    "o": ({"distribution": "q_log_normal", "q": 1}, 0),
    "p": ({"distribution": "beta", "a": 2, "b": 3}, 0.5590786304711706),
    "q": ({"distribution": "q_beta", "q": 0.1}, 0.8),
    "r": ({"value": None}, None),
    "s": ({"distribution": "uniform", "min": 1, "max": 2}, 1.895831894023348),
    "t": ({"distribution": "int_uniform", "min": -3, "max": 1000}, 347),
}
SPECS = {name: read_spec(given) for name, (given, _) in DRAWN.items()}
MAXIMIZE = MetricConfig(name="val/J_and_F", goal="maximize")


def ended(name: str, values: dict, history: list[float], state: str = "finished") -> Trial:
    return Trial(name, "id", values, Path("none"), state=state, history=history)


def search(specs, score, num: int, draw=bayes_values) -> list[Trial]:
    """Finished trials, one after the other, each scored by `score(values)`."""
    trials = []
    for index in range(num):
        values = draw(specs, MAXIMIZE, trials)
        trials.append(ended(f"{index + 1:03d}", values, [0.0, score(values)]))
    return trials


def at_random(specs, metric, trials):
    return random_values(specs, len(trials))


class TestRandomSearch:
    def test_the_draws_of_wandbs_engine(self):
        found = random_values(SPECS, 7)
        expected = {name: value for name, (_, value) in DRAWN.items()}
        assert list(map(repr, found.items())) == list(map(repr, expected.items()))

    def test_the_number_of_the_trial_alone_decides(self, small):
        made = load_sweep(small({"loss.dice": {"min": 0.5, "max": 9}}, method="random"))
        trials = [ended("001", {"loss.dice": 1.0}, []), ended("002", {"loss.dice": 2.0}, [0.5])]
        assert made.next_values(trials) == random_values(made.specs, 2)
        assert made.next_values(trials[:1]) != made.next_values(trials)

    @pytest.mark.parametrize("name", [n for n in SPECS if "min" in SPECS[n].settings])
    def test_draws_fill_their_range(self, name):
        spec, drawn = SPECS[name], [random_values({name: SPECS[name]}, k)[name] for k in range(300)]
        low, *_, high = examples({name: spec})
        step = spec.settings.get("q", 0)
        assert low[name] - step <= min(drawn) < max(drawn) <= high[name] + step
        middle = spec.quantile(0.5)
        assert 100 < sum(value <= middle for value in drawn) < 230

    def test_other_random_numbers_are_left_alone(self):
        trials = search(SPECS, lambda values: values["b"], 4)
        for draw in (at_random, bayes_values):
            seen = []
            for touch in (False, True):
                random.seed(1)
                np.random.seed(1)  # noqa: NPY002
                torch.manual_seed(1)
                if touch:
                    draw(SPECS, MAXIMIZE, trials)
                seen.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
            assert seen[0] == seen[1]


class TestRanges:
    @pytest.mark.parametrize(
        "name",
        [n for n, s in SPECS.items() if "value" not in s.settings and "values" not in s.settings],
    )
    def test_a_share_leads_back_to_its_value(self, name):
        spec = SPECS[name]
        for at in (0.1, 0.37, 0.8):
            value = spec.quantile(at)
            assert spec.quantile(spec.share(value)) == pytest.approx(value)

    def test_examples_show_every_value_and_both_ends(self):
        specs = {name: SPECS[name] for name in ("a", "c", "g")}
        first, *others = examples(specs)
        assert first == {"a": 1, "c": 1, "g": 1e-5}
        assert [row["a"] for row in others[:2]] == [5, 9]
        assert [row["c"] for row in others[2:4]] == ["x", [2]]
        assert [row["g"] for row in others[4:]] == [pytest.approx(10**-3.5), 0.01]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"least": 1, "most": 3}, "expected `values: [...]`"),
            ({"min": 1}, "expected `values: [...]`"),
            ([1, 2], "expected `values: [...]`"),
            (None, "expected `values: [...]`"),
            ({"min": 4, "max": 3}, "min 4 is not below max 3"),
            ({"min": 3, "max": 3}, "min 3 is not below max 3"),
            ({"min": 1, "max": True}, "max: got True; expected a number"),
            ({"min": 1, "max": "many"}, "max: got 'many'; expected a number"),
            ({"min": 1.0, "max": math.inf}, "max: got inf; expected a number"),
            ({"min": math.nan, "max": 1.0}, "min: got nan; expected a number"),
            ({"min": 0, "max": 10**400}, "expected a number"),
            ({"min": 0, "max": 10**20}, "beyond 2**53"),
            ({"min": 0.5, "max": 3, "distribution": "int_uniform"}, "takes whole numbers"),
            ({"min": 0, "max": 1, "distribution": "log_uniform_values"}, "above 0"),
            ({"min": 0, "max": 5000, "distribution": "log_uniform"}, "not finite"),
            ({"min": 0, "max": 1, "distribution": "q_uniform", "q": 1e-320}, "not finite"),
            ({"min": 0, "max": 1, "distribution": "unifrom"}, "did you mean uniform?"),
            ({"min": 0, "max": 1, "distribution": ["uniform"]}, "distribution: got ['uniform']"),
            ({"min": 0, "max": 1, "distribution": "uniform", "q": 1}, "takes min and max"),
            ({"mu": 0, "sigma": 0, "distribution": "normal"}, "sigma: got 0"),
            ({"distribution": "beta", "a": 0}, "a: got 0"),
            ({"distribution": "q_beta", "q": -1}, "q: got -1"),
            ({"values": []}, "one value or more"),
            ({"values": "abc"}, "one value or more"),
            ({"values": [1, 2], "probabilities": [1.0]}, "2 values and 1 probabilities"),
            ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "sum 1"),
            ({"values": [1, 2], "probabilities": [-0.5, 1.5]}, "none below 0"),
            ({"values": [1, 2], "probabilities": ["a", 1.5]}, "probabilities[0]: got 'a'"),
        ],
    )
    def test_what_nothing_can_be_drawn_from(self, given, expected):
        with pytest.raises(ValueError, match=r"\w") as caught:
            read_spec(given)
        assert expected in str(caught.value)

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ({"min": 0.1, "max": 3.5, "distribution": "uniform"}, "trainer.seed: got 0.1"),
            ({"min": -3, "max": 3}, "trainer.seed: got -3"),
            ({"values": [1, -1]}, "trainer.seed: got -1"),
            ({"least": 1, "most": 3}, "parameters.trainer.seed: got"),
            ({"min": 4, "max": 3}, "parameters.trainer.seed: min 4"),
        ],
    )
    def test_ranges_are_checked_before_the_first_trial(self, small, spec, expected):
        assert expected in problems(small, {"trainer.seed": spec}, method="random", run_cap=2)


class TestBayesianSearch:
    RATES = {  # noqa: RUF012
        "optimizer.learning_rate": read_spec(
            {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}
        ),
        "optimizer.warmup_steps": read_spec({"min": 0, "max": 9}),
        "trainer.seed": read_spec({"value": 3}),
    }

    @staticmethod
    def score(values) -> float:
        return 1 - abs(math.log10(values["optimizer.learning_rate"]) + 3) / 4  # best at 1e-3

    def test_draws_are_in_range_and_the_same_again(self):
        drawn = [trial.values for trial in search(self.RATES, self.score, 7)]
        assert drawn == [trial.values for trial in search(self.RATES, self.score, 7)]
        assert len({values["optimizer.learning_rate"] for values in drawn}) == 7
        for values in drawn:
            assert 1e-5 <= values["optimizer.learning_rate"] <= 1e-2
            assert 0 <= values["optimizer.warmup_steps"] <= 9
            assert values["trainer.seed"] == 3
            assert type(values["optimizer.learning_rate"]) is float
            assert type(values["optimizer.warmup_steps"]) is int

    def test_it_learns_from_the_trials(self):
        found = search(self.RATES, self.score, 12)
        assert max(trial.score for trial in found) > 0.99
        plain = search(self.RATES, self.score, 12, at_random)
        assert max(trial.score for trial in found) > max(trial.score for trial in plain)

    def test_the_goal_decides_what_is_better(self):
        specs = {"x": read_spec({"min": 0.0, "max": 1.0})}
        trials = [
            ended(f"{k}", {"x": x}, [x]) for k, x in enumerate((0.1, 0.3, 0.5, 0.7, 0.9, 0.2, 0.8))
        ]
        assert bayes_values(specs, MAXIMIZE, trials)["x"] > 0.8
        assert bayes_values(specs, MetricConfig(name="loss"), trials)["x"] < 0.2

    def test_every_distribution_is_searched(self):
        trials = search(SPECS, lambda values: values["b"] - values["s"], 6)
        for values in (trial.values for trial in trials):
            assert list(values) == list(SPECS)
            assert [type(values[name]) for name in "abdgilopst"] == [
                *(int, float, int, float, int, float, int, float, float, int)
            ]
            assert values["c"] in [1, "x", [2]]
            assert values["r"] is None
            assert values["e"] == pytest.approx(round(values["e"] / 0.1) * 0.1)
            for name in "befghjklmnpqs":
                assert math.isfinite(values[name])
        assert bayes_values(SPECS, MAXIMIZE, trials) != random_values(SPECS, len(trials))

    def test_trials_without_a_result_count_as_the_worst(self):
        """As with W&B, unless `impute` says otherwise; one such region is left alone."""
        specs = {"x": read_spec({"min": 0.0, "max": 1.0})}
        good = [ended(f"{k}", {"x": x}, [0.5 + x]) for k, x in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))]
        broken = [ended(f"f{k}", {"x": x}, [], "failed") for k, x in enumerate((0.7, 0.8, 0.9))]
        assert bayes_values(specs, MAXIMIZE, good)["x"] > 0.6
        assert bayes_values(specs, MAXIMIZE, [*good, *broken])["x"] < 0.68
        diverged = [ended(f"d{k}", {"x": x}, [2.0]) for k, x in enumerate((0.7, 0.8, 0.9))]
        tempting = bayes_values(specs, MAXIMIZE, [*good, *diverged])["x"]
        assert tempting > 0.6
        for trial in diverged:
            trial.diverged = True
        assert bayes_values(specs, MAXIMIZE, [*good, *diverged])["x"] < tempting

    @pytest.mark.parametrize(("impute", "expected"), [("best", 0.9), ("latest", 0.5), (None, 0.1)])
    def test_what_a_stopped_trial_counts_as(self, impute, expected):
        from sam2train.sweep_search import _results

        metric = MetricConfig(name="val/J_and_F", goal="maximize", impute=impute)
        trials = [ended("001", {}, [0.1, 0.4]), ended("002", {}, [0.2, 0.9, 0.5], "stopped")]
        trials.append(ended("003", {}, [0.3], "running"))
        assert _results(metric, trials) == {"001": 0.4, "002": expected}

    def test_trials_under_way_are_taken_into_account(self):
        specs = {"x": read_spec({"min": 0.0, "max": 1.0})}
        trials = search(specs, lambda values: 1 - (values["x"] - 0.4) ** 2, 6)
        away, there = (
            bayes_values(specs, MAXIMIZE, [*trials, ended("007", {"x": x}, [], state)])["x"]
            for x, state in ((0.4, "running"), (0.9, "waiting"))
        )
        assert abs(away - 0.4) > abs(there - 0.4)

    @pytest.mark.parametrize("history", [[1e308], [-1e308], [0.5], [5e-324]])
    def test_scores_of_any_size(self, history):
        specs = {"x": read_spec({"min": 0.0, "max": 1.0})}
        trials = [ended(f"{k}", {"x": k / 5}, history) for k in range(5)]
        trials.append(ended("6", {"x": 0.3}, [0.7]))
        assert 0 <= bayes_values(specs, MAXIMIZE, trials)["x"] <= 1

    def test_nothing_but_constants(self):
        specs = {"x": read_spec({"value": 3})}
        assert [trial.values for trial in search(specs, lambda _: 0.5, 6)] == [{"x": 3}] * 6

    def test_one_value_is_no_choice(self):
        specs = {"x": read_spec({"values": [3]}), "y": read_spec({"min": 0.0, "max": 1.0})}
        assert {t.values["x"] for t in search(specs, lambda v: v["y"], 6)} == {3}

    def test_without_optuna(self, small, monkeypatch):
        monkeypatch.setitem(sys.modules, "optuna", None)
        rate = {"loss.dice": {"min": 0.1, "max": 0.5}}
        path = small({**rate, **SEEDS}, method="bayes", run_cap=5)
        with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
            run(path)
        path = small({**rate, **SEEDS}, method="random", run_cap=2)
        assert run(path, folder=Path("elsewhere")) == 0


class TestHyperband:
    CURVES = {  # noqa: RUF012
        "001": [0.1, 0.5, 0.6],
        "002": [0.1, 0.2],
        "003": [0.1],
        "004": [0.1, 0.55],
        "005": [0.6, 0.3],
    }

    def stopped(self, rule: dict, goal: str = "maximize", curves=None) -> list[str]:
        sign = 1 if goal == "maximize" else -1
        trials = [
            ended(name, {}, [sign * score for score in curve], "running")
            for name, curve in (curves or self.CURVES).items()
        ]
        trials[0].state = "finished"
        found = trials_to_stop(HyperbandConfig(type="hyperband", **rule), goal, trials)
        return [trial.name for trial in found]

    @pytest.mark.parametrize("goal", ["maximize", "minimize"])
    def test_the_lower_half_is_stopped(self, goal):
        # At iteration 1: 0.55, 0.5, 0.3, 0.2; the third, at 4 / 2, is the least that goes on.
        assert self.stopped({"min_iter": 1, "eta": 2}, goal) == ["002"]

    def test_the_best_so_far_counts_unless_it_is_strict(self):
        # The trial 005 scored 0.6 before training; the better third of 4 is the upper 2.
        assert self.stopped({"min_iter": 1, "eta": 3}) == ["002"]
        assert self.stopped({"min_iter": 1, "eta": 3, "strict": True}) == ["002", "005"]

    def test_the_last_iteration_that_was_reached_decides(self):
        curves = {"001": [0, 1, 5], "002": [0, 2, 3], "003": [0, 3], "004": [0, 0.5, 4]}
        # At iteration 2 of 001, 002 and 004 (5, 3, 4) the second, 4, is the least that goes on.
        assert self.stopped({"min_iter": 1, "eta": 2}, curves=curves) == ["002"]

    def test_iterations_counted_back_from_the_last(self):
        curves = {"001": [0, 0, 0, 9], "002": [0, 0, 0, 1], "003": [5, 5]}
        rule = {"max_iter": 9, "eta": 3, "s": 2}  # at 1 and 3
        assert self.stopped(rule, curves=curves) == ["002"]
        assert self.stopped({**rule, "s": 1}, curves=curves) == ["002"]
        assert self.stopped({**rule, "max_iter": 27, "s": 1}, curves=curves) == []

    def test_min_iter_counts_where_max_iter_lacks_s(self):
        assert self.stopped({"min_iter": 1, "max_iter": 9, "eta": 2}) == ["002"]

    def test_no_scores_yet(self):
        curves = {"001": [], "002": [], "003": [0.1]}
        assert self.stopped({"min_iter": 1}, curves=curves) == []

    def test_settings_that_would_never_end(self):
        rule = {"min_iter": 1, "eta": 1 + 1e-12}
        assert self.stopped(rule) in ([], ["002"])
        assert self.stopped({"max_iter": 10**9, "s": 10**9, "eta": 1 + 1e-12}) == []

    @pytest.mark.parametrize(
        ("early", "expected"),
        [
            ({}, "needs min_iter"),
            ({"max_iter": 9}, "needs min_iter"),
            ({"max_iter": 2, "s": 1}, "max_iter 2 is below eta 3"),
            ({"min_iter": 0}, "early_terminate.min_iter: got 0"),
            ({"min_iter": 1, "eta": 1}, "early_terminate.eta: got 1"),
            ({"min_iter": 1, "strict": "yes"}, "early_terminate.strict"),
        ],
    )
    def test_mistakes(self, small, early, expected):
        rule = {"type": "hyperband", **early}
        assert expected in problems(small, SEEDS, early_terminate=rule)
