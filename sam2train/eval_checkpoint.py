"""A checkpoint beside its baselines on whole videos: `--evaluate`; and `--prompt-matrix`: with each
prompt type, clean and moved, and 1, 3 and 5 clicks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from sam2train import distributed
from sam2train.attributes import ATTRIBUTE_COLUMNS, find_attributes, scores_by_attribute
from sam2train.checkpoint import Loaded, load_checkpoint
from sam2train.clips import Prompt
from sam2train.config import to_yaml
from sam2train.data_clips import ClipDataset
from sam2train.data_report import shared_split_warning
from sam2train.data_source import Video
from sam2train.datasets import build_dataset
from sam2train.errors import UserError
from sam2train.evaluate import (
    SeenFrame,
    TrackedVideo,
    first_views,
    segment_frame,
    track_video,
    track_videos,
    why_not_scored,
)
from sam2train.experiment import Experiment, base_hash, build_model, uses_bf16
from sam2train.files import replacing, write_rows, write_text
from sam2train.machine import count_bar, say
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.overlays import OverlayDrawer
from sam2train.prompts import (
    NOISE,
    Cell,
    PromptGenerator,
    all_cells,
    mask_to_box,
    move_point,
    next_click,
    type_of,
)
from sam2train.run_folder import RunFolder
from sam2train.run_scores import Contender, score_beside, score_contender, weak_base
from sam2train.runlog import RunLog
from sam2train.score_pictures import (
    horizon_figure,
    horizon_table,
    matrix_figure,
    matrix_table,
)
from sam2train.scores import (
    FRAME_COLUMNS,
    HORIZON_COLUMNS,
    LABELS,
    SCORE_COLUMNS,
    Scores,
    difference,
    numbers,
    scores_table,
)
from sam2train.video_files import MaskFolder, MaskLayout

SplitName = Literal["val", "test"]
MEANS = ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")


class Evaluation:
    """One checkpoint of an experiment on one of its splits, into a folder of its own.

    Args:
        source: a run's checkpoint, its folder (the best one, else the last), a file such as
            `--export` writes, or the word `base` for the weights that the experiment starts from.
        split: `val` or `test`.
        run_dir: where everything goes; must not exist, or be empty.
        with_base: also score the untouched base.

    Raises:
        UserError: no data for this split, weights that do not fit, a folder in use.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: str,
        split: SplitName,
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        console: Console,
        with_base: bool = True,
    ):
        self.experiment, self.split = experiment, split
        self.folder, self.console = RunFolder(run_dir), console
        in_use = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
        if in_use and distributed.is_main():
            raise UserError(f"--run-dir {run_dir}: there is something already; name a new folder")
        path = getattr(experiment.dataset, f"{split}_path")
        if path is None:
            raise UserError(
                f"dataset.{split}_path is null; name the videos to score, or take --split "
                f"{'test' if split == 'val' else 'val'}"
            )
        self.attributes = find_attributes(experiment.evaluation.attributes, path)
        sections = experiment.dataset, experiment.augment, experiment.clips_seed
        self.data: ClipDataset = build_dataset(*sections, path, training=False, say=self._say)
        # Why these videos can be tracked only; None where they can be scored.
        self.fault = why_not_scored(self.data.videos, experiment.evaluation.frame_policy)
        self.fault = self.fault and f"dataset.{split}_path: {self.fault}"
        model = build_model(experiment, self._say)
        self.bf16 = uses_bf16(experiment, model.device)
        self.loaded: Loaded | None = None
        self.contenders = [self._contender(BASE, LABELS[BASE], 0, model)]
        if source != "base":
            source = str(RunFolder(Path(source)).checkpoint or source)
            self.loaded = load_checkpoint(model, experiment, Path(source))
            label = Path(source).name
            if self.loaded.step is not None:
                label += f", step {self.loaded.step}"
            self.contenders = [self._contender(TRAINED, label, self.loaded.step or 0, model)]
            if with_base and not self.fault:
                # Random weights come from the experiment's seed: these are the same again.
                base = build_model(experiment, self._say)
                self.contenders.append(self._contender(BASE, LABELS[BASE], 0, base))
        self.runlog = RunLog(
            experiment.tracking,
            self.folder,
            run_id=run_id,
            name=name,
            settings=experiment.model_dump(mode="json") | {"split": split, "checkpoint": source},
            log_every=1,
            num_steps=0,
            console=console,
            job_type="evaluate",
        )

    def evaluate(
        self, save_masks: Path | None = None, layout: MaskLayout = "davis"
    ) -> list[Scores]:
        """Score the checkpoint and its baselines. Returns the checkpoint's scores first; none where
        the videos cannot be scored, of which the masks are written all the same.

        Args:
            save_masks: a new folder or .zip for its masks.
            layout: how they lie there.

        Raises:
            UserError: a layout, or videos that cannot be scored, and no place for masks.
        """
        if save_masks is None and layout != "davis":
            raise UserError(f"--save-masks-as {layout}: add --save-masks, where they go")
        if self.fault and save_masks is None:
            raise UserError(f"{self.fault}; --save-masks MASKS.zip writes what its server scores")
        masks = save_masks and distributed.from_main(partial(MaskFolder, save_masks, layout))
        with self.record() as summary, masks or nullcontext():
            rows = self._track(masks) if self.fault else self._score(masks, summary)
        if self.fault:
            self._say(f"{self.fault}; upload to its evaluation server:")
        if masks:
            self._say(f"  {save_masks!s:<48} {masks.what()}")
            if layout != "youtube_vos" and any(video.asked for video in self.data.videos):
                self._say("its meta.json asks for some frames: --save-masks-as youtube_vos")
        return rows

    # -- parts ----------------------------------------------------------------------------------

    def _track(self, masks: MaskFolder) -> list[Scores]:
        """Write the masks of videos that cannot be scored, in the main process. Returns []."""
        how = {"seed": self.experiment.prompts_seed, "on_frame": lambda _, seen: masks.write(seen)}
        track, rules = self.contenders[0].track, self.experiment.evaluation
        videos = track_videos(track, self.data, rules, **how) if distributed.is_main() else ()
        with self.progress(1) as advance:
            for _ in videos:
                advance(self.contenders[0].label)
        return []

    def _score(self, masks: MaskFolder | None, summary: dict[str, Any]) -> list[Scores]:
        """Score all contenders; pictures and masks are those of the first one."""
        most = self.experiment.evaluation.num_overlays
        drawers = {
            contender.key: OverlayDrawer(self.data, self.folder.overlays, name, most)
            for name, contender in zip((self.split, BASE), self.contenders, strict=False)
        }

        with self.progress(len(self.contenders) + 1) as advance:

            def watch(contender: Contender) -> dict[str, Any]:
                drawer = drawers.get(contender.key)
                if drawer is None:  # the copied mask is not drawn
                    return {"on_video": lambda index, tracked: advance(contender.label)}
                own = masks if contender is self.contenders[0] else None

                def see(index: int, seen: SeenFrame) -> None:
                    if own:
                        own.write(seen)
                    drawer.see_frame(index, seen)

                def see_video(index: int, tracked: TrackedVideo) -> None:
                    drawer.see_video(index, tracked)
                    advance(contender.label)

                num_of_main = len(self.data.videos) if own else 0
                return {"on_frame": see, "on_video": see_video, "num_of_main": num_of_main}

            rows = score_beside(self.contenders, self.data, self.experiment, self.split, watch)
            first, *others = drawers.values()
            first.draw(*others)
        if distributed.is_main():
            self._write(rows)
            self._summarise(rows, summary)
            self.runlog.overlays(rows[0].step, first.overlays)
            self._show(rows)
        return rows

    def _contender(self, key: str, label: str, step: int, model: SAM2Model) -> Contender:
        rules = self.experiment.evaluation
        return Contender(
            key, label, step, partial(track_video, model, bf16=self.bf16, rules=rules), model
        )

    @contextmanager
    def record(self) -> Iterator[dict[str, Any]]:
        """Open the runlog around a command; what is put into the dict ends in summary.json."""
        config, rules = self.experiment.model, self.experiment.evaluation
        warning = shared_split_warning(self.experiment.dataset)
        warnings = [warning] if warning else []
        warnings += self.loaded.notes if self.loaded else ()
        with self.runlog as runlog:
            # Not config.yaml: a folder with that file is a run, which can be resumed and compared.
            if distributed.is_main():
                write_text(self.folder.evaluation, to_yaml(self.experiment))
            runlog.environment(self.contenders[0].model.device)
            for text in warnings:
                runlog.say(f"warning: {text}")
            summary: dict[str, Any] = {
                "split": self.split,
                "frame_policy": rules.frame_policy,
                "void": rules.void,
                "memory_admission": rules.memory_admission.name,
                "predictor_defaults": rules.predictor_defaults,
                "overlap": rules.overlap,
                "prompt_types": list(rules.prompt_types or self.experiment.dataset.prompt_types),
                "seed": self.experiment.trainer.seed,
                "evaluation_seed": self.experiment.prompts_seed,
                "data": {self.split: self.data.fingerprint},
                "num_videos": len(self.data.videos[: rules.max_videos]),
                "base": {"path": config.checkpoint_path, "sha256": base_hash(self.experiment)},
                "checkpoint": self.loaded
                and {key: getattr(self.loaded, key) for key in ("path", "sha256", "step")},
                "warnings": warnings,
                "status": "running",
            }
            runlog.summary(summary)
            try:
                yield summary
            except BaseException:
                runlog.summary({"status": "failed", "seconds": runlog.seconds})
                raise
            runlog.summary(summary | {"status": "finished", "seconds": runlog.seconds})

    @contextmanager
    def progress(self, passes: int) -> Iterator[Callable[..., None]]:
        """A bar over the videos of all passes; the function it gives counts one video."""
        videos = len(self.data.videos[: self.experiment.evaluation.max_videos])
        videos = -(-videos // distributed.num_processes())  # this process sees its own only
        with count_bar(self.console) as progress:
            task = progress.add_task("", total=passes * videos)
            yield lambda label: progress.update(task, advance=1, description=label)

    def _write(self, rows: Sequence[Scores]) -> None:
        objects, horizon, frames = (
            [row for scores in rows for row in getattr(scores, name)]
            for name in ("objects", "horizon", "frames")
        )
        write_rows(self.folder.scores, objects, SCORE_COLUMNS)
        write_rows(self.folder.horizon, horizon, HORIZON_COLUMNS)
        write_rows(self.folder.frames, frames, FRAME_COLUMNS)
        figure = self.folder.horizon_figure
        drawn = horizon_figure(
            {scores.label: scores.horizon for scores in rows},
            {scores.label: scores.frames for scores in rows},
            title=f"{self.split} videos",
        )
        with replacing(figure) as unfinished:
            drawn.savefig(unfinished, format="png", dpi=120)
        self.runlog.report(rows[0].step, {"scores": objects, "horizon": horizon}, [figure])

    def _summarise(self, rows: Sequence[Scores], summary: dict[str, Any]) -> None:
        main = rows[0]
        values = {f"{self.split}/{name}": value for name, value in main.means.items()}
        self.runlog.record(main.step, values | numbers(main.horizon))
        summary |= values | numbers(main.horizon)
        for scores in rows[1:]:
            key, apart = scores.model, difference(scores, main)
            summary |= {
                **{f"{self.split}/{key}/{name}": scores.means[name] for name in MEANS},
                **{f"{key}/{name}": value for name, value in numbers(scores.horizon).items()},
                f"{self.split}/gain_over_{key}": {
                    "value": apart.value if apart.known else None,
                    "low": apart.low,
                    "high": apart.high,
                    "num_videos": apart.num,
                },
            }

    def _show(self, rows: Sequence[Scores]) -> None:
        policy = self.experiment.evaluation.frame_policy
        main = rows[0].means
        title = (
            f"{self.split} videos, {main['num_objects']} objects, frames: {policy}, prompts: "
            + ", ".join(sorted({str(row["prompt"]) for row in rows[0].objects}))
        )
        self.console.print(scores_table(title, rows))
        self.console.print(horizon_table(rows))
        if self.attributes is not None:
            by_attribute, table = scores_by_attribute(rows, self.attributes)
            write_rows(self.folder.attributes, by_attribute, ATTRIBUTE_COLUMNS)
            self.console.print(table)
        if num := main["num_not_scored"]:
            self._say(f"{num} objects have no frame to score under {policy!r}")
        of = {scores.model: scores for scores in rows}
        if BASE in of and (text := weak_base(self.experiment, of[BASE], of[COPY])):
            self._say(text)
        self.places("scores", "attributes", "horizon", "frames", "horizon_figure", "overlays")

    def places(self, *names: str) -> None:
        """Say where these files of the folder are, and how to upload them."""
        self._say(f"\nwrote {self.folder.path}/")
        for line in self.folder.contents(*names, "summary"):
            self._say(line)
        if self.runlog.wandb.how_to_sync:
            self._say(f"\nupload it:\n  {self.runlog.wandb.how_to_sync}")

    def _say(self, text: str) -> None:
        say(self.console, text)


# The prompt matrix

MATRIX_COLUMNS = (
    *("step", "split", "model", "prompt", "clicks", "noise"),
    *MEANS,
    *("num_objects", "num_not_scored", "frame_policy", "void", "memory_admission"),
    # J&F minus that of the same prompt without noise, with its interval over videos
    *("change", "change_low", "change_high"),
)


class CellPrompts:
    """Draws the prompts of one cell: a `DrawPrompts`.

    Clicks follow SAM 2's simulation of a user: the first falls on the middle of the object, each
    further one on the middle of the largest error that the model makes with those so far, positive
    where the object is missed, negative where there is none. All clicks are then given together.
    So they depend on the model. Random numbers do not: every model and strength has the same.
    """

    def __init__(self, model: SAM2Model, cell: Cell, *, bf16: bool = False):
        self.model, self.cell, self.bf16 = model, cell, bf16
        self.generator = PromptGenerator([cell.prompt], 0, include_center=True)

    def __call__(
        self, dataset: ClipDataset, video: Video, rng: np.random.Generator
    ) -> list[Prompt]:
        prompts = []
        for object_id, t, mask in first_views(dataset, video):
            # A stream for each object: the number of clicks must not move what comes after.
            own = np.random.default_rng(rng.integers(2**63))
            prompt = self.generator.generate(mask, own, object_id=object_id, frame_index=t)
            if self.cell.noise:
                prompt = type_of(prompt).move(prompt, mask, self.cell.noise, own)
            if self.cell.clicks > 1:
                self._correct(dataset, video, prompt, mask, own)
            prompts.append(prompt)
        return prompts

    def _correct(
        self,
        dataset: ClipDataset,
        video: Video,
        prompt: Prompt,
        mask: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        """Add clicks to a point prompt until the cell has its number or nothing is wrong."""
        box = mask_to_box(mask)
        for _ in range(self.cell.clicks - 1):
            predicted = segment_frame(self.model, dataset, video, prompt, bf16=self.bf16)
            click = next_click(mask, predicted)
            if click is None:
                return
            point = move_point(click[0], box, mask.shape, self.cell.noise, rng)
            prompt["points"] = np.concatenate([prompt["points"], point[None]])
            prompt["labels"] = np.append(prompt["labels"], np.int32(click[1]))


def prompt_matrix(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Score every prompt at every strength of noise. Returns the rows of prompt_matrix.csv."""
    if evaluation.fault:
        raise UserError(evaluation.fault)
    cells, rows, objects = all_cells(), [], []
    where = evaluation.data, evaluation.experiment, evaluation.split
    with evaluation.record() as summary:
        with evaluation.progress(len(cells) * len(evaluation.contenders)) as advance:
            for contender in evaluation.contenders:
                clean: dict[str, Scores] = {}
                for cell in cells:
                    draw = CellPrompts(contender.model, cell, bf16=evaluation.bf16)
                    watch = {"on_video": lambda *_, label=contender.label: advance(label)}
                    scores = score_contender(contender, *where, draw_prompts=draw, **watch)
                    clean.setdefault(cell.name, scores)
                    rows.append(_matrix_row(evaluation, cell, contender, scores, clean[cell.name]))
                    of_cell = {"clicks": cell.clicks, "noise": cell.noise}
                    objects += [row | of_cell for row in scores.objects]
        if not distributed.is_main():
            return rows
        write_rows(evaluation.folder.matrix, rows, MATRIX_COLUMNS)
        columns = (*SCORE_COLUMNS, "clicks", "noise")
        write_rows(evaluation.folder.matrix_objects, objects, columns)
        figure = evaluation.folder.matrix_figure
        with replacing(figure) as unfinished:
            _matrix_figure(evaluation, rows).savefig(unfinished, format="png", dpi=150)
        evaluation.runlog.report(evaluation.contenders[0].step, {"prompt_matrix": rows}, [figure])
        for contender in evaluation.contenders:
            part = [row for row in rows if row["model"] == contender.key]
            evaluation.console.print(matrix_table(contender.label, part))
            for row in part:
                kind = Cell(row["prompt"], row["clicks"], row["noise"]).name.replace(" ", "_")
                name = f"matrix/{contender.key}/{kind}/noise_{row['noise']}/J_and_F"
                summary[name] = row["J_and_F"]
    say(
        evaluation.console,
        "noise: how far a click, a corner or a mask's box is moved at most, as a share of the "
        "object's box; in brackets: change from clean, 95 % interval over videos",
    )
    evaluation.places("matrix", "matrix_objects", "matrix_figure")
    return rows


def _matrix_row(
    evaluation: Evaluation, cell: Cell, contender: Contender, scores: Scores, clean: Scores
) -> dict[str, Any]:
    row = {"step": contender.step, "split": evaluation.split, "model": contender.key}
    row |= {"prompt": cell.prompt, "clicks": cell.clicks, "noise": cell.noise}
    rules = evaluation.experiment.evaluation
    row |= scores.means | {"frame_policy": rules.frame_policy, "void": rules.void}
    row["memory_admission"] = rules.memory_admission.name
    apart = None if scores is clean else difference(clean, scores)
    told = apart is not None and apart.known  # no difference without its interval
    changes = (apart.value, apart.low, apart.high) if told else (None, None, None)
    return row | dict(zip(("change", "change_low", "change_high"), changes, strict=True))


def _matrix_figure(evaluation: Evaluation, rows: Sequence[dict[str, Any]]) -> Any:
    names = list(dict.fromkeys(cell.name for cell in all_cells()))
    panels = {}
    for contender in evaluation.contenders:
        values = [row["J_and_F"] for row in rows if row["model"] == contender.key]
        panels[contender.label] = [
            values[start : start + len(NOISE)] for start in range(0, len(values), len(NOISE))
        ]
    columns = [f"{noise:g}" if noise else "clean" for noise in NOISE]
    return matrix_figure(names, columns, panels, title=f"J&F on the {evaluation.split} videos")
