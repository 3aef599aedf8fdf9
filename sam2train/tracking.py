"""One run's record: the console, `metrics.jsonl` and `summary.json`, Weights & Biases.

The calls are the same whatever the W&B mode. Disk comes first, W&B second: the first exception out
of W&B is one line on the console, then W&B is off for the rest of the run and training goes on.
"""

import contextlib
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from sam2train.config import Section
from sam2train.errors import UserError
from sam2train.files import printable, read_json, write_text
from sam2train.machine import say

if TYPE_CHECKING:
    import torch

Mode = Literal["online", "offline", "disabled"]

STEP_AXIS = "trainer/global_step"
INIT_TIMEOUT = 20.0  # seconds; without a network an online start fails after about this long
FINISH_TIMEOUT = 120.0  # seconds; W&B's own default waits for the server without limit
FLUSH_INTERVAL = 2.0  # seconds; a run that is killed loses this much, with W&B's default 15
# `shared` is several writers of one online run; the other two are W&B's old names.
OTHER_MODES: dict[str, Mode] = {"shared": "online", "run": "online", "dryrun": "offline"}


class TrackingConfig(Section):
    """Where a run reports to besides its own folder. `mode: null` lets `choose_mode` decide."""

    mode: Mode | None = None
    # The pattern leaves out the characters that W&B refuses in a project's name.
    project: str = Field(default="sam2train", pattern=r"^[^/\\#?%:]+$", max_length=128)
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Overlay:
    """One frame with its masks, to be judged by a person.

    Raises ValueError for what W&B would show wrong without a word: it casts a float frame to
    black, and stretches a mask of another size.
    """

    name: str
    path: Path  # the composed PNG, on disk
    frame: np.ndarray  # (H, W, 3) uint8
    prediction: np.ndarray  # (H, W) object ids, 0..255, 0 is background
    ground_truth: np.ndarray  # (H, W) as `prediction`
    class_labels: Mapping[int, str]  # object id -> text

    def __post_init__(self) -> None:
        if self.frame.dtype != np.uint8 or self.frame.shape[2:] != (3,):
            raise ValueError(f"frame is {self.frame.dtype} {self.frame.shape}, not uint8 (H, W, 3)")
        for mask in (self.prediction, self.ground_truth):
            if mask.shape != self.frame.shape[:2] or mask.min() < 0 or mask.max() > 255:
                raise ValueError(
                    f"mask of shape {mask.shape} with ids {mask.min()}..{mask.max()} on a frame of "
                    f"{self.frame.shape[:2]}; W&B needs equal sizes and ids in 0..255"
                )


def choose_mode(config: TrackingConfig) -> tuple[Mode, str]:
    """The W&B mode of a run and, in words, why.

    The first that speaks wins: `tracking.mode`, WANDB_MODE, what `wandb offline` or `wandb
    disabled` wrote in this folder, credentials. Online without usable credentials becomes offline:
    W&B would ask for a key on the terminal and wait for ever.
    """
    mode, reason = config.mode, f"tracking.mode is {config.mode}"
    if mode is None and (named := os.environ.get("WANDB_MODE")):
        mode, reason = OTHER_MODES.get(named, named), f"WANDB_MODE={named}"
        if mode not in get_args(Mode):  # W&B then refuses to start, offline too
            return "disabled", f"{reason} is none of {', '.join(get_args(Mode))}"
    if mode in ("offline", "disabled"):
        return mode, reason

    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if mode is None and settings.mode in ("offline", "disabled"):
        return settings.mode, f"`wandb {settings.mode}` was run in this folder"
    remembered, settings.mode = settings.mode, "online"  # login() says False to whoever is offline
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return "offline", f"the key cannot be used: {_first_line(error)}"
    finally:
        settings.mode = remembered
    if found:
        return "online", reason if mode else "a key was found"
    missing = "no key was found; `wandb login` stores one"
    return "offline", f"{reason}, but {missing}" if mode else missing


class Tracker:
    """Context manager around one run. Steps count what is done: the last is `num_steps`.

    A resumed run gives `resume`, the `state_dict` of its last checkpoint: what was written to
    `metrics.jsonl` after it is dropped, as it comes again, and the steps since the last line count.
    Where the checkpoint is from before that state, `first_step` > 0 tells what to drop.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        settings: dict[str, Any],
        log_every: int,
        num_steps: int,
        first_step: int = 0,
        resume: Mapping[str, Any] | None = None,
        console: Console | None = None,
        job_type: str = "train",
    ) -> None:
        self.run_dir, self.console = Path(run_dir), console or Console()
        self.mode: Mode = "disabled"
        self.how_to_sync: str | None = None  # the command that uploads what lies on disk only
        self._metrics = self.run_dir / "metrics.jsonl"
        self._config, self._job_type = config, job_type
        self._run_id, self._name, self._settings = run_id, config.name or name, settings
        self._log_every, self._num_steps, self._first_step = log_every, num_steps, first_step
        self._run: Any = None  # wandb.Run
        self._reporting = False  # to W&B: from a start that worked to the first exception
        self._progress: Progress | None = None
        self._printed_step = first_step
        self._steps, self._training_seconds = 0, 0.0  # of this process, without validation
        self._clear_window()
        self._lines: int | None = None  # of the file, all of them the run's own
        if resume is not None:
            self._sums, self._counts = dict(resume["sums"]), dict(resume["counts"])
            self._lines = resume["lines"]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums since the last line, and how many lines there are."""
        sums = {n: v.cpu() if hasattr(v, "cpu") else v for n, v in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts), "lines": self._lines}

    def __enter__(self) -> "Tracker":
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(
                f"{self.run_dir}: cannot be the folder of the run ({problem.strerror}); name "
                "another with --run-dir"
            ) from None
        self._seconds_before = self._trim_metrics()
        self._start_wandb()
        self._entered = self._mark = time.perf_counter()
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, _: Any) -> None:
        if self._progress is not None:
            self._progress.stop()  # first: it gives the terminal its cursor back
        self._mark = time.perf_counter()  # what went on since the last step was no training
        try:
            if self._window_steps:  # stopped between two lines
                self._write_window(self._last_step)
        except Exception as failure:  # for one, the tensors of a CUDA context that is gone
            if error is None:
                raise
            self.say(f"the steps since the last line are lost: {_first_line(failure)}")
        finally:
            code = _exit_code(error)
            if self._reporting:
                self._report("finish", lambda run: run.finish(exit_code=code))
                self._reporting = False
            elif self._run is not None:  # it failed before; what it holds is still worth writing
                with contextlib.suppress(Exception):
                    self._run.finish(exit_code=code)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, the processes that it resumes included."""
        return self._seconds_before + time.perf_counter() - self._entered

    def log(self, step: int, scalars: "Mapping[str, float | torch.Tensor]", clips: int = 0) -> None:
        """Add one training step. Every `log_every` steps, and at the last, write the means.

        Tensors (one element, any device) are summed where they are; only a written line waits for
        the device. A name that is missing at some steps is averaged over those that have it.
        """
        for name, value in scalars.items():
            if hasattr(value, "detach"):
                # A copy in float32: the caller may reuse its tensor, bfloat16 sums lose digits.
                value = value.detach().reshape(()).clone().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._clips, self._steps, self._last_step = self._clips + clips, self._steps + 1, step
        self._window_steps += 1
        self._count_seconds()
        if self._progress is None and self.console.is_terminal:
            self._start_progress()
        last = step == self._num_steps
        if step % self._log_every == 0 or last:
            status = self._write_window(step)
            if self._progress is not None:
                self._progress.update(self._task, status=status)
            elif last or step - self._printed_step >= self._num_steps / 10:
                self.say(f"step {step}/{self._num_steps}  {status}")
                self._printed_step = step
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one line now: validation scores, an audit.

        The time since the last `log` is not counted as training: throughput stays honest.
        """
        self._write(step, scalars)
        self._mark = time.perf_counter()

    def parameters(self, report: Mapping[str, tuple[int, int]]) -> None:
        """Show and summarise module -> (trainable, total) parameters.

        `params/<module>` is the module's total, `trainable/<module>` what is trained of it;
        `params/total` and `params/trainable` are sums.
        """
        self.console.print(parameter_table(report))
        sizes = {f"params/{module}": size for module, (_, size) in report.items()}
        trainable, total = (sum(row[part] for row in report.values()) for part in (0, 1))
        learning = {f"trainable/{module}": count for module, (count, _) in report.items()}
        self.summary({"params/total": total, "params/trainable": trainable, **sizes, **learning})

    def overlays(self, step: int, pictures: Sequence[Overlay]) -> None:
        """Send each picture to W&B twice: as composed, and as a frame whose masks can be toggled.

        W&B's terminal view shows no toggled masks, hence the composed one.
        """

        def send(run: Any) -> None:
            import wandb

            images = {}
            for picture in pictures:
                labels = {int(key): printable(text) for key, text in picture.class_labels.items()}
                masks = {
                    name: {"mask_data": ids.astype(np.uint8), "class_labels": labels}
                    for name, ids in vars(picture).items()
                    if name in ("prediction", "ground_truth")
                }
                images[f"overlays/{picture.name}"] = wandb.Image(str(picture.path))
                images[f"masks/{picture.name}"] = wandb.Image(picture.frame, masks=masks)
            run.log({STEP_AXIS: step, **images})

        self._report("overlays", send)
        self._mark = time.perf_counter()

    def report(
        self, step: int, tables: Mapping[str, Sequence[Mapping[str, Any]]], figures: Sequence[Path]
    ) -> None:
        """Send W&B tables, name -> rows with the same keys, and pictures that lie on disk."""

        def send(run: Any) -> None:
            import wandb

            sent: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in figures}
            for name, rows in tables.items():
                if rows:
                    columns = list(rows[0])
                    cells = [[_plain_values(row[column]) for column in columns] for row in rows]
                    sent[f"tables/{name}"] = wandb.Table(columns, cells, allow_mixed_types=True)
            run.log({STEP_AXIS: step, **sent})

        self._report("report", send)

    def say(self, text: str) -> None:
        """One line on the console, above the live progress; paths are neither styled nor cut."""
        say(self.console, text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merge into `summary.json` (replaced as a whole, never half written) and W&B's summary."""
        path = self.run_dir / "summary.json"
        expected = "expected the JSON that this run wrote; mend or delete the file"
        known = read_json(path, expected, optional=True)
        text = json.dumps(
            {**known, **_plain_values(values, finite=True)}, indent=2, allow_nan=False
        )
        write_text(path, text + "\n")
        self._report("summary", lambda run: run.summary.update(_plain_values(values)))

    def _trim_metrics(self) -> float:
        """Drop the lines that a resumed run writes again, and what a killed process half wrote.

        Returns the `seconds` of the last line kept, 0 where there is none.
        """
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        kept, seconds = [], 0.0
        by_step = self._lines is None and self._first_step > 0
        for line in lines[: self._lines]:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if not by_step or row["step"] <= self._first_step:
                    kept.append(line + "\n")
                    seconds = row.get("seconds", seconds)
        if dropped := len(lines) - len(kept):
            write_text(self._metrics, "".join(kept))
            what = f"{dropped} line{'s' * (dropped > 1)}"
            after = f"from after the checkpoint of step {self._first_step}"
            self.say(f"{self._metrics}: dropped {what} {after}, or cut off")
        self._lines = len(kept)
        return seconds

    def _start_wandb(self) -> None:
        try:
            mode, reason = choose_mode(self._config)
            if mode == "disabled":
                self.say(f"W&B is off: {reason}")
                return
            try:
                self._init_wandb(mode)
            except Exception as error:
                if mode == "offline":
                    raise
                import wandb

                wandb.teardown()  # else W&B refuses the run id of the failed start
                reason = f"going online failed: {_first_line(error)}"
                self._init_wandb("offline")
        except Exception as error:
            self.say(f"W&B is off, it did not start ({type(error).__name__}: {_first_line(error)})")
            return
        self._reporting = True
        folder = shlex.quote(str(self.run_dir / "wandb" / Path(self._run.dir).parent.name))
        if self.mode == "offline":
            self.how_to_sync = f"wandb sync {folder}"
            self.say(f"W&B is offline: {reason}. Upload later: {self.how_to_sync}")
        else:
            self._sync_broken = f"wandb sync --include-online {folder}"
            self.say(f"W&B is online: {reason}. {self._run.url}")

    def _init_wandb(self, mode: Mode) -> None:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        self._run = wandb.init(
            mode=mode,
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=self._config.tags,
            name=printable(self._name),
            id=self._run_id,
            dir=str(self.run_dir),
            config=self._settings,
            job_type=self._job_type,
            resume="allow",
            reinit="create_new",  # never somebody else's run that was left open
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=FLUSH_INTERVAL,
            ),
        )
        self.mode = mode
        # An axis of our own and never `step=`, which drops rows below the current step.
        self._run.define_metric(STEP_AXIS)
        self._run.define_metric("*", step_metric=STEP_AXIS)

    def _report(self, what: str, call: Callable[[Any], object]) -> None:
        """Run one W&B call; its first exception ends the reporting, not the training."""
        if not self._reporting:
            return
        try:
            call(self._run)
        except Exception as error:
            self._reporting = False
            self.how_to_sync = self.how_to_sync or self._sync_broken
            self.say(
                f"W&B is off from here, {what} failed ({type(error).__name__}: "
                f"{_first_line(error)}); {self.run_dir} goes on. Upload what W&B has: "
                f"{self.how_to_sync}"
            )

    def _write(self, step: int, scalars: Mapping[str, Any]) -> None:
        row = json.dumps({"step": step, **_plain_values(scalars, finite=True)}, allow_nan=False)
        with self._metrics.open("a") as file:
            file.write(row + "\n")
        self._lines += 1
        self._report("log", lambda run: run.log({STEP_AXIS: step, **_plain_values(scalars)}))

    def _write_window(self, step: int) -> str:
        """Write the means since the last line. Returns the text of the progress line."""
        row = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._count_seconds()  # float() waited for the device, and that wait belongs to these steps
        if self._clips:
            spent = self._training_seconds - self._window_start
            row["clips_per_second"] = self._clips / max(spent, 1e-9)
        row |= {"seconds": self.seconds, **_memory()}
        self._clear_window()
        self._write(step, row)
        left = (self._num_steps - step) * self._training_seconds / self._steps
        row["left"] = timedelta(seconds=round(left))
        formats = {"loss": "loss {:.4g}", "lr": "lr {:.1e}", "clips_per_second": "{:.1f} clips/s"}
        formats |= {"left": "{} left", "memory_gb": "{:.1f} GB"}
        return "  ".join(text.format(row[name]) for name, text in formats.items() if name in row)

    def _clear_window(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._clips, self._window_start = 0, self._training_seconds
        self._window_steps = 0  # of this process

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._training_seconds, self._mark = self._training_seconds + now - self._mark, now

    def _start_progress(self) -> None:
        # One text, so that a narrow terminal shortens the bar and not the numbers.
        text = TextColumn("{task.completed}/{task.total}  {task.fields[status]}", markup=False)
        bar = BarColumn(bar_width=None)
        self._progress = Progress(bar, text, console=self.console, expand=True)
        self._task = self._progress.add_task("", total=self._num_steps, status="")
        self._progress.start()


def parameter_table(report: Mapping[str, tuple[int, int]]) -> Table:
    """Trainable and frozen parameters, a row each module and their sum; `memory` is the sum of the
    indented parts below it."""
    from sam2train.pretrained import MEMORY  # brings torch

    def total(names: Iterable[str]) -> tuple[int, int]:
        return tuple(sum(report[name][part] for name in names) for part in (0, 1))

    memory = [name for name in MEMORY if name in report]
    lines = {name: row for name, row in report.items() if name not in memory}
    if memory:
        lines |= {"memory": total(memory)} | {f"  {name}": report[name] for name in memory}
    table = Table("module", title="Parameters", title_justify="left", caption_justify="left")
    if memory:
        table.caption = "memory, a name for model.trainable_modules, is the parts below it"
    for heading in ("trainable", "frozen"):
        table.add_column(heading, justify="right")
    for module, (learning, size) in [*lines.items(), ("total", total(report))]:
        table.add_row(module, f"{learning:,}", f"{size - learning:,}")
    return table


def _plain_values(value: Any, *, finite: bool = False) -> Any:
    """The value with Python numbers for tensors and NumPy scalars, at any depth.

    `finite` makes None of NaN and infinities: JSON has no word for them, and pandas reads NaN.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain_values(item, finite=finite) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(item, finite=finite) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if finite and isinstance(value, float) and not math.isfinite(value) else value


def _memory() -> dict[str, float]:
    """`memory_gb`, 10^9 bytes: CUDA's peak, else what the process holds; empty if not on Linux."""
    import torch

    if torch.cuda.is_initialized():
        return {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"memory_gb": pages * os.sysconf("SC_PAGE_SIZE") / 1e9}
    return {}


def _exit_code(error: BaseException | None) -> int:
    """What the shell will see: 0 done, 2 a user's mistake, 130 interrupted, 1 anything else."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if error is None:
        return 0
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
