"""One run's record: the console, `metrics.jsonl` and `summary.json`, Weights & Biases.

The calls are the same whatever the W&B mode. Each call writes to the disk first, then to W&B.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from sam2train import distributed
from sam2train.errors import UserError
from sam2train.files import naming, printable, write_text
from sam2train.machine import count_bar, describe_environment, say
from sam2train.metrics import COPY, TRAINED
from sam2train.pictures import read_picture
from sam2train.run_folder import RunFolder, parse_row, read_lines, read_summary
from sam2train.runlog_wandb import (
    BEST_METRIC,
    FLUSH_INTERVAL,
    STEP_AXIS,
    TensorBoardRun,
    TrackingConfig,
    WandbRun,
    first_line,
    plain_values,
)

if TYPE_CHECKING:
    import torch

    from sam2train.overlays import Overlay


_UNSURE = 30 * FLUSH_INTERVAL  # seconds of rows before a kill that W&B may not have on disk


class RunLog:
    """Context manager around one run. Of several processes the main one alone writes, and gives W&B
    what it logs. Steps count what is done: the last is `num_steps`.

    A resumed run gives `resume`, the `state_dict` of its last checkpoint: what was written to
    `metrics.jsonl` after it is dropped, as it comes again, and the steps since the last line count.
    Where the checkpoint is from before that state, `first_step` > 0 tells what to drop.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
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
        self._config = config
        self.folder, self.console = folder, console or Console()
        self.wandb = WandbRun(
            config,
            folder,
            run_id=run_id,
            name=name,
            settings=settings,
            job_type=job_type,
            say=self.say,
        )
        self._board: TensorBoardRun | None = None
        self._saved: dict[Path, tuple[int, Mapping[str, str]]] = {}  # checkpoint -> step, data
        self._log_every, self._num_steps, self._first_step = log_every, num_steps, first_step
        self._progress: Progress | None = None
        self._printed_step, self._shown = first_step, -math.inf
        self._steps, self._training_seconds = 0, 0.0  # of this process, without validation
        # For the time left: steps between validations, their videos and those of the test.
        self.scoring: tuple[int, int, int] = 1, 0, 0
        self._pace: dict[str, float] = {}  # model or baseline -> seconds a video
        self._clear_window()
        self._lines: int | None = None  # of the file, all of them the run's own
        if resume is not None:
            self._sums, self._counts = dict(resume["sums"]), dict(resume["counts"])
            self._lines = resume["lines"]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums since the last line, and how many lines there are."""
        sums = {n: v.cpu() if hasattr(v, "cpu") else v for n, v in self._sums.items()}
        return {"sums": sums, "counts": dict(self._counts), "lines": self._lines}

    def __enter__(self) -> "RunLog":
        if not distributed.is_main():
            self._seconds_before, self._lines = 0.0, 0
            self._entered = self._mark = time.perf_counter()
            return self
        try:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(
                f"{self.folder.path}: cannot be the folder of the run ({problem.strerror}); name "
                "another with --run-dir"
            ) from None
        if "tensorboard" in self._config.also:
            self._board = TensorBoardRun(self.folder.tensorboard, self._first_step, self.say)
        self._seconds_before = self._trim_metrics()
        summary = read_summary(self.folder.summary, self.folder.metrics, lambda line: None)
        self.wandb.start()
        if summary.get("status") == "running":  # killed: the process before did not end W&B's part
            self._send_again()
        self._entered = self._mark = time.perf_counter()
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, _: Any) -> None:
        if self._progress is not None:
            self._progress.stop()  # first: it shows the terminal's cursor again
        self._mark = time.perf_counter()  # the time since the last step was no training
        try:
            if self._window_steps:  # stopped between two lines
                # The run may go on, and then this line comes again, with all its steps: it replaces
                # the one in the file, and W&B can take none back.
                self._write_window(self._last_step, to_wandb=False)
        except Exception as failure:  # for one, the tensors of a CUDA context that is gone
            if error is None:
                raise
            with contextlib.suppress(OSError):
                self.say(f"the steps since the last line are lost: {first_line(failure)}")
        finally:
            if error is None:
                self._send_model()
            elif not isinstance(error, SystemExit | KeyboardInterrupt):
                self.wandb.alert(error)
            if self._board is not None:
                self._board.close()
            self.wandb.finish(_exit_code(error))

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, the processes that it resumes included."""
        return self._seconds_before + time.perf_counter() - self._entered

    def log(self, step: int, scalars: "Mapping[str, float | torch.Tensor]", clips: int = 0) -> None:
        """Add one training step. Every `log_every` steps, and at the last, write the means.

        Tensors (one element, any device) are summed where they are; only a line waits for the
        device: a written one, that of the first step, and on a terminal one a second. A name that
        is missing at some steps is averaged over those that have it.
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
        due = self._progress is not None and time.perf_counter() - self._shown >= 1
        status = None
        if step % self._log_every == 0 or last:
            status = self._status(step, self._write_window(step))
        elif self._steps == 1 or due:
            status = self._status(step, self._means())
        if self._progress is not None:
            self._progress.update(
                self._task, completed=step, **({"status": status} if status else {})
            )
        elif status and (
            last or self._steps == 1 or step - self._printed_step >= self._num_steps / 10
        ):
            self.say(f"step {step}/{self._num_steps}  {status}")
            self._printed_step = step if self._steps > 1 else self._printed_step
        if status:
            self._shown = time.perf_counter()

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one line now: validation scores, an audit.

        The time since the last `log` is not counted as training, so that it does not lower the
        throughput.
        """
        self._write(step, scalars)
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def counting(self, what: str, number: int, model: str) -> Iterator[Callable[[], None]]:
        """Show how many videos of a number are done, scored for a model or baseline; the function
        it gives counts one."""
        begin = time.perf_counter()
        if self._progress is None:
            with count_bar(self.console) as bar:
                task = bar.add_task(what, total=number)
                yield lambda: bar.advance(task)
            self._pace[model] = (time.perf_counter() - begin) / max(number, 1)
            return
        bar = self._progress  # rich shows one at a time
        task = bar.add_task(what, total=number, status=what)

        def count() -> None:
            bar.advance(task)
            (counted,) = (t for t in bar.tasks if t.id == task)
            left = counted.time_remaining
            more = "" if left is None else f"  {timedelta(seconds=round(left))} left"
            bar.update(task, status=what + more)

        try:
            yield count
        finally:
            bar.remove_task(task)
        self._pace[model] = (time.perf_counter() - begin) / max(number, 1)

    def _scoring_to_come(self, step: int) -> float:
        """Seconds that scores after a step will take, as far as earlier ones tell; 0 before."""
        every, num_val, num_test = self.scoring
        times = self._num_steps // every - step // every + (self._num_steps % every > 0)
        model, copied = (self._pace.get(key, 0.0) for key in (TRAINED, COPY))
        return times * num_val * model + num_test * (2 * model + copied)

    def environment(self, device: "torch.device") -> None:
        """Write what the run computes with: code, versions, machine."""
        text = json.dumps(describe_environment(device), indent=2)
        if distributed.is_main():
            write_text(self.folder.environment, text + "\n")

    def parameters(self, report: Mapping[str, tuple[int, int]]) -> None:
        """Show and summarise module -> (trainable, total) parameters.

        `params/<module>` is the module's total, `trainable/<module>` what is trained of it;
        `params/total` and `params/trainable` are sums.
        """
        self.console.print(parameter_table(report))
        sizes = {f"params/{module}": size for module, (_, size) in report.items()}
        trainable, total = (sum(row[part] for row in report.values()) for part in (0, 1))
        learning = {f"trainable/{module}": count for module, (count, _) in report.items()}
        counts = {"params/total": total, "params/trainable": trainable, **sizes, **learning}
        self.summary(counts)
        self.wandb.report("config", lambda run: run.config.update(counts, allow_val_change=True))

    def overlays(self, step: int, pictures: "Sequence[Overlay]") -> None:
        """Send W&B films, and each picture twice: as composed, and as a frame whose masks can be
        toggled.

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
                toggled = wandb.Image(picture.frame, masks=masks, file_type="jpg")
                images[f"masks/{picture.name}"] = toggled
                if picture.film is not None:
                    caption = "prediction | ground truth"
                    film = wandb.Video(str(picture.film), caption)
                    images[f"films/{picture.name}"] = film
            run.log({STEP_AXIS: step, **images})

        if pictures:
            self.wandb.report("overlays", send)
        for picture in pictures if self._board is not None else ():
            self._board.picture(step, f"overlays/{picture.name}", read_picture(picture.path))
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
                    cells = [[plain_values(row.get(name)) for name in columns] for row in rows]
                    sent[f"tables/{name}"] = wandb.Table(columns, cells, allow_mixed_types=True)
            run.log({STEP_AXIS: step, **sent})

        self.wandb.report("report", send)

    def saved(self, path: Path, step: int, data: Mapping[str, str]) -> None:
        """A checkpoint was written, of a training on data with these fingerprints by split."""
        self._saved[path] = step, data
        if self._config.log_model == "all":
            self.wandb.log_model(path, [path.stem, f"step_{step}"], data, copy=True)

    def _send_model(self) -> None:
        """Send the best checkpoint at the end of the run, the last where none is the best."""
        path = self.folder.checkpoint
        if self._config.log_model is None or path is None or not self._saved:
            return
        steps = [f"step_{self._saved[path][0]}"] if path in self._saved else []  # else before
        _, data = next(iter(self._saved.values()))
        self.wandb.log_model(path, [path.stem, *steps], data, copy=False)

    def say(self, text: str) -> None:
        """One line on the console, above the live progress; paths are neither styled nor cut."""
        say(self.console, text)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Merge into `summary.json` (replaced as a whole, never half written) and W&B's summary."""
        if not distributed.is_main():
            return
        path = self.folder.summary
        known = read_summary(path, self.folder.metrics, self.say)
        text = json.dumps({**known, **plain_values(values, finite=True)}, indent=2, allow_nan=False)
        write_text(path, text + "\n")
        if self.wandb.shows_best:
            values = {name: value for name, value in values.items() if name != BEST_METRIC}
        self.wandb.report("summary", lambda run: run.summary.update(plain_values(values)))

    def _trim_metrics(self) -> float:
        """Drop the lines that a resumed run writes again, and what a killed process half wrote.

        Returns the `seconds` of the last line kept, 0 where there is none.
        """
        lines = read_lines(self.folder.metrics)
        kept, seconds = [], 0.0
        by_step = self._lines is None and self._first_step > 0
        for number, line in enumerate(lines[: self._lines], 1):
            row = parse_row(line)
            if row is None:
                self.say(f"{self.folder.metrics}: line {number} is not a row of a run; left out")
            elif not by_step or row["step"] <= self._first_step:
                kept.append(line + "\n")
                seconds = row.get("seconds", seconds)
        if dropped := len(lines) - len(kept):
            write_text(self.folder.metrics, "".join(kept))
            what = f"{dropped} line{'s' * (dropped > 1)}"
            after = f"from after the checkpoint of step {self._first_step}"
            self.say(f"{self.folder.metrics}: dropped {what} {after}, or cut off")
        self._lines = len(kept)
        return seconds

    def _write(self, step: int, scalars: Mapping[str, Any], *, to_wandb: bool = True) -> None:
        row = json.dumps({"step": step, **plain_values(scalars, finite=True)}, allow_nan=False)
        if not distributed.is_main():
            return
        with naming(self.folder.metrics), self.folder.metrics.open("a") as file:
            file.write(row + "\n")
        self._lines += 1
        if self._board is not None:
            self._board.log(step, scalars)
        if to_wandb:
            self._send(step, scalars)

    def _send_again(self) -> None:
        """Send W&B the rows that it may not have written when the process before was killed.

        Rows that it has come twice, and are equal: whatever reads them has one by step and name.
        """
        rows = [row for line in read_lines(self.folder.metrics) if (row := parse_row(line))]
        old = self._seconds_before - _UNSURE
        known = [k for k, row in enumerate(rows, 1) if row.get("seconds", old) < old]
        for row in rows[max(known, default=0) :]:
            self._send(row["step"], {n: v for n, v in row.items() if n != "step" and v is not None})

    def _send(self, step: int, scalars: Mapping[str, Any]) -> None:
        self.wandb.report("log", lambda run: run.log({STEP_AXIS: step, **plain_values(scalars)}))

    def _means(self) -> dict[str, Any]:
        """The row of the means since the last line."""
        row = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._count_seconds()  # float() waited for the device, and that wait belongs to these steps
        if self._clips:
            spent = self._training_seconds - self._window_start
            row["clips_per_second"] = self._clips / max(spent, 1e-9)
        return row | {"seconds": self.seconds, **_memory()}

    def _write_window(self, step: int, *, to_wandb: bool = True) -> dict[str, Any]:
        """Write the means since the last line. Returns them."""
        row = self._means()
        self._clear_window()
        self._write(step, row, to_wandb=to_wandb)
        return row

    def _status(self, step: int, row: Mapping[str, Any]) -> str:
        """The text of the progress line."""
        left = (self._num_steps - step) * self._training_seconds / self._steps
        left = timedelta(seconds=round(left + self._scoring_to_come(step)))
        row = {**row, "left": left}
        formats = {"loss": "loss {:.4g}", "lr": "lr {:.1e}", "clips_per_second": "{:.2g} clips/s"}
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
        # Rarely, as W&B keeps all that is printed.
        how = {"console": self.console, "expand": True, "refresh_per_second": 2}
        self._progress = Progress(bar, text, **how)
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
