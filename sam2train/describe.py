"""`--dry-run`: what an experiment would do, shown without a step of training."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from sam2train.audit import row_warnings
from sam2train.build import build_model
from sam2train.clips import collate_fn
from sam2train.config import to_yaml
from sam2train.data_report import batch_table, data_table
from sam2train.datasets import build_dataset
from sam2train.experiment import Experiment
from sam2train.machine import say
from sam2train.tracking import parameter_table


def describe(experiment: Experiment, console: Console) -> None:
    """Print the resolved config, the data, the parameters and the first batch."""
    say(console, to_yaml(experiment))
    paths = {
        "training": experiment.dataset.data_path,
        "validation": experiment.dataset.val_path,
        "test": experiment.dataset.test_path,
    }

    warn = partial(say, console)
    sections = experiment.dataset, experiment.augment, experiment.clips_seed
    datasets = {
        split: build_dataset(*sections, path, training=split == "training", say=warn)
        for split, path in paths.items()
        if path is not None
    }
    console.print(data_table(datasets))
    model = build_model(experiment)
    console.print(parameter_table(model.parameter_report()))
    for text in row_warnings(model, experiment):
        warn(f"warning: {text}")
    data = datasets["training"]
    batch_size = experiment.dataset.batch_size
    batch = collate_fn([data[0, i % len(data)] for i in range(batch_size)])
    console.print(batch_table(batch))
