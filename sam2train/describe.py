"""`--dry-run`: what an experiment would do, shown without a step of training."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sam2train.audit import row_warnings
from sam2train.build import build_dataset, build_model
from sam2train.clips import BatchedVideoDatapoint, collate_fn
from sam2train.config import to_yaml
from sam2train.datasets import VideoDataset
from sam2train.experiment import Experiment
from sam2train.sampling import AnnotatedVideos
from sam2train.tracking import parameter_table


def describe(experiment: Experiment, console: Console) -> None:
    """Print the resolved config, the data, the parameters and the first batch."""
    console.print(to_yaml(experiment), markup=False, highlight=False)
    paths = {
        "training": experiment.dataset.data_path,
        "validation": experiment.dataset.val_path,
        "test": experiment.dataset.test_path,
    }

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    datasets = {
        split: build_dataset(experiment, path, training=split == "training", say=say)
        for split, path in paths.items()
        if path is not None
    }
    console.print(data_table(datasets))
    model = build_model(experiment)
    console.print(parameter_table(model.parameter_report()))
    for text in row_warnings(model, experiment):
        say(f"warning: {text}")
    data = datasets["training"]
    batch_size = experiment.dataset.batch_size
    batch = collate_fn([data[0, i % len(data)] for i in range(batch_size)])
    console.print(batch_table(batch))


def data_table(datasets: dict[str, AnnotatedVideos | VideoDataset]) -> Table:
    table = Table(title="Data", title_justify="left")
    table.add_column("split")
    for heading in ("videos", "frames", "objects", "masks", "frame sizes (H, W)"):
        table.add_column(heading, justify="right")
    for split, dataset in datasets.items():
        videos = dataset.videos
        sizes = sorted({video.size for video in videos})
        masks = sum(len(video.visible(t)) for video in videos for t in range(len(video.frames)))
        table.add_row(
            split,
            f"{len(videos):,}",
            f"{sum(len(video.frames) for video in videos):,}",
            f"{sum(len(video.object_ids) for video in videos):,}",
            "made up" if isinstance(dataset, VideoDataset) else f"{masks:,}",
            ", ".join(map(str, sizes[:3])) + (f" and {len(sizes) - 3} more" if sizes[3:] else ""),
        )
    return table


def batch_table(batch: BatchedVideoDatapoint) -> Table:
    table = Table("field", "value", title="First batch", title_justify="left")
    for name in ("img_batch", "masks", "images", "object_masks", "frame_valid", "object_valid"):
        value = getattr(batch, name)
        table.add_row(name, f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    for clip, prompts in zip(batch.names, batch.prompts, strict=True):
        for prompt in prompts:
            table.add_row(
                clip,
                f"object {prompt['object_id']}: {prompt['type']} on frame {prompt['frame_index']}"
                f" {prompt['points'].round(1).tolist() or ''}",
            )
    return table
