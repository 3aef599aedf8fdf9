"""Sweep files: the trials that they ask for, as W&B starts them, and what they are refused for."""

import io
import itertools
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from small_sweep import COMMAND, ROOT, SEEDS, SWEEPS, calls, problems, run
from test_results import make_run

from sam2train import cli, sweep_file
from sam2train.config import flatten, parse_overrides, sweep_parameters
from sam2train.config_yaml import load_yaml
from sam2train.errors import UserError
from sam2train.sweep_file import check_values, grid, in_grid, load_sweep
from sam2train.sweep_search import examples
from sam2train.sweep_trials import VALUES, Trial


class TestTrialsOfAFile:
    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_the_files_here_say_what_they_ask(self, path):
        made = load_sweep(path)
        # One value to W&B, which reads YAML 1.1, and to the experiments, which are YAML 1.2.
        assert yaml.safe_load(path.read_text()) == load_yaml(path)
        values = grid(made) if made.config.method == "grid" else examples(made.specs)
        assert len(check_values(made, values)) == len(values)
        assert (made.config.metric.name, made.config.metric.goal) == ("val/J_and_F", "maximize")
        assert made.config.name == path.stem
        header = path.read_text().split("name:")[0]
        for part in ("?", f"python run.py sweeps/{path.name}", "wandb agent", "minutes", "trials"):
            assert part in header

    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_the_words_of_wandb_agent(self, path):
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

        made = load_sweep(path)
        for values in grid(made) if made.config.method == "grid" else examples(made.specs):
            given = {name: {"value": v} for name, v in made.arguments(values).items()}
            theirs = []
            parts = create_sweep_command_args({"args": given}) | {"env": [], "program": ["PROGRAM"]}
            for item in create_sweep_command(list(made.config.command)):
                theirs += parts.get(item[2:-1], [item]) if item[:2] == "${" else [item]
            ours = made.command(values)
            assert ours[0] == sys.executable
            assert Path(ours[1]) == ROOT / "run.py"
            assert ours[2:] == theirs[2:]

    @pytest.mark.parametrize(
        ("parameters", "expected"),  # drawn by W&B's engine, sweeps 0.2.0; names sorted
        [
            (
                {"trainer.seed": {"values": [2, 0]}, "loss.dice": {"values": [1, 1.0, 1, 2.5]}},
                [(1, 2), (1, 0), (1.0, 2), (1.0, 0), (2.5, 2), (2.5, 0)],
            ),
            (
                {"model.num_maskmem": {"min": 1, "max": 3}, "bf": {"value": None}},
                [(None, 1), (None, 2), (None, 3)],
            ),
            (
                {"x": {"distribution": "q_uniform", "min": 0.0, "max": 2.0, "q": 0.5}},
                [(0.0,), (0.5,), (1.0,), (1.5,)],
            ),
            (
                {"x": {"distribution": "q_uniform", "min": 0.1, "max": 0.7, "q": 0.2}},
                [(0.1,), (0.30000000000000004,), (0.5000000000000001,)],
            ),
            (
                {"types": {"values": [["point"], ["bbox"]]}, "b": {"values": [True, None]}},
                [(True, ["point"]), (True, ["bbox"]), (None, ["point"]), (None, ["bbox"])],
            ),
        ],
    )
    def test_the_grid_of_wandbs_engine(self, small, parameters, expected):
        found = grid(load_sweep(small(parameters)))
        assert [repr(tuple(values.values())) for values in found] == list(map(repr, expected))

    def test_the_ablations_in_numbers(self):
        prompts, memory = (
            load_sweep(ROOT / "sweeps" / f"{n}.yaml") for n in ("prompts", "num_maskmem")
        )
        sets = (["point"], ["bbox"], ["mask"], ["point", "bbox"], ["point", "bbox", "mask"])
        expected = [
            {"dataset.prompt_types": types, "trainer.seed": seed}
            for types, seed in itertools.product(sets, range(3))
        ]
        assert grid(prompts) == expected
        cells = {
            (v["model.num_maskmem"], v["model.max_obj_ptrs_in_encoder"], v["trainer.seed"])
            for v in grid(memory)
        }
        assert cells == {*itertools.product((0, 1, 2, 4, 7), (0, 16), range(3))}
        assert len(grid(memory)) == 30

    def test_nested_and_dotted_names_are_one_setting(self, small):
        nested = {"model": {"parameters": {"num_maskmem": {"values": [2, 4]}}}}
        inner = load_sweep(small({**nested, **SEEDS}))
        assert [v["model.num_maskmem"] for v in grid(inner)] == [2, 2, 2, 4, 4, 4]
        last = grid(inner)[-1]
        assert inner.command(last)[3:] == ["--model={'num_maskmem': 4}", "--trainer.seed=2"]
        assert inner.experiment(last).model.num_maskmem == 4
        both = {**nested, "model.num_maskmem": {"values": [1]}}
        assert "is there twice" in problems(small, both)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("optimizer.learning_rate", [1e-05, 0.001, 3]),
            ("trainer.bf16", [None, True, False]),
            ("trainer.seed", [0, 7]),
            ("model.memory_gradient", ["full", "detached", 2]),
            ("dataset.prompt_types", [["point"], ["point", "mask"]]),
            ("model.checkpoint_path", [None, "a b/it's.pt", "007", "yes", "null", "[x"]),
            ("optimizer.learning_rates", [{"mask_decoder": 1e-05}, {}]),
            ("tracking.tags", [["007", "yes"], []]),
        ],
    )
    def test_values_of_every_type_arrive(self, small, tmp_path, name, values):
        made = load_sweep(small({name: {"values": values}}))
        experiments = check_values(made, grid(made))
        for trial_values, experiment in zip(grid(made), experiments, strict=True):
            trial = Trial("001", "id", trial_values, tmp_path / "001")
            trial.write_values(made.arguments(trial_values))
            # As the command line does it: words first, then the typed values of the file.
            overrides = parse_overrides(made.command(trial_values)[3:])
            overrides |= sweep_parameters(tmp_path / "001" / VALUES)
            given = flatten(trial_values)
            assert {key: overrides[key] for key in given} == given
            assert list(map(type, map(overrides.get, given))) == list(map(type, given.values()))
            assert sweep_file.load_experiment(tmp_path / "small.yaml", overrides) == experiment

    def test_settings_in_the_command(self, small):
        command = [*COMMAND[1:4], "trainer.num_steps=7", "${args_no_hyphens}"]
        made = load_sweep(small(SEEDS, command=command), ["trainer.log_every=3"])
        words = made.command({"trainer.seed": 1})
        assert words[:2] == [sys.executable, str(sweep_file.REPOSITORY / "run.py")]
        expected = ["small.yaml", "trainer.num_steps=7", "trainer.seed=1", "trainer.log_every=3"]
        assert words[2:] == expected
        settings = made.experiment({"trainer.seed": 1}).trainer
        assert (settings.num_steps, settings.seed, settings.log_every) == (7, 1, 3)

    def test_a_config_file_among_the_settings_is_no_experiment(self, small):
        words = ["model.config_path=sam2train/configs/sam2.1_hiera_demo.yaml"]
        command = [*COMMAND[:3], *words, *COMMAND[3:]]
        made = load_sweep(small(SEEDS, command=command))
        assert made.experiment({"trainer.seed": 1}).trainer.num_steps == 4


class TestMistakes:
    def test_unknown_names_and_values_out_of_range_all_at_once(self, small):
        parameters = {
            "model.num_maskmen": {"values": [1]},
            "trainer.seed": {"values": [0, -1, "one"]},
            "dataset.prompt_types": {"values": [["point"], ["pointe"]]},
        }
        message = problems(small, parameters)
        assert "model.num_maskmen: unknown key" in message
        assert "`model.num_maskmem`" in message
        assert "trainer.seed: got -1; expected a whole number of at least 0" in message
        assert 'trainer.seed: got "one"' in message
        assert "did you mean point?" in message
        assert "4 problems" in message

    def test_settings_that_do_not_go_together(self, small):
        message = problems(small, {"model.image_size": {"values": [64, 128]}})
        assert "set dataset.image_size to [128, 128]" in message

    @pytest.mark.parametrize(
        ("written", "cure"), [("1e-4", "0.0001"), ("1e-5", "1.0e-05"), ("3e-2", "0.03")]
    )
    @pytest.mark.parametrize("form", ["{values: [NUMBER]}", "{min: NUMBER, max: 0.5}"])
    def test_a_number_that_is_text_to_wandb(self, small, written, cure, form):
        path = small({"optimizer.learning_rate": "SPEC"}, method="random", run_cap=2)
        text = path.read_text().replace("SPEC", form)
        path.write_text(text.replace("NUMBER", written))
        with pytest.raises(UserError) as caught:
            run(path)
        assert f"write {cure}" in str(caught.value)
        assert "text" in str(caught.value)
        path.write_text(text.replace("NUMBER", cure))
        made = load_sweep(path)
        assert check_values(made, examples(made.specs))[0].optimizer.learning_rate == float(written)

    def test_smoke_is_known_to_the_sweep(self, small):
        made = load_sweep(small({"trainer.seed": {"values": [0]}}), ["--smoke"])
        assert made.experiment({"trainer.seed": 0}).trainer.num_steps == 2

    @pytest.mark.parametrize(
        ("written", "read"), [("on", "true"), ("010", "8"), ("1_000", "1000"), ("12:30", "750")]
    )
    def test_values_are_those_that_wandb_reads(self, small, written, read):
        path = small({"tracking.name": {"values": ["word"]}})
        path.write_text(path.read_text().replace("word", written))
        with pytest.raises(UserError, match=f"tracking.name: got {read}; expected text"):
            run(path)
        path.write_text(path.read_text().replace(written, f"'{written}'"))
        assert grid(load_sweep(path)) == [{"tracking.name": written}]

    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            ("2020-01-01", "a date; put it in quotes"),
            ("!!binary aGk=", "a bytes; put it in quotes"),
            ("!!set {a, b}", "a set; put it in quotes"),
            ("2020-13-45", "W&B cannot read it"),
            ("{on: 1}", "the key True"),
        ],
    )
    def test_values_that_no_trial_can_be_given(self, small, written, expected):
        path = small({"tracking.name": {"values": ["word"]}})
        path.write_text(path.read_text().replace("word", written))
        with pytest.raises(UserError) as caught:
            load_sweep(path)
        assert expected in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"command": COMMAND[:4]}, "expected ${args}"),
            ({"command": [*COMMAND[:3], "${args}"]}, "no experiment"),
            ({"command": [*COMMAND, "${args_json}"]}, "${args_json} is not known here"),
            ({"command": [*COMMAND, "${args}"]}, "${args_no_hyphens} once"),
            ({"command": [*COMMAND, "other.yaml"]}, "small.yaml and other.yaml are two"),
            (
                {"program": "train.py"},
                "got train.py; a trial is this project's own: expected run.py",
            ),
            ({"method": "girds"}, "did you mean grid?"),
            ({"metrics": {}}, "did you mean `metric`?"),
            ({"early_terminate": {"type": "hyperband"}}, "needs min_iter"),
        ],
    )
    def test_of_the_file(self, small, change, expected):
        assert expected in problems(small, SEEDS, **change)

    def test_a_grid_has_ends(self, small):
        message = problems(small, {"optimizer.learning_rate": {"min": 0.1, "max": 0.5}})
        assert "set method: random" in message

    def test_random_search_has_none(self, small):
        message = problems(small, {"loss.dice": {"min": 0.1, "max": 0.5}}, method="random")
        assert "--count N" in message

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--jobs", "0"], "--jobs: 0: expected a whole number of at least 1"),
            (["--count", "many"], "--count: many"),
            (["--resume"], "--resume belongs to training and does not go with a sweep"),
            (["trainer.seed=1"], "trainer.seed is varied by the sweep"),
        ],
    )
    def test_of_the_command_line(self, small, capsys, words, expected):
        assert cli.main([str(small(SEEDS)), *words]) == 2
        assert expected in capsys.readouterr().err
        assert cli.main(["small.yaml", "--count", "2"]) == 2
        assert "--count belongs to a sweep" in capsys.readouterr().err


class TestAStrangersFile:
    """What a sweep file may not do: start anything else, read the environment, fill the memory."""

    @pytest.mark.parametrize(
        ("command", "named"),
        [
            (["bash", "-c", "touch evil"], "bash"),
            (["${env}", "bash", "-c", "touch evil", "${program}", "small.yaml", "${args}"], "bash"),
            (["${env}", "LD_PRELOAD=evil.so", *COMMAND[1:]], "LD_PRELOAD=evil.so"),
            (["${env}", "PYTHONSTARTUP=evil.py", *COMMAND[1:]], "PYTHONSTARTUP=evil.py"),
            (["${env}", "-S", "bash -c evil", *COMMAND[1:]], "bash -c evil"),
            (["${env}", "python", "-c", "evil", *COMMAND[2:]], "python"),
            (["${env}", "${interpreter}", "-c", "evil", *COMMAND[2:]], "-c"),
            (["${env}", "${interpreter}", "-m", "evil", *COMMAND[2:]], "-m"),
            (["${env}", "/usr/bin/python3", *COMMAND[2:]], "/usr/bin/python3"),
            ([sys.executable, *COMMAND[2:]], sys.executable),
            (["${env}", "${interpreter}", "evil.py", "small.yaml", "${args}"], "${program}"),
            (["${env}", "${interpreter}", "run.py", "small.yaml", "${args}"], "${program}"),
            (["${interpreter}", "${env}", *COMMAND[2:]], "${interpreter} ${env}"),
            (["${env}", *COMMAND[2:]], "${env} ${program}"),
            ([*COMMAND, "${program}"], "${program}"),
            ([*COMMAND, "--run-dir", "elsewhere"], "--run-dir"),
            ([*COMMAND, "--export"], "--export"),
            ([*COMMAND, "--run-dir=elsewhere"], "run-dir"),
            ([*COMMAND, "; touch evil"], "; touch evil"),
            ([*COMMAND, "loss.dice=1\n$ evil"], "does not print"),
            ([*COMMAND, "loss.dice=1\x1b[2J"], "does not print"),
            ([*COMMAND, "loss.dice=1\0"], "does not print"),
        ],
    )
    def test_it_starts_nothing_but_run_py(self, small, command, named):
        message = problems(small, SEEDS, command=command)
        assert named in message
        assert "traceback" not in message.lower()
        assert not Path("evil").exists()

    @pytest.mark.parametrize(
        "program",
        ["/tmp/run.py", "../run.py", "evil/run.py", "bash", "run.py -c evil", "~/run.py", ""],
    )
    def test_its_program_is_ours(self, small, program):
        Path("evil").mkdir()
        Path("evil/run.py").touch()
        assert "expected run.py" in problems(small, SEEDS, program=program)

    def test_our_program_by_its_whole_path(self, small):
        path = small(SEEDS, program=str(sweep_file.REPOSITORY / "run.py"))
        assert load_sweep(path).command({"trainer.seed": 0})[2] == "small.yaml"

    @pytest.mark.parametrize(
        "written",
        [
            "${envvar:WANDB_API_KEY}",
            "before-${envvar:WANDB_API_KEY}-after",
            "${env:WANDB_API_KEY}",
            "${oc.env:WANDB_API_KEY}",
            "${WANDB_API_KEY}",
            "$WANDB_API_KEY",
            "$(printenv WANDB_API_KEY)",
        ],
    )
    @pytest.mark.parametrize(
        "place",
        [
            lambda word: {"parameters": {"tracking.name": {"value": word}}},
            lambda word: {"parameters": {"tracking.tags": {"values": [["a"], ["b", word]]}}},
            lambda word: {"parameters": {"tracking": {"parameters": {"name": {"value": word}}}}},
            lambda word: {"parameters": {"optimizer.learning_rates": {"value": {word: 0.1}}}},
            lambda word: {"command": [*COMMAND, word]},
            lambda word: {"command": [*COMMAND, f"tracking.name={word}"]},
            lambda word: {"project": word},
            lambda word: {"metric": {"name": word}},
        ],
    )
    def test_nothing_is_filled_in_from_the_environment(self, small, monkeypatch, written, place):
        monkeypatch.setenv("WANDB_API_KEY", "a-secret")
        message = problems(small, **{"parameters": SEEDS, **place(written)})
        assert "WANDB_API_KEY" in message
        assert "a-secret" not in message

    def test_a_description_may_say_anything(self, small):
        text = "Costs $NOTHING;\ntwo lines."
        assert load_sweep(small(SEEDS, description=text)).config.description == text

    @pytest.mark.parametrize("value", ["a\nb", "\x1b[2J", "\0", ["a", "b\r"], {"k\n": 1}])
    def test_values_print(self, small, value):
        message = problems(small, {"tracking.tags": {"value": value}})
        assert "does not print" in message

    def test_words_of_the_user_print(self, small):
        with pytest.raises(UserError, match="does not print"):
            load_sweep(small(SEEDS), ["loss.dice=1\n"])

    @pytest.mark.parametrize("method", ["grid", "random", "bayes"])
    @pytest.mark.parametrize("q", [0, 0.0, -0.5])
    def test_a_step_of_nothing(self, small, method, q):
        spec = {"distribution": "q_uniform", "min": 0, "max": 1, "q": q}
        message = problems(small, {"loss.dice": spec}, method=method, run_cap=2)
        assert f"parameters.loss.dice: q: got {q}; expected a number above 0" in message

    @pytest.mark.parametrize(
        "spec",
        [
            {"min": 0, "max": 10**12},
            {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-12},
        ],
    )
    def test_a_parameter_with_too_many_values(self, small, spec):
        message = problems(small, {"loss.dice": spec})
        assert "up to 10,000" in message
        assert "method: random" in message

    def test_a_grid_with_too_many_trials(self, small):
        names = ("loss.dice", "loss.focal", "loss.iou", "trainer.seed")
        names += ("trainer.log_every", "trainer.save_every")
        many = {name: {"values": list(range(1, 101))} for name in names}
        message = problems(small, many)
        assert "the grid has 1,000,000,000,000 trials" in message
        assert "--count N" in message
        assert "trials" in problems(small, many, run_cap=10**9)
        made = load_sweep(small(many))
        assert len(grid(made, 3)) == 3
        assert in_grid(made, grid(made, 3)[2])
        assert not in_grid(made, {**grid(made, 3)[2], "trainer.seed": 101})
        assert len(grid(load_sweep(small(many, run_cap=7)))) == 7

    def test_a_large_grid_is_run_as_far_as_asked(self, small):
        many = {name: {"values": list(range(1, 1001))} for name in ("loss.dice", "trainer.seed")}
        assert run(small(many), count=1) == 0
        assert run(small(many), count=2) == 0
        assert [call["trial"] for call in calls()] == ["001", "002"]

    @pytest.mark.parametrize(
        "written",
        [
            "&a [*a]",
            "&a {values: *a}",
            "&a {parameters: {x: *a}}",
            "{values: &b [1, [2, *b]]}",
        ],
    )
    def test_an_alias_of_what_it_stands_in(self, small, written):
        path = small({"loss.dice": "SPEC"})
        path.write_text(path.read_text().replace("SPEC", written))
        with pytest.raises(UserError, match="contains itself"):
            run(path)

    def test_aliases_that_would_fill_the_memory(self, small):
        path = small({"loss.dice": {"values": ["SPEC"]}})
        text = path.read_text().replace("SPEC", "*a9")
        lines = ["  b0: {value: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}"]
        for k in range(9):
            lines.append(f"  b{k + 1}: {{value: &a{k + 1} [{', '.join([f'*a{k}'] * 10)}]}}")
        path.write_text(text.replace("parameters:", "\n".join(["parameters:", *lines])))
        with pytest.raises(UserError, match="values, aliases written out"):
            run(path)

    def test_aliases_for_what_they_are_meant(self, small):
        path = small({"trainer.seed": {"values": "SEEDS"}, "loss.dice": {"values": "SAME"}})
        text = path.read_text().replace("SEEDS", "&some [1, 2]").replace("SAME", "*some")
        path.write_text(text)
        assert len(grid(load_sweep(path))) == 4

    def test_nesting_without_end(self, small):
        path = small({"loss.dice": {"values": ["DEEP"]}})
        path.write_text(path.read_text().replace("DEEP", "[" * 5000 + "]" * 5000))
        with pytest.raises(UserError):
            run(path)


def test_the_ranking_is_over_seeds_and_videos_where_trials_kept_scores(small, tmp_path):
    settings = load_sweep(small({**SEEDS, "model.num_maskmem": {"values": [1, 7]}}))
    trials = []
    for num, seed in itertools.product((1, 7), (0, 1, 2)):
        folder = make_run(tmp_path / f"{num}_{seed}", [(0, 0.25), (10, num / 16 + seed / 64)])
        values = {"model.num_maskmem": num, "trainer.seed": seed}
        trial = Trial(folder.name, folder.name, values, folder, "finished", seed)
        trial.look("val/J_and_F")
        trials.append(trial)
    console = Console(file=io.StringIO(), width=200)
    sweep_file.show_results(settings, trials, tmp_path, console)
    text = console.file.getvalue()
    assert text.index("0.453 ± 0.039 (3 seeds x 6 videos)") < text.index("0.078 ± 0.039 (3 see")
    assert "-0.375 ± 0.000 (3 paired seeds x 6 videos)" in text
    assert "p, Holm of 1" in text
    for trial in trials:  # without scores by object, over seeds
        (trial.folder / "scores.csv").unlink()
    console = Console(file=io.StringIO(), width=200)
    sweep_file.show_results(settings, trials, tmp_path, console)
    assert "-0.375 ± 0.000 (3 paired seeds)" in console.file.getvalue()
    assert "Holm" not in console.file.getvalue()
