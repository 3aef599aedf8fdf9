"""The command line as a user meets it: what it prints, writes, and answers to a mistake."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import edit, make_coco
from test_results import make_run

from sam2train import checkpoint, cli, commands
from sam2train.commands import COMMANDS
from sam2train.errors import MachineFault, UserError
from sam2train.pretrained import build_sam2, resolve_config

ROOT = Path(__file__).parents[1]

EXPERIMENT = """\
# A small experiment of the tests.
dataset: {{data_path: "{data}", val_path: "{data}", image_size: [64, 64], video_clip_length: 3}}
model:
  config_path: sam2train/configs/sam2.1_hiera_demo.yaml
  image_size: 64
trainer: {{num_steps: 2, val_every: 2, save_every: 2, device: cpu}}
tracking: {{mode: disabled}}
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    data = make_coco(tmp_path / "data", num_frames=5, size=(64, 64))
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT.format(data=data))
    return path


def fails(capsys, *words) -> str:
    """The message of a command that must fail as a user's mistake."""
    assert cli.main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.startswith("error: ")
    return printed


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


def test_train_then_resume_then_the_same_folder_again(experiment, tmp_path, capsys):
    run_dir = tmp_path / "my run"
    assert cli.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"{run_dir}/" in printed
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "environment.json"):
        assert (run_dir / name).is_file()

    message = fails(capsys, experiment, "--run-dir", run_dir)
    assert "--resume" in message

    more = ["--run-dir", str(run_dir), "--resume", "trainer.num_steps=3"]
    assert cli.main([str(experiment), *more]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["status"]) == (3, "finished")

    message = fails(capsys, experiment, *more, "model.num_maskmem=3", "optimizer.learning_rate=1")
    assert "model.num_maskmem: 7 in the run, 3 now" in message
    assert "optimizer.learning_rate" in message


def test_runs_go_to_a_folder_of_their_own(experiment, tmp_path):
    assert cli.main([str(experiment), "--trainer.num_steps=0"]) == 0
    (first,) = (tmp_path / "runs" / "small").iterdir()
    assert cli.main([str(experiment), "--resume", "trainer.num_steps=1"]) == 0
    assert json.loads((first / "summary.json").read_text())["steps"] == 1
    assert [first] == list((tmp_path / "runs" / "small").iterdir())


def test_smoke_is_two_steps_of_anything(experiment, tmp_path):
    assert cli.main([str(experiment), "--smoke", "trainer.num_steps=2"]) == 0
    (run_dir,) = (tmp_path / "runs" / "smoke").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2


def test_dry_run_shows_and_writes_nothing(experiment, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([str(experiment), "--dry-run", "model.num_maskmem=4"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "num_maskmem: 4",
        "memory_attention",
        "(3, 1, 3, 64, 64)",
        "object 1:",
        "training",
    ):
        assert part in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_export_gives_weights_that_sam2_loads(experiment, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "out" / "sam2.pt"
    assert cli.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert cli.main([str(experiment), "--export", source, str(out)]) == 0
    again = [str(experiment), "--dry-run", f"model.checkpoint_path={out}"]
    assert cli.main(again) == 0
    capsys.readouterr()
    half = out.with_name("half.pt")
    assert cli.main([str(experiment), "--half", "--export", source, str(half)]) == 0
    assert half.stat().st_size < 6e6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_first(experiment, tmp_path, number):
    """What `timeout` and some job schedulers send; processes that load data get it, too."""
    run_dir = tmp_path / "run"
    words = ["trainer.num_steps=5000", "trainer.log_every=1", "dataset.num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", experiment, *words, "--run-dir", run_dir],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and '"step": 3' in metrics.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert (run_dir / "checkpoints" / "last.pt").is_file()


def test_a_run_that_fails_ends(experiment, tmp_path):
    """Processes that load data are ended with it, whatever they do about signals."""
    words = ["dataset.val_path=null", "dataset.num_workers=1", "optimizer.learning_rate=1e30"]
    words += ["trainer.num_steps=50", f"--run-dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", experiment, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "is not finite" in done.stderr


def test_export_replaces_nothing(experiment, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    source = run_dir / "checkpoints" / "last.pt"
    before = source.read_bytes()
    for target in (source, tmp_path):
        assert cli.main([str(experiment), "--export", str(source), str(target)]) == 2
        assert f"--export {target}: there is something already" in capsys.readouterr().err
    assert source.read_bytes() == before
    target = experiment / "x" / "out.pt"  # below a file
    assert cli.main([str(experiment), "--export", str(source), str(target)]) == 2
    assert "name another place" in capsys.readouterr().err


def test_export_takes_the_model_as_the_run_had_it(experiment, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "sam2.pt"
    changed = ("model.num_maskmem=3", "model.max_obj_ptrs_in_encoder=0")
    assert cli.main([str(experiment), *changed, "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert cli.main([str(experiment), "--export", source, str(out)]) == 0
    printed = capsys.readouterr().out
    assert "++model.num_maskmem=3" in printed
    assert "++model.use_obj_ptrs_in_encoder=false" in printed


# -- which words go together --------------------------------------------------------------------

# What each command takes besides its own flag; "" is a FILE alone.
FIXED = {
    "training": {"--smoke", "--run-dir", "--resume"},
    "a sweep": {"--smoke", "--run-dir", "--count", "--jobs"},
    "--list": set(),
    "--dry-run": {"--smoke"},
    "--check-data": {"--smoke", "--json"},
    "--download": {"--smoke"},
    "--evaluate": {"--smoke", "--split", "--no-base", "--run-dir", "--save-masks"},
    "--prompt-matrix": {"--smoke", "--split", "--no-base", "--run-dir"},
    "--export": {"--smoke", "--half"},
    "--runs": set(),
    "--compare": set(),
    "--collect": set(),
}
FIXED = {command: options | {"--traceback"} for command, options in FIXED.items()}
OPERANDS = {
    "--run-dir": ["place"],
    "--resume": ["place"],
    "--count": ["2"],
    "--jobs": ["2"],
    "--evaluate": ["base"],
    "--prompt-matrix": ["base"],
    "--split": ["test"],
    "--save-masks": ["masks"],
    "--export": ["a.pt", "b.pt"],
    "--runs": ["runs"],
    "--compare": ["a", "b"],
    "--collect": ["runs/sweep"],
}
WITHOUT_FILE = {"--list", "--runs", "--compare", "--collect"}
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
            assert {word for word in FLAGS if f" {word}" in own} == FIXED[command.flag]
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


def no_space():
    problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    problem.filename = "/nowhere/run/last.pt"
    return problem


FAULTS = {
    "disk full": (no_space(), r"/nowhere/run/last\.pt: No space left on device; the disk is full"),
    "read-only": (OSError(errno.EROFS, "Read-only", "a/b"), r"a/b: Read-only; .*--run-dir"),
    "removed": (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: .*removed"),
    "host": (MemoryError("Unable to allocate 9 GiB"), r"this machine.*batch_size=1.*num_workers=0"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "on this machine"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), r"GPU.*image_size="),
    "worker": (MachineFault("a process that loads data ended"), "a process that loads data ended"),
    "not finite": (FloatingPointError("step 3: loss nan"), "step 3: loss nan"),
    # As torch raises it, in the middle of an evaluation.
    "worker in between": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        r"a process that loads data ended \(DataLoader worker .*Killed\).*num_workers=0.*--resume",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_is_a_message(experiment, monkeypatch, capsys, fault):
    error, expected = FAULTS[fault]

    def fails_so(self):
        raise error

    monkeypatch.setattr(commands.DryRun, "run", fails_so)
    assert cli.main([str(experiment), "--dry-run"]) == 1
    printed = capsys.readouterr().err
    assert re.match(f"error: .*{expected}", printed, re.DOTALL)
    assert "Traceback" not in printed
    assert cli.main([str(experiment), "--dry-run", "--traceback"]) == 1
    printed = capsys.readouterr().err
    assert "fails_so" in printed
    assert re.search(f"error: .*{expected}", printed, re.DOTALL)


def test_a_machine_without_memory_is_a_message_with_what_lowers_it(experiment, tmp_path):
    """A real one: the process may take 400 MB more than its libraries do."""
    code = (
        "import resource, sys, sam2train.trainer\n"
        "from sam2train import cli\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (400 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["dataset.batch_size=64", "dataset.num_workers=0", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, str(experiment), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert said[0].startswith("error: out of memory on this machine: ")
    assert said[1].startswith("these settings lower it, the first ones most; now they are: ")
    for setting in ("dataset.batch_size=64", "dataset.num_workers=0", "dataset.mask_cache_mb="):
        assert setting in said[1]
    assert said[2] == "What a run has saved stays; --resume goes on with it"


def test_a_bug_is_no_fault_of_the_machine(experiment, monkeypatch):
    def fails_so(self):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(commands.DryRun, "run", fails_so)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main([str(experiment), "--dry-run"])


def test_resume_auto_starts_and_then_goes_on(experiment, tmp_path, capsys):
    """The same command each time, as a job scheduler that starts a job again gives it."""
    run_dir = tmp_path / "one"
    command = [str(experiment), "--run-dir", str(run_dir), "--resume", "auto"]
    for steps in (1, 2):
        assert cli.main([*command, f"trainer.num_steps={steps}"]) == 0
        assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps
    # Killed while it renamed the two.
    (run_dir / "checkpoints" / "last.pt").unlink()
    assert cli.main([*command, "trainer.num_steps=2"]) == 0
    assert "going on from the one before" in capsys.readouterr().out
    # Without a folder: the newest run, unless it is finished.
    command = [str(experiment), "trainer.num_steps=0", "--resume", "auto"]
    assert cli.main(command) == 0
    (first,) = (tmp_path / "runs" / "small").iterdir()
    summary = json.loads((first / "summary.json").read_text())
    (first / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert cli.main(command) == 0
    assert [first] == list((tmp_path / "runs" / "small").iterdir())
    assert cli.main(command) == 0
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 2


def test_ctrl_c_is_a_word_and_code_130(files, monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.ListExperiments, "run", interrupted)
    assert cli.main(["--list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- what the commands do -----------------------------------------------------------------------


def test_the_demo_reports_on_no_data_of_ones_own(experiment, tmp_path, capsys):
    """Its test videos are left out where the training or validation data are the user's."""
    main = str(ROOT / "experiments" / "coco_point_bbox.yaml")
    own = str(tmp_path / "data" / "annotations.json")
    words = [main, "--dry-run", f"dataset.data_path={own}", f"dataset.val_path={own}"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "dataset.test_path is the demo's, beside data of your own: left out" in printed
    assert "test_path: null" in printed
    assert "dataset.val_path is the demo's" not in printed
    assert cli.main([*words, f"dataset.test_path={own}"]) == 0
    assert "the demo's" not in capsys.readouterr().out


def test_a_resumed_run_is_scored_as_before(experiment, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert cli.main([str(experiment), "--run-dir", run_dir]) == 0
    message = fails(capsys, experiment, "--resume", run_dir, "evaluation.max_frames=3")
    assert "evaluation.max_frames: None in the run, 3 now" in message
    words = ["trainer.num_steps=3", "evaluation.num_overlays=0"]
    assert cli.main([str(experiment), "--resume", run_dir, *words]) == 0


def test_a_run_folder_that_cannot_be(experiment, capsys):
    assert cli.main([str(experiment), "--run-dir", str(experiment)]) == 2
    assert "cannot be the folder of the run" in capsys.readouterr().err


def test_the_end_names_files_that_are_there(experiment, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main([str(experiment), "dataset.val_path=null", "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert str(run_dir / "checkpoints" / "last.pt") in printed
    for absent in ("best.pt", "scores.csv", "overlays"):
        assert str(run_dir / absent) not in printed
        assert f"/{absent}" not in printed


def test_a_sweep_agents_typed_values_win(experiment, tmp_path, monkeypatch, capsys):
    typed = tmp_path / "params.yaml"
    typed.write_text("model.num_maskmem: {value: 5}\nwandb_version: 1\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(typed))
    assert cli.main([str(experiment), "--dry-run", "--model.num_maskmem=4"]) == 0
    assert "num_maskmem: 5" in capsys.readouterr().out


def test_runs_and_compare_need_no_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = (make_run(tmp_path / "runs" / "small" / name) for name in ("one", "two"))
    assert cli.main(["--runs"]) == 0
    assert "finished" in capsys.readouterr().out
    assert cli.main(["--compare", str(first), str(second)]) == 0
    assert "over videos" in capsys.readouterr().out
    assert cli.main(["--collect", "runs/small"]) == 0
    assert "small.csv: 2 runs" in capsys.readouterr().out


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
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert "cuda" in fails(capsys, experiment, "trainer.device=cuda")

    def test_nothing_to_train(self, capsys, experiment):
        assert "trainable_modules" in fails(capsys, experiment, "model.trainable_modules=[]")

    def test_a_module_that_does_not_exist(self, capsys, experiment):
        message = fails(capsys, experiment, "model.trainable_modules=[memory_atention]")
        assert "memory_attention" in message


def forget_the_seed_of_prompts(run_dir):
    """Make a run folder one of a version that drew evaluation prompts from trainer.seed."""
    last = run_dir / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    config = yaml.safe_load(content["config"])
    assert config["evaluation"].pop("seed") == config["trainer"]["seed"]
    for section in ("dataset", "model"):
        del config[section]["seed"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint.save(last, content | {"config": yaml.safe_dump(config)})


def test_a_run_from_before_the_seed_of_prompts_is_scored_as_before(experiment, tmp_path, capsys):
    words = [str(experiment), "trainer.seed=5", "trainer.val_every=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = ["evaluation.seed=5"]  # what such a version did
    assert cli.main([*words, *own, "trainer.num_steps=3", "--run-dir", str(whole)]) == 0
    assert cli.main([*words, *own, "trainer.num_steps=2", "--run-dir", str(parts)]) == 0
    forget_the_seed_of_prompts(parts)

    more = [*words, "--resume", str(parts), "trainer.num_steps=3"]
    message = fails(capsys, *more, "evaluation.seed=0")
    assert "evaluation.seed: None in the run, 0 now" in message
    assert cli.main(more) == 0
    assert (parts / "scores.csv").read_text() == (whole / "scores.csv").read_text()
    assert yaml.safe_load((parts / "config.yaml").read_text())["evaluation"]["seed"] is None
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["evaluation_seed"] == 5
    assert cli.main([*words, "--resume", str(parts), "trainer.num_steps=4"]) == 0


def test_a_run_killed_at_once_writes_the_same_rows(experiment, tmp_path):
    words = ["trainer.num_steps=9", "trainer.log_every=5", "trainer.save_every=3"]
    words += ["evaluation.max_frames=2", "evaluation.num_overlays=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", experiment, *words, "--run-dir", parts],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (parts / "checkpoints" / "last.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert cli.main([str(experiment), *words, "--run-dir", str(parts), "--resume"]) == 0
    assert cli.main([str(experiment), *words, "--run-dir", str(whole)]) == 0

    timed = ("seconds", "clips_per_second", "memory_gb", "features/hit_rate")
    found = []
    for run_dir in (whole, parts):
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        found.append([{k: v for k, v in row.items() if k not in timed} for row in lines])
    assert found[0] == found[1]
    assert [row["step"] for row in found[0] if "loss" in row] == [5, 9]
    for name in ("scores.csv", "horizon.csv"):
        assert (parts / name).read_text() == (whole / name).read_text()


def test_download_checks_the_file_that_is_there(experiment, capsys, tmp_path):
    config = "sam2train/configs/sam2.1_hiera_demo.yaml"
    sam2 = build_sam2(resolve_config(config), image_size=64, num_maskmem=7)
    torch.save({"model": sam2.state_dict()}, tmp_path / "mine.pt")
    assert cli.main([str(experiment), "--download", "model.checkpoint_path=mine.pt"]) == 0
    assert "mine.pt is there, and loads" in " ".join(capsys.readouterr().out.split())
    message = fails(capsys, experiment, "--download")
    assert "model.checkpoint_path is null" in message
    message = fails(capsys, experiment, "--download", "model.checkpoint_path=other.pt")
    assert "Meta publishes no other.pt" in message


def test_ctrl_c_while_libraries_tidy_up_prints_no_traceback(tmp_path):
    """Python handles it to its very end, and what is called there prints it."""
    late = "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    (tmp_path / "sitecustomize.py").write_text(late)
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", "--list"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
    assert "coco_point_bbox" in done.stdout


NASTY = "[/red]\x1b]0;title\x07\x1b[2J\u202e../a"


@pytest.fixture
def nasty_experiment(tmp_path, experiment):
    """Names from data with what a terminal would act on: of videos, objects, files, experiments."""

    def rename(content):
        for image in content["images"]:
            image["video_id"] = f"{NASTY}{image['video_id']}"
            place = tmp_path / "nasty" / image["path"]
            odd = place.with_name(f"[red]\x1b[2J\u202e{place.name}")
            place.rename(odd)
            image["path"] = str(odd.relative_to(tmp_path / "nasty"))
        for annotation in content["annotations"]:
            annotation["track_id"] = f"{NASTY}{annotation['track_id']}"

    data = edit(make_coco(tmp_path / "nasty", num_videos=2, num_frames=3, size=(64, 64)), rename)
    content = yaml.safe_load(Path(experiment).read_text())
    content["dataset"] |= {"data_path": str(data), "val_path": str(data), "test_path": str(data)}
    content["trainer"] |= {"num_steps": 1}
    path = tmp_path / "[red]\x1b[2J.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_names_from_data_reach_no_terminal_and_no_file_name_as_they_are(
    nasty_experiment, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_dir, file = tmp_path / "out" / "run", str(nasty_experiment)
    last = str(run_dir / "checkpoints" / "last.pt")
    for words in (
        ["--check-data"],
        ["--check-data", "--json"],
        ["--dry-run"],
        ["--run-dir", str(run_dir)],
        ["--evaluate", last, "--save-masks", str(tmp_path / "out" / "masks")],
        ["--run-dir", str(run_dir), "--resume"],
    ):
        code = cli.main([file, *words])  # the splits are the same pictures, which is an error
        assert code in ((1, 2) if "--check-data" in words else (0,)), words
        printed = "".join(capfd.readouterr()).replace("\n", "")
        assert printed
        assert printed.isprintable(), words
    assert cli.main(["--runs", str(tmp_path / "out")]) == 0
    broken = next((tmp_path / "nasty").rglob("*.png"))
    broken.write_bytes(b"x")
    assert cli.main([file, "--check-data"]) == 2
    printed = "".join(capfd.readouterr()).replace("\n", "")
    assert "is damaged" in printed or "is not a picture" in printed
    assert printed.isprintable()
    for path in (tmp_path / "out").rglob("*"):
        assert path.name.isprintable()
        assert not set(path.name) & set('<>:"|?*')
        assert path.resolve().is_relative_to(tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_of_which_a_library_makes_another_error_is_no_bug(monkeypatch, capsys, number):
    """As imports do, in the middle of which it is raised."""

    def sent(self):
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except BaseException:
            raise AttributeError("'NoneType' object has no attribute 'x'") from None

    monkeypatch.setattr(commands.ListExperiments, "run", sent)
    assert cli.main(["--list"]) == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}\n"
