"""The command line as a user meets it: what it prints, writes, and answers to a mistake."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import (
    fails,
    write_experiment,
)
from test_results import make_run

from sam2train import cli, commands
from sam2train.commands import COMMANDS
from sam2train.errors import UserError


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_and_list_answer_at_once(option):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", option], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    # Without anything heavy it takes 0.1 s; the best of three forgives a busy machine.
    assert min(seconds) < 0.5
    expected = "--dry-run" if option == "--help" else r"coco_point_bbox\.yaml +Fine-tune"
    assert re.search(expected, done.stdout)


# -- which words go together --------------------------------------------------------------------

# What each command takes besides its own flag; "" is a FILE alone.
FIXED = {
    "training": {"--smoke", "--run-dir", "--resume"},
    "a sweep": {"--smoke", "--run-dir", "--count", "--jobs"},
    "--list": set(),
    "--settings": {"--write"},
    "--dry-run": {"--smoke"},
    "--check-data": {"--smoke", "--json"},
    "--probe": {"--smoke"},
    "--download": {"--smoke"},
    "--evaluate": {
        *("--smoke", "--split", "--no-base", "--run-dir"),
        *("--save-masks", "--save-masks-as"),
    },
    "--prompt-matrix": {"--smoke", "--split", "--no-base", "--run-dir"},
    "--predict": {"--smoke", "--run-dir", "--prompt", "--prompts", "--weights"},
    "--export": {"--smoke", "--half", "--push"},
    "--runs": set(),
    "--compare": set(),
    "--collect": set(),
}
FIXED = {command: options | {"--traceback"} for command, options in FIXED.items()}
OPERANDS = {
    "--save-masks-as": ["sav"],
    "--run-dir": ["place"],
    "--resume": ["place"],
    "--count": ["2"],
    "--jobs": ["2"],
    "--evaluate": ["base"],
    "--prompt-matrix": ["base"],
    "--split": ["test"],
    "--save-masks": ["masks"],
    "--predict": ["film.mp4"],
    "--prompt": ["1: box 1 2 3 4"],
    "--prompts": ["prompts.json"],
    "--weights": ["base"],
    "--export": ["a.pt", "b.pt"],
    "--push": ["me/mine"],
    "--settings": ["trainer"],
    "--runs": ["runs"],
    "--compare": ["a", "b"],
    "--collect": ["runs/sweep"],
}
WITHOUT_FILE = {"--list", "--settings", "--runs", "--compare", "--collect"}
FLAGS = sorted(set().union(*FIXED.values()))


def words_of(command: str, *options: str) -> list[str]:
    """How a command with some options is typed; the files are in the current folder."""
    file = [] if command in WITHOUT_FILE else ["sweep.yaml" if command == "a sweep" else "e.yaml"]
    flags = [flag for flag in (command, *options) if flag.startswith("--")]
    return file + [word for flag in flags for word in (flag, *OPERANDS.get(flag, []))]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text("dataset: {data_path: x}\n")
    (tmp_path / "sweep.yaml").write_text("method: grid\nparameters: {}\n")


def test_the_commands_have_these_options_and_no_others():
    found = {command.title(): set(command.options()) - {command.flag} for command in COMMANDS}
    assert found == FIXED


def test_an_option_of_several_commands_is_read_the_same_way():
    read: dict[str, dict] = {}
    for command in COMMANDS:
        for flag, how in command.options().items():
            how = {name: value for name, value in how.items() if name != "help"}
            assert read.setdefault(flag, how) == how


@pytest.mark.parametrize("command", FIXED)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_pair_of_a_command_and_an_option(files, command, flag):
    words = words_of(command, flag)
    for order in (words, words[::-1] if not OPERANDS.keys() & set(words) else words):
        if flag in FIXED[command]:
            assert cli.parse(order).title() == command
            continue
        with pytest.raises(UserError, match=f"^{flag} belongs to ") as raised:
            cli.parse(order)
        owners = [owner for owner, options in FIXED.items() if flag in options]
        assert all(owner in str(raised.value) for owner in (*owners, command))


@pytest.mark.parametrize("first", [name for name in FIXED if name.startswith("--")])
@pytest.mark.parametrize("second", [name for name in FIXED if name.startswith("--")])
def test_every_pair_of_commands(files, first, second):
    words = [*words_of(first), *words_of(second)[second not in WITHOUT_FILE :]]
    if first == second:
        assert cli.parse(words).title() == first
    else:
        with pytest.raises(UserError, match="are 2 commands") as raised:
            cli.parse(words)
        assert first in str(raised.value)
        assert second in str(raised.value)


@pytest.mark.parametrize("command", [name for name in FIXED if name not in WITHOUT_FILE])
def test_a_file_of_the_other_kind_or_none(files, command):
    if command.startswith("--"):
        words = ["sweep.yaml" if word == "e.yaml" else word for word in words_of(command)]
        with pytest.raises(UserError, match=f"{command} does not go with a sweep"):
            cli.parse(words)
    with pytest.raises(UserError, match=r"experiments/coco_point_bbox\.yaml"):
        cli.parse(words_of(command)[1:])


@pytest.mark.parametrize("command", sorted(WITHOUT_FILE))
@pytest.mark.parametrize("extra", ["e.yaml", "trainer.seed=1", "--trainer.seed=1"])
def test_commands_without_a_file_take_neither_it_nor_settings(files, command, extra):
    with pytest.raises(UserError, match=f"{extra} does not go with {command}; expected "):
        cli.parse([extra, *words_of(command)])


def test_values_arrive_typed(files):
    words = ["e.yaml", "--evaluate", "base", "--split=test", "--save-masks", "m", "trainer.seed=1"]
    assert cli.parse(words) == commands.Evaluate(
        path=Path("e.yaml"),
        words=("trainer.seed=1",),
        checkpoint="base",
        split="test",
        save_masks=Path("m"),
    )
    words = ["sweep.yaml", "--count", "3", "--run-dir", "x"]
    assert cli.parse(words) == commands.RunSweep(
        path=Path("sweep.yaml"), count=3, jobs=1, run_dir=Path("x")
    )
    assert cli.parse(["--runs"]) == commands.Runs(folder=Path("runs"))
    assert cli.parse(["--collect"]) == commands.Collect(folder=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cli.parse(["--list"]).flag = "x"


@pytest.mark.parametrize(
    ("words", "resume", "settings"),
    [
        (["--resume"], True, ()),
        (["--resume", "runs/a"], Path("runs/a"), ()),
        (["--resume=runs/a"], Path("runs/a"), ()),
        (["--resume", "trainer.seed=1"], True, ("trainer.seed=1",)),
        (["--resume", "--trainer.seed=1"], True, ("--trainer.seed=1",)),
        (["--resume", "x=['a', 'b']", "--smoke"], True, ("x=['a', 'b']",)),
    ],
)
def test_what_follows_resume(files, words, resume, settings):
    for order in (["e.yaml", *words], [*words, "e.yaml"]):
        command = cli.parse(order)
        assert (command.resume, command.words) == (resume, settings)


def test_a_folder_with_an_equals_sign_is_a_folder(files, tmp_path):
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "a=b.yaml").write_text("dataset: {data_path: x}\n")
    assert cli.parse(["e.yaml", "--resume", "lr=1"]).resume == Path("lr=1")
    assert cli.parse(["lr=1/a=b.yaml", "trainer.seed=1"]).path == Path("lr=1/a=b.yaml")


@pytest.mark.parametrize(
    "word",
    [
        "--trainer.seed=1",
        "trainer.seed=-1",
        "tracking.name=--evaluate",
        "--tracking.name=--dry-run",
        "--dataset.prompt_types=['point', 'bbox']",
        "--evaluation={'max_videos': 1}",
        "--loss={'dice': 1}",
    ],
)
def test_settings_that_look_like_options(files, word):
    for order in (["e.yaml", word], [word, "e.yaml"], ["--dry-run", word, "e.yaml"]):
        assert cli.parse(order).words == (word,)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--dryrun", "--dry-run"),
        ("--dry_run", "--dry-run"),
        ("--run_dir=x", "--run-dir"),
        ("--evalute=best.pt", "--evaluate"),
        ("--evalute", "--evaluate"),
        ("--Smoke", "--smoke"),
        ("--trainer.seed", "--trainer.seed=VALUE"),
        ("--predict-nothing", "--help"),
        ("-x", "--help"),
    ],
)
def test_an_unknown_option_names_the_near_one(files, word, hint):
    for words in (["e.yaml", word], [word], ["--runs", word]):
        with pytest.raises(UserError, match=f"unknown option {word.split('=')[0]}; .*{hint}"):
            cli.parse(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--evaluate"], "--evaluate: expected one argument"),
        (["--export", "a.pt"], "--export: expected 2 arguments"),
        (["--compare"], "--compare: expected at least one argument"),
        (["--evaluate", "base", "--split", "dev"], "--split: .*'dev'.*'val', 'test'"),
        (["--smoke=yes"], "--smoke: .*'yes'"),
        (["--run-dir"], "--run-dir: expected one argument"),
        (["--count", "0"], "--count: 0: expected a whole number of at least 1"),
        (["--count", "1.5"], "--count: 1.5: expected"),
        (["--jobs", "two"], "--jobs: two: expected"),
        (["--jobs=-1"], "--jobs: -1: expected"),
    ],
)
def test_operands_that_are_missing_or_wrong(files, words, expected):
    with pytest.raises(UserError, match=expected):
        cli.parse(["e.yaml", *words])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.title())
def test_each_command_has_its_own_help(command, capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert command.group in overview
    assert all(flag in overview for flag in command.options())
    if command.flag:
        for words in ([command.flag, "--help"], ["-h", f"{command.flag}=x"]):
            assert cli.main(words) == 0
            own = capsys.readouterr().out
            assert own.startswith("usage: python run.py ")
            named = {word for word in FLAGS if re.search(rf" {word}(?![-\w])", own)}
            assert named == FIXED[command.flag]
    assert max(map(len, overview.splitlines())) <= 100


def test_a_new_command_is_one_class_and_one_entry(files, monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shout(commands.FileCommand):
        """Print the settings in capital letters."""

        group, flag = "Look first", "--shout"
        times: int = commands.option(
            "--times", "how often", 1, type=commands.at_least_one, metavar="N"
        )

        def run(self) -> int:
            print(*[word.upper() for word in self.words] * self.times)
            return 0

    monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, Shout))
    assert cli.main(["e.yaml", "--shout", "a.b=c", "--times", "2"]) == 0
    assert capsys.readouterr().out == "A.B=C A.B=C\n"
    assert "--times belongs to --shout" in fails(capsys, "e.yaml", "--dry-run", "--times", "2")
    assert "does not go with a sweep" in fails(capsys, "sweep.yaml", "--shout")
    assert "--dry-run and --shout" in fails(capsys, "e.yaml", "--shout", "--dry-run")
    assert cli.main(["--shout", "--help"]) == 0
    assert "--times N" in capsys.readouterr().out


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "not"])
@pytest.mark.parametrize("words", [["--help"], ["--list"], [], ["--runs", "runs"]])
def test_output_that_nobody_reads_ends_quietly(words, buffering, tmp_path):
    """`python run.py --list | head -1`: the pipe is closed before all is written."""
    make_run(tmp_path / "runs" / "small" / "one")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", *words],
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **buffering},
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_another_pipe_that_breaks_is_an_error(tmp_path):
    code = (
        "import sys; from sam2train import cli, commands\n"
        "def run(command): raise BrokenPipeError('of a worker')\n"
        "commands.ListExperiments.run = run\n"
        "sys.exit(cli.main(['--list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "of a worker" in done.stderr


@pytest.mark.parametrize("command", ["--list", "--runs", "--compare"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_a_line_and_the_shells_code(files, monkeypatch, capsys, command, number):
    def asked_to_stop(self):
        os.kill(os.getpid(), number)
        time.sleep(30)

    before = signal.getsignal(number)
    for one in COMMANDS:
        monkeypatch.setattr(one, "run", asked_to_stop)
    assert cli.main([command, *["run"] * (command == "--compare")]) == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}\n"
    assert signal.getsignal(number) is before


def test_ctrl_c_is_a_word_and_code_130(files, monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.ListExperiments, "run", interrupted)
    assert cli.main(["--list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- what the commands do -----------------------------------------------------------------------


class TestMistakes:
    def test_runs_and_compare(self, capsys, experiment, tmp_path):
        assert "nowhere" in fails(capsys, "--runs", tmp_path / "nowhere")
        assert "no run in it" in fails(capsys, "--runs", tmp_path / "data")
        assert "is no run" in fails(capsys, "--compare", tmp_path, tmp_path / "data")
        assert "key=value" in fails(capsys, "--runs", tmp_path, "--key=value")
        assert "small.yaml" in fails(capsys, experiment, "--runs")

    def test_no_file(self, capsys):
        assert "experiments/coco_point_bbox.yaml" in fails(capsys)

    def test_a_file_that_is_not_there(self, capsys, experiment):
        assert "small.yaml" in fails(capsys, experiment.with_name("smal.yaml"))

    def test_an_unknown_key_names_the_near_one(self, capsys, experiment):
        message = fails(capsys, experiment, "trainer.num_step=3")
        assert "trainer.num_step" in message
        assert "trainer.num_steps" in message

    def test_a_word_that_is_no_override(self, capsys, experiment):
        assert "epochs" in fails(capsys, experiment, "epochs")

    def test_data_that_is_not_there(self, capsys, experiment):
        assert "nowhere.json" in fails(capsys, experiment, "dataset.data_path=nowhere.json")

    def test_a_checkpoint_that_is_not_there_names_the_address(self, capsys, experiment):
        path = "checkpoints/sam2.1_hiera_tiny.pt"
        message = fails(capsys, experiment, f"model.checkpoint_path={path}")
        assert (
            "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_tiny.pt"
            in message
        )
        assert "--download" in message

    def test_nothing_to_resume(self, capsys, experiment, tmp_path):
        assert "runs/small" in fails(capsys, experiment, "--resume")
        assert f"no checkpoint {tmp_path}" in fails(capsys, experiment, "--resume", tmp_path)

    def test_two_runs_to_resume(self, capsys, experiment, tmp_path):
        last = tmp_path / "one" / "checkpoints" / "last.pt"
        last.parent.mkdir(parents=True)
        last.touch()
        words = ("--resume", last.parent.parent, "--run-dir")
        assert "give one of them" in fails(capsys, experiment, *words, tmp_path / "two")
        assert "config.yaml" in fails(capsys, experiment, *words, tmp_path / "one")  # no real run

    def test_a_gpu_that_is_not_there(self, capsys, experiment):

        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert "cuda" in fails(capsys, experiment, "trainer.device=cuda")

    def test_nothing_to_train(self, capsys, experiment):
        assert "trainable_modules" in fails(capsys, experiment, "model.trainable_modules=[]")

    def test_a_module_that_does_not_exist(self, capsys, experiment):
        message = fails(capsys, experiment, "model.trainable_modules=[memory_atention]")
        assert "memory_attention" in message
