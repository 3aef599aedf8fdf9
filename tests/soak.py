"""Kills, faults and mutated inputs, for as long as they are given: `python tests/soak.py`.

No part of the test suite. Parts: `kills` stops small trainings in every way and compares what the
resumed ones wrote with runs that were never stopped; `faults` takes away the disk, memory, folders
and processes; the others, see `soak_fuzz.KINDS`, give mutated inputs to what reads them. Anything
but success or a message is a finding: what made it is kept below --keep, and the exit code is 1.
Everything that is drawn depends on --seed and a number, so `--seed S --first N coco` repeats it.
Linux only; a full disk needs root, for a small tmpfs.
"""

from __future__ import annotations

import argparse
import atexit
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# One thread: what is computed is then the same, bit for bit, in every run.
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import torch  # noqa: E402
import yaml  # noqa: E402
from conftest import make_coco  # noqa: E402
from soak_fuzz import KINDS, Kind  # noqa: E402

from sam2train import checkpoint, cli, trainer  # noqa: E402, F401
from sam2train.errors import UserError  # noqa: E402
from sam2train.run_folder import RunFolder  # noqa: E402

ONE_INPUT = 60  # seconds that reading one input may take
ONE_RUN = 300  # seconds that a training here may take; it takes some 5
MEMORY = 6 << 30  # bytes of address space for reading mutated inputs, of which torch takes half
TIMED = {"seconds", "clips_per_second", "memory_gb", "_runtime", "_timestamp", "_step", "_wandb"}
SETTINGS = {
    "dataset": {"image_size": [64, 64], "video_clip_length": 3, "num_workers": 1},
    "model": {
        "config_path": "sam2train/configs/sam2.1_hiera_demo.yaml",
        "image_size": 64,
        "num_maskmem": 2,
    },
    "optimizer": {"learning_rate": 1e-3},
    "trainer": {"num_steps": 6, "val_every": 3, "save_every": 2, "log_every": 2, "device": "cpu"},
    "evaluation": {"num_overlays": 1},
    "tracking": {"mode": "offline"},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulated": {"trainer": {"grad_accumulation": 2}, "dataset": {"num_workers": 0}},
    "clicks": {"interaction": {"num_correction_pt_per_frame": 2, "num_frames_to_correct": 2}},
}
STOPS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class Table:
    """Inputs, how they ended, and how long they took, by part."""

    def __init__(self, keep: Path):
        self.keep = keep
        self.rows: dict[str, Counter] = {}
        self.known: set[tuple] = set()

    def count(self, part: str, how: str, seconds: float = 0.0) -> None:
        row = self.rows.setdefault(part, Counter())
        row[how] += 1
        row["seconds"] += seconds

    def finding(self, part: str, name: str, text: str, files: Sequence[Path] = ()) -> None:
        """Keep what made a finding, once for each place in the code."""
        self.count(part, "findings")
        lines = [line for line in text.splitlines() if line.startswith(("  File", "E"))]
        key = (part, *lines[-1:], text.splitlines()[-1][:60] if not lines else "")
        if key in self.known:
            return
        self.known.add(key)
        folder = self.keep / f"{part}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "finding.txt").write_text(text, errors="backslashreplace")
        for path in files:
            with suppress(OSError, shutil.Error):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, folder / path.name, **({"symlinks": True} if path.is_dir() else {}))
        print(f"FINDING in {part}, kept in {folder}\n{text[-1500:]}", flush=True)

    @property
    def num_findings(self) -> int:
        return sum(row["findings"] for row in self.rows.values())

    def show(self) -> None:
        columns = ("accepted", "refused", "findings")
        print(f"{'part':22}{'inputs':>10}" + "".join(f"{c:>10}" for c in columns) + "   seconds")
        for part, row in sorted(self.rows.items()):
            num = sum(row[c] for c in columns)
            cells = "".join(f"{row[c]:10,}" for c in columns)
            print(f"{part:22}{num:10,}{cells}{row['seconds']:10,.0f}", flush=True)


# -- mutated inputs -------------------------------------------------------------------------------


class Fuzz:
    """One kind of inputs, read in a process of its own: a crash or a hang is a finding too."""

    def __init__(self, name: str, folder: Path, seed: int, first: int, table: Table):
        self.name, self.seed, self.next, self.table = name, seed, first, table
        self.kind: Kind = KINDS[name](folder)
        self.shared = mmap.mmap(-1, 4096)  # the number of the input that is read now

    def turn(self) -> None:
        """Read the next inputs."""
        began, last = time.monotonic(), self.next + self.kind.num
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w") as report:
                self._read_all(range(self.next, last), report)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as report:
            lines = [json.loads(line) for line in report]
        # Once it has ended: both write to the same places.
        _, status = os.waitpid(child, 0)
        for how, number, text in lines:
            if how == "findings":
                self._write(number)
                self.table.finding(self.name, str(number), text, self.kind.written)
            else:
                self.table.count(self.name, how)
        self.next = last
        if status:
            at = int.from_bytes(self.shared[:8], "little")
            with suppress(Exception):
                self._write(at)
            text = f"input {at}: the process that read it ended with status {status}"
            self.table.finding(self.name, str(at), text, self.kind.written)
            self.next = at + 1
        self.table.rows.setdefault(self.name, Counter())["seconds"] += time.monotonic() - began

    def _write(self, number: int) -> None:
        self.kind.written = []
        self.kind.write(random.Random(f"{self.seed}/{self.name}/{number}"))
        if hasattr(self.kind, "save"):
            self.kind.save()

    def _read_all(self, numbers: Sequence[int], report: Any) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        os.dup2(devnull, 1)
        for number in numbers:
            self.shared[:8] = number.to_bytes(8, "little")
            rng = random.Random(f"{self.seed}/{self.name}/{number}")
            self.kind.written = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what makes the input
                self.kind.write(rng)
            signal.alarm(ONE_INPUT)
            how, text = "accepted", ""
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    warnings.simplefilter("ignore", DeprecationWarning)  # of other libraries
                    self.kind.read()
            except UserError:
                how = "refused"
            except BaseException:
                how, text = "findings", traceback.format_exc()
            signal.alarm(0)
            report.write(json.dumps([how, number, text]) + "\n")
            report.flush()


# -- small trainings ------------------------------------------------------------------------------


class Training:
    """`run.py` in a process of its own group, without the time that starting Python takes."""

    def __init__(
        self, words: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, prepare)

    def _run(self, words: Sequence[str], prepare: Callable[[], None]) -> None:
        code = 99
        try:
            os.setsid()
            number = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(number, 1)
            os.dup2(number, 2)
            for stop in STOPS[1:]:
                default = signal.default_int_handler if stop == "SIGINT" else signal.SIG_DFL
                signal.signal(getattr(signal, stop), default)
            os.chdir(ROOT)
            prepare()
            code = cli.main(list(words))
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as run.py does
            with suppress(Exception):
                atexit._run_exitfuncs()
                sys.stdout.flush()
            os._exit(code)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if not found:
            return None
        with suppress(ProcessLookupError, PermissionError):  # what it left behind
            os.killpg(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)

    def wait(self, limit: float = ONE_RUN) -> int | None:
        """The exit code; None where it did not end in time, and was killed."""
        while (code := self.poll()) is None:
            if self.seconds > limit:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            time.sleep(0.02)
        return code

    def workers(self) -> list[int]:
        """The processes that load data. W&B's own, without which it loses rows, and Python's
        tracker of shared memory are none of them."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        found = []
        for one in path.read_text().split():
            with suppress(OSError):
                words = Path(f"/proc/{one}/cmdline").read_bytes()
                if b"wandb" not in words and b"resource_tracker" not in words:
                    found.append(int(one))
        return found


class Trainings:
    """Runs that were never stopped, by variant, and what a run wrote without what clocks say."""

    def __init__(self, folder: Path, table: Table):
        self.folder, self.table = folder, table
        data = make_coco(folder / "data", num_videos=2, num_frames=4, size=(64, 64))
        self.files, self.whole, self.seconds = {}, {}, {}
        for name, changes in VARIANTS.items():
            settings = {section: dict(values) for section, values in SETTINGS.items()}
            for section, values in changes.items():
                settings[section] = {**settings.get(section, {}), **values}
            paths = dict.fromkeys(("data_path", "val_path", "test_path"), str(data))
            settings["dataset"] |= paths
            self.files[name] = folder / f"{name}.yaml"
            self.files[name].write_text(yaml.safe_dump(settings))

    def reference(self, variant: str) -> dict[str, Any]:
        """What the variant writes when nobody stops it."""
        if variant not in self.whole:
            run_dir = self.folder / "whole" / variant
            run = self.start(variant, run_dir)
            code = run.wait()
            assert code == 0, f"ended with {code}: {run.output.read_text()}"
            print(f"{variant}: a whole run takes {run.seconds:.1f} s", flush=True)
            self.seconds[variant] = run.seconds
            self.whole[variant] = written(run_dir)
            again = self.folder / "whole" / f"{variant} again"
            assert self.start(variant, again).wait() == 0
            assert not differences(self.whole[variant], written(again)), "two runs differ"
        return self.whole[variant]

    def start(self, variant: str, run_dir: Path, *words: str, **options: Any) -> Training:
        words = (str(self.files[variant]), "--run-dir", str(run_dir), *words)
        return Training(words, run_dir.parent / f"{run_dir.name}-output", **options)


def written(run_dir: Path) -> dict[str, Any]:
    """Everything a finished run wrote that depends on no clock."""
    folder = RunFolder(run_dir)
    found: dict[str, Any] = {}
    for name in ("last", "best"):
        content = checkpoint.load(getattr(folder, name))
        for key in ("model", "optimizer", "rng", "scores", "step", "best", "scored"):
            found[f"{name}.pt: {key}"] = content[key]
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in row.items() if k not in TIMED} for row in lines]
    for path in (folder.scores, folder.horizon):
        found[path.name] = path.read_text()
    summary = json.loads(folder.summary.read_text())
    found["summary.json"] = {k: v for k, v in summary.items() if k not in TIMED | {"data"}}
    found["overlays"] = sorted(path.name for path in folder.overlays.iterdir())
    found["partial files"] = sorted(path.name for path in run_dir.rglob(".*.part"))
    found["W&B rows"] = wandb_rows(folder.wandb)
    return found


def wandb_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of numbers of all parts of a run in W&B's offline folders, by step and the names in
    them; of those that were sent twice, the last. Pictures that were drawn less than two seconds
    before a SIGKILL may be missing there, and lie in overlays/."""
    rows: dict[str, dict[str, Any]] = {}
    # The same second may have two folders, which then differ by the time of their files.
    for part in sorted(
        folder.glob("offline-run-*"), key=lambda p: (p.name[:27], p.stat().st_mtime)
    ):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if record.get("type") != "history":
                continue
            item = record["history"]["item"]
            if any(name.endswith("._type") for name in item):
                continue  # pictures and tables
            row = {name: value for name, value in item.items() if name not in TIMED}
            rows[f"step {row['trainer/global_step']}: {' '.join(sorted(row))}"] = row
    return rows


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places in which two nested values differ, tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{where}: tensors differ"]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{where}/{k}: missing" for k in one.keys() - other.keys()]
        missing += [f"{where}/{k}: too much" for k in other.keys() - one.keys()]
        shared = [k for k in one if k in other]
        return missing + [t for k in shared for t in differences(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}: {one!r:.600} and {other!r:.600}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for k, (a, b) in pairs for text in differences(a, b, f"{where}[{k}]")]
    return (
        [] if one == other or (one != one and other != other) else [f"{where}: {one!r} {other!r}"]
    )


def kill_and_compare(trainings: Trainings, rng: random.Random, number: int) -> None:
    """Stop a run one to three times, let it go on to its end, and compare."""
    variant = rng.choice(sorted(VARIANTS))
    whole = trainings.reference(variant)
    run_dir = trainings.folder / "kills" / str(number)
    story, stops = [variant], rng.choices((1, 2, 3), (5, 3, 2))[0]
    part = "kills"
    for attempt in range(stops + 1):
        run = trainings.start(variant, run_dir, *(["--resume", "auto"] if attempt else []))
        if attempt == stops:
            code = run.wait()
            story.append(f"went on to the end: {code}")
            break
        stop, everybody = rng.choice(STOPS), rng.random() < 0.4
        at = rng.uniform(0, 1.05) * trainings.seconds[variant]
        part = f"kills {stop}"
        story.append(f"{stop} after {at:.2f} s{' to the group' * everybody}")
        code = None
        while code is None and run.seconds < at:
            code = run.poll()
            time.sleep(0.005)
        if code is None:
            (os.killpg if everybody else os.kill)(run.pid, getattr(signal, stop))
            code = run.wait()
        number_of = getattr(signal, stop)
        story.append(f"code {code}")
        allowed = {0, -number_of} if stop == "SIGKILL" else {0, 128 + number_of, -number_of}
        if code not in allowed:
            break
        damage = rng.random()
        last = RunFolder(run_dir).last
        if last.is_file() and RunFolder(run_dir).previous.is_file() and damage < 0.3:
            _damage(last, rng, story)
    trainings.table.count(part, "accepted", run.seconds)
    text = run.output.read_text(errors="replace")
    wrong = [] if code == 0 else [f"it ended with {code}"]
    if not wrong:
        wrong = differences(whole, written(run_dir))
    wrong += _tracebacks(text)
    if wrong:
        trainings.table.rows[part]["accepted"] -= 1
        log = "\n".join([*story, *wrong, "", text[-6000:]])
        trainings.table.finding(part, str(number), log + "\nE" + wrong[0][:80], [run_dir])
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.rmtree(run.output.parent, ignore_errors=True)


def _tracebacks(text: str) -> list[str]:
    """What was printed from the first traceback on."""
    place = text.find("Traceback")
    return [] if place < 0 else [f"a traceback: {text[place : place + 3000]}"]


def _damage(path: Path, rng: random.Random, story: list[str]) -> None:
    data = bytearray(path.read_bytes())
    how = rng.choice(("flipped", "torn", "removed"))
    story.append(f"last.pt {how}")
    if how == "removed":
        path.unlink()
        return
    place = rng.randrange(len(data))
    if how == "flipped":
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data if how == "flipped" else data[:place])


# -- faults of the machine ------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes at the folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fault(trainings: Trainings, rng: random.Random, number: int) -> None:
    """Let one fault come over a run, expect a message, and let the run go on where it can."""
    name = rng.choice(sorted(FAULTS))
    run_dir = trainings.folder / "faults" / str(number) / "run"
    trainings.reference("plain")
    try:
        wrong, text = FAULTS[name](trainings, run_dir, rng)
    except Exception:
        wrong, text = ["the fault itself failed"], traceback.format_exc()
    part = f"fault {name}"
    wrong += _tracebacks(text)
    if wrong:
        text = "\n".join([*wrong, "", text[-6000:]])
        trainings.table.finding(part, str(number), text + "\nE" + wrong[0][:80])
    else:
        trainings.table.count(part, "accepted")
    shutil.rmtree(run_dir.parent, ignore_errors=True)


Outcome = tuple[list[str], str]


def _ended(run: Training, codes: Sequence[int], words: str) -> Outcome:
    """What is wrong with how a run ended, and what it printed."""
    code, text = run.wait(), run.output.read_text(errors="replace")
    wrong = [] if code in codes else [f"ended with {code}, expected one of {codes}"]
    if code and not re.search(words, text):
        wrong.append(f"nothing printed has {words!r}")
    return wrong, text


def _goes_on(trainings: Trainings, run_dir: Path, before: Outcome) -> Outcome:
    """After the fault is over: the run goes on, and writes what a run without it writes."""
    wrong, text = before
    run = trainings.start("plain", run_dir, "--resume", "auto")
    code = run.wait()
    more = run.output.read_text(errors="replace")
    if code:
        return [*wrong, f"could not go on: {code}"], text + more
    return [*wrong, *differences(trainings.reference("plain"), written(run_dir))], text + more


def _full_disk(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    size = rng.randrange(1 << 16, 60 << 20)
    with small_disk(run_dir.parent, size):
        run = Training(
            (str(trainings.files["plain"]), "--run-dir", str(run_dir)),
            trainings.folder / "faults-output" / str(size),
        )
        outcome = _ended(run, (0, 1), "disk is full|No space left")
        subprocess.run(["mount", "-o", "remount,size=500m", run_dir.parent], check=True)
        return _goes_on(trainings, run_dir, outcome)


def _limited_files(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    limit = rng.randrange(1000, 30 << 20)

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = trainings.start("plain", run_dir, prepare=prepare)
    return _goes_on(trainings, run_dir, _ended(run, (0, 1), "may not be that large|File too large"))


def _read_only(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    place = rng.choice((Path("/proc/soak"), Path("/sys/soak"), trainings.files["plain"] / "run"))
    run = Training(
        (str(trainings.files["plain"]), "--run-dir", str(place)), run_dir.parent / "output"
    )
    return _ended(run, (1, 2), "error: ")


def _removed(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    run = trainings.start("plain", run_dir)
    at = rng.uniform(0.2, 1.0) * trainings.seconds["plain"]
    while run.seconds < at and run.poll() is None:
        time.sleep(0.01)
    for _ in range(3):
        shutil.rmtree(run_dir, ignore_errors=True)
    return _ended_or_over(run, (0, 1, 2))


def _ended_or_over(run: Training, codes: Sequence[int]) -> Outcome:
    with suppress(ChildProcessError):  # it ended before the fault came
        return _ended(run, codes, "error: ")
    return [], run.output.read_text(errors="replace")


def _worker_killed(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    run = trainings.start("plain", run_dir)
    at = rng.uniform(0.1, 1.0) * trainings.seconds["plain"]
    code = None
    while run.seconds < at and (code := run.poll()) is None:
        time.sleep(0.01)
    if code is None and (workers := run.workers()):
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers), rng.choice((signal.SIGKILL, signal.SIGSEGV)))
    return _goes_on(trainings, run_dir, _ended_or_over(run, (0, 1)))


def _not_finite(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    run = trainings.start(
        "plain", run_dir, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0"
    )
    outcome = _ended(run, (1,), "not finite.*first bad value: the [a-z]+ ")
    if not outcome[0] and not list(run_dir.glob("bad_batch_*.pt")):
        outcome[0].append("no bad_batch file")
    return outcome


def _full_shm(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    def prepare() -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS: the mount is this process' own
        size = rng.choice((4096, 65536, 1 << 20))
        command = "mount --make-rprivate / && mount -t tmpfs -o size={} tmpfs /dev/shm"
        subprocess.run(command.format(size), shell=True, check=True)

    run = trainings.start("plain", run_dir, prepare=prepare)
    # Without room for a lock, which takes 32 bytes on a page of its own, there are no workers.
    wrong, text = _ended(run, (0, 1), "/dev/shm is full")
    if RunFolder(run_dir).last.is_file():
        return _goes_on(trainings, run_dir, (wrong, text))
    return wrong, text


def _no_memory(trainings: Trainings, run_dir: Path, rng: random.Random) -> Outcome:
    def prepare() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + rng.randrange(20 << 20, 800 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    run = trainings.start("plain", run_dir, "dataset.num_workers=0", prepare=prepare)
    return _ended(run, (0, 1), "out of memory.*\n.*dataset.batch_size=1")


FAULTS: dict[str, Callable[[Trainings, Path, random.Random], Outcome]] = {
    "file size limit": _limited_files,
    "read-only folder": _read_only,
    "folder removed": _removed,
    "worker killed": _worker_killed,
    "not finite": _not_finite,
    "out of memory": _no_memory,
}
if os.geteuid() == 0:
    FAULTS |= {"disk full": _full_disk, "/dev/shm full": _full_shm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    known = ("kills", "faults", *KINDS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--keep", type=Path, default=Path("soak-findings"))
    asked = parser.parse_args()
    parts = asked.parts or list(known)
    if unknown := set(parts) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    table, until = Table(asked.keep.resolve()), time.monotonic() + 60 * asked.minutes
    shown = time.monotonic()
    torch.set_num_threads(1)
    # No TemporaryDirectory: the processes of the trainings would delete it when they end.
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        fuzz = [
            Fuzz(part, folder / part, asked.seed, asked.first, table)
            for part in parts
            if part in KINDS
        ]
        whole = {"kills": kill_and_compare, "faults": fault}
        asked_runs = {part: whole[part] for part in parts if part in whole}
        trainings = Trainings(folder / "trainings", table) if asked_runs else None
        number = asked.first
        while time.monotonic() < until:
            for part in fuzz:
                part.turn()
            for part, once in asked_runs.items():
                once(trainings, random.Random(f"{asked.seed}/{part}/{number}"), number)
            number += 1
            if time.monotonic() - shown > 300:
                table.show()
                shown = time.monotonic()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\nseed {asked.seed}, {asked.minutes:g} minutes")
    table.show()
    return int(table.num_findings > 0)


if __name__ == "__main__":
    sys.exit(main())
