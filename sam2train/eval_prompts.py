"""`--prompt-matrix`: a checkpoint with each prompt type, clean and moved, and 1, 3 and 5 clicks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sam2train import distributed
from sam2train.clips import Prompt, boundary_distance
from sam2train.data_clips import ClipDataset
from sam2train.data_source import Video
from sam2train.eval_checkpoint import MEANS, Contender, Evaluation, score_contender
from sam2train.evaluate import first_views
from sam2train.files import replacing, write_rows
from sam2train.machine import cell as table_cell
from sam2train.machine import say
from sam2train.memory import track_clip
from sam2train.model import SAM2Model
from sam2train.prompts import PROMPTS, PromptGenerator, mask_to_box, move_point, type_of
from sam2train.score_pictures import matrix_figure
from sam2train.scores import SCORE_COLUMNS, Scores, difference
from sam2train.transforms import image_keys, normalise

MATRIX_COLUMNS = (
    *("step", "split", "model", "prompt", "clicks", "noise"),
    *MEANS,
    *("num_objects", "num_not_scored", "frame_policy", "void"),
    # J&F minus that of the same prompt without noise, with its interval over videos
    *("change", "change_low", "change_high"),
)


CLICKS = (1, 3, 5)
NOISE = (0.0, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Cell:
    """One kind of prompt at one strength of noise."""

    prompt: str  # a name of `PROMPTS`
    clicks: int  # of a prompt that is clicked; 0 for the others
    # The share of the sides of the object's box by which a click or a corner is moved at most,
    # uniformly; a mask is stretched as its box is. 0 is clean.
    noise: float

    @property
    def name(self) -> str:
        return f"{self.clicks} click{'s' * (self.clicks > 1)}" if self.clicks else self.prompt


def all_cells() -> list[Cell]:
    """Row by row, a prompt type with so many clicks each; the clean one first."""
    return [
        Cell(name, clicks, noise)
        for name, kind in PROMPTS.items()
        for clicks in (CLICKS if kind.is_clicked else (0,))
        for noise in NOISE
    ]


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


@torch.inference_mode()
def segment_frame(
    model: SAM2Model, dataset: ClipDataset, video: Video, prompt: Prompt, *, bf16: bool = False
) -> np.ndarray:
    """(H, W) bool at the model's input size: its answer on the prompted frame."""
    was_training = model.training
    model.eval()
    try:
        t = prompt["frame_index"]
        frame = dataset.read_frame(video, t, dataset.image_size)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            features = model.encode_images(normalise(frame[None]), image_keys(frame[None]))
            # A video that ends on the prompted frame.
            (output,) = track_clip(model.sam2, lambda _: features, t + 1, {t: [prompt]})
        return (output.mask_logits[0] > 0).cpu().numpy()
    finally:
        model.train(was_training)


def next_click(mask: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, int] | None:
    """(2,) float32 (x, y) and label: the pixel deepest inside an error; None if there is none.

    1 where the object is missed, 0 where the prediction has something else, as SAM 2's
    `sample_one_point_from_error_center` decides. Masks are (H, W) bool.
    """
    if np.array_equal(mask, predicted):
        return None
    missed, wrong = boundary_distance(mask & ~predicted), boundary_distance(predicted & ~mask)
    label = int(missed.max() > wrong.max())
    y, x = np.unravel_index(np.argmax(missed if label else wrong), mask.shape)
    return np.array([x, y], np.float32), label


def prompt_matrix(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Score every prompt at every strength of noise. Returns the rows of prompt_matrix.csv."""
    cells, rows, objects = all_cells(), [], []
    with evaluation.record() as summary:
        with evaluation.progress(len(cells) * len(evaluation.contenders)) as advance:
            for contender in evaluation.contenders:
                clean: dict[str, Scores] = {}
                for cell in cells:
                    draw = CellPrompts(contender.model, cell, bf16=evaluation.bf16)
                    scores = score_contender(
                        contender,
                        evaluation.data,
                        evaluation.experiment,
                        evaluation.split,
                        draw_prompts=draw,
                        on_video=lambda *_, label=contender.label: advance(label),
                    )
                    clean.setdefault(cell.name, scores)
                    rows.append(_matrix_row(evaluation, cell, contender, scores, clean[cell.name]))
                    objects += [
                        {**row, "clicks": cell.clicks, "noise": cell.noise}
                        for row in scores.objects
                    ]
        if not distributed.is_main():
            return rows
        write_rows(evaluation.folder.matrix, rows, MATRIX_COLUMNS)
        columns = (*SCORE_COLUMNS, "clicks", "noise")
        write_rows(evaluation.folder.matrix_objects, objects, columns)
        figure = evaluation.folder.matrix_figure
        with replacing(figure) as unfinished:
            _matrix_figure(evaluation, rows).savefig(unfinished, format="png", dpi=150)
        evaluation.runlog.report(evaluation.contenders[0].step, {"prompt_matrix": rows}, [figure])
        first = {c.key: c.label for c in evaluation.contenders}
        for key, label in first.items():
            part = [row for row in rows if row["model"] == key]
            evaluation.console.print(matrix_table(label, part))
            for row in part:
                kind = Cell(row["prompt"], row["clicks"], row["noise"]).name.replace(" ", "_")
                name = f"matrix/{key}/{kind}/noise_{row['noise']}/J_and_F"
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


def matrix_table(label: str, rows: Sequence[dict[str, Any]]) -> Table:
    """J&F of each prompt at each strength of noise, and the change from clean with its interval."""
    table = Table("prompt", title=table_cell(f"J&F: {label}", "table.title"), title_justify="left")
    for noise in NOISE:
        table.add_column(f"noise {noise:g}" if noise else "clean", justify="right")
    lines: dict[str, list[str]] = {}
    for row in rows:
        text = f"{row['J_and_F']:.3f}"
        if row["change"] is not None:
            text += f" ({row['change']:+.3f} [{row['change_low']:+.3f}, {row['change_high']:+.3f}])"
        lines.setdefault(Cell(row["prompt"], row["clicks"], 0.0).name, []).append(text)
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table
