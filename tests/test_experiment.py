"""Sections together: rules that cross them, spellings, errors a user can act on."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from guide_blocks import COCO, MODEL

from sam2train import machine
from sam2train.config import to_yaml
from sam2train.errors import UserError
from sam2train.experiment import (
    Experiment,
    as_begun,
    load_experiment,
    prepare_experiment,
    settings_of_section,
    settings_page,
    settings_schema,
    untrained_rows,
)
from sam2train.files import REPOSITORY
from sam2train.trainer_step import bf16_note


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


def test_the_blocks_of_the_guide_load_unchanged(write):
    experiment = load_experiment(write(COCO + MODEL))
    assert experiment.dataset.include_center is True
    assert experiment.dataset.prompt_types == ("point", "bbox")
    assert experiment.model.trainable_modules == ("memory_attention", "memory_encoder")
    assert experiment.model.num_maskmem == 7


def test_both_spellings_of_include_center(write):
    path = write("dataset: {data_path: a.json, include_center: true}")
    assert load_experiment(path).dataset.include_center is True


def test_a_resolved_config_reads_back_as_itself(write):
    experiment = load_experiment(
        write("dataset: {data_path: a.json}\nmodel: {memory_gradient: 3}"),
        {"optimizer.learning_rate": "1e-05", "optimizer.learning_rates.memory_encoder": 2e-6},
    )
    assert experiment.optimizer.learning_rate == 1e-5
    assert load_experiment(write(to_yaml(experiment))) == experiment


def test_sizes_must_agree_and_the_message_gives_the_cure(write):
    path = write("dataset: {data_path: a.json, image_size: [256, 256]}")
    with pytest.raises(
        UserError, match=r"\[256, 256\].*512.*set dataset.image_size to \[512, 512\]"
    ):
        load_experiment(path)


def test_all_problems_come_in_one_message(write):
    path = write(
        "dataset: {data_path: a.json, num_worker: 2, prompt_types: [point, box]}\n"
        "trainer: {num_steps: -1, sed: 3}\n"
    )
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    for part in (
        str(path),
        "dataset.num_worker",
        "dataset.num_workers",
        "box",
        "trainer.num_steps",
    ):
        assert part in str(caught.value)
    assert "trainer.sed" in str(caught.value)
    assert "trainer.seed" in str(caught.value)


def test_one_seed_for_weights_and_clips_and_a_fixed_one_for_the_prompts_of_evaluation(write):
    def seeds(text=""):
        found = load_experiment(write("dataset: {data_path: a.json}\ntrainer: {seed: 5}\n" + text))
        return found.weights_seed, found.clips_seed, found.prompts_seed

    assert seeds() == (5, 5, 0)
    assert seeds("model: {seed: 0}") == (0, 5, 0)
    assert seeds("evaluation: {seed: 7}") == (5, 5, 7)
    assert seeds("evaluation: {seed: null}") == (5, 5, 5)
    apart = load_experiment(write("dataset: {data_path: a.json, seed: 0}\ntrainer: {seed: 5}"))
    assert (apart.weights_seed, apart.clips_seed, apart.prompts_seed) == (5, 0, 0)
    for key in ("dataset.seed", "model.seed", "evaluation.seed", "trainer.seed"):
        with pytest.raises(UserError, match=rf"{key}: got -1"):
            load_experiment(write("dataset: {data_path: a.json}"), {key: -1})


def test_a_run_from_before_the_seed_of_prompts_keeps_its_own(write):
    old = {"trainer": {"seed": 5}, "evaluation": {"max_videos": 1}}
    today = load_experiment(write("dataset: {data_path: a.json}\ntrainer: {seed: 5}"))
    assert as_begun(today, old).evaluation.seed is None
    assert as_begun(today, {"trainer": {"seed": 5}}).prompts_seed == 5
    assert as_begun(today, {"evaluation": {"seed": 0}}) is today
    named = load_experiment(write("dataset: {data_path: a.json}\nevaluation: {seed: 0}"))
    assert as_begun(named, old) is named


def test_data_path_is_required(write):
    with pytest.raises(UserError, match=r"dataset\.data_path"):
        load_experiment(write("dataset: {batch_size: 2}"))


def with_rows(clip_length, num_maskmem, *modules) -> Experiment:
    sections = {"dataset": {"data_path": "a.json", "video_clip_length": clip_length}}
    sections["model"] = {"num_maskmem": num_maskmem, "trainable_modules": modules}
    return Experiment.model_validate(sections)


@pytest.mark.parametrize(
    ("clip_length", "num_maskmem", "rows"),
    # A clip of 4 uses rows 0 and 1, and the last; one of 8 all seven (measured on SAM 2).
    [
        *[(4, 7, [2, 3, 4, 5]), (8, 7, []), (2, 7, [0, 1, 2, 3, 4, 5]), (5, 1, []), (3, 0, [])],
        *[(1, 7, [0, 1, 2, 3, 4, 5, 6]), (1, 1, [0]), (9, 7, []), (8, 9, [6, 7])],
    ],
)
def test_rows_that_no_clip_reaches(clip_length, num_maskmem, rows):
    assert untrained_rows(with_rows(clip_length, num_maskmem, "memory")) == rows


@pytest.mark.parametrize(
    ("modules", "trained"),
    [
        (["memory_attention", "memory_encoder"], False),
        (["mask_decoder", "no_obj_ptr"], False),
        ([], False),
        (["maskmem_tpos_enc"], True),
        (["memory_attention", "maskmem_*"], True),
        (["memory"], True),
        (["*"], True),
    ],
)
def test_frozen_rows_are_not_trained_however_long_the_clips(modules, trained):
    assert untrained_rows(with_rows(8, 7, *modules)) == ([] if trained else [*range(7)])


class TestSettings:
    """What is written about the settings follows from the code."""

    def test_the_files_are_those_of_this_code(self):
        again = "run `python run.py --settings --write`"
        folder = REPOSITORY / "experiments"
        assert (folder / "SETTINGS.md").read_text() == settings_page(), again
        assert (folder / "settings.schema.json").read_text() == settings_schema(), again

    def test_each_key_has_its_type_default_and_meaning(self):
        rows = {
            row[0]: row[1:] for name in Experiment.model_fields for row in settings_of_section(name)
        }
        assert all(len(meaning) > 3 for _, _, meaning in rows.values())
        taken, default, _ = rows["trainer.max_grad_norm"]
        assert (taken, default) == ("a number above 0", "0.1")
        assert rows["dataset.prompt_types"][1] == "[point, bbox, mask]"
        assert rows["tracking.mode"][1] == "null"
        with pytest.raises(UserError, match="--settings optimzer: expected one of dataset, "):
            settings_of_section("optimzer")

    def test_an_editor_accepts_what_the_program_does_and_marks_what_is_wrong(self):
        validator = pytest.importorskip("jsonschema").Draft202012Validator(
            json.loads(settings_schema())
        )
        for path in (REPOSITORY / "experiments").glob("*.yaml"):
            assert validator.is_valid(yaml.safe_load(path.read_text())), path
        wrong = [
            {"dataset": {"data_path": "a", "batch_sise": 1}},
            {"dataset": {"data_path": "a", "prompt_types": ["boxes"]}},
            {"dataset": {"data_path": "a"}, "trainer": {"max_grad_norm": 0}},
            {"dataset": {"data_path": "a"}, "model": {"memory_gradient": "some"}},
            {"dataset": {}},
        ]
        assert not any(map(validator.is_valid, wrong))


def test_smoke_shrinks_what_takes_memory():
    """The official recipe too; what the command line names stays."""
    path = REPOSITORY / "experiments" / "official_recipe_base_plus.yaml"
    small = prepare_experiment(path, {}, smoke=True)
    assert small.model.image_size == 256
    assert small.dataset.image_size == (256, 256)
    assert (small.dataset.video_clip_length, small.dataset.max_objects) == (4, 2)
    assert small.interaction.num_correction_pt_per_frame == 1
    assert small.trainer.num_steps == 2
    named = {"model.image_size": 512, "dataset.image_size": [512, 512]}
    named |= {"dataset.max_objects": 5, "trainer.num_steps": 7}
    kept = prepare_experiment(path, named, smoke=True)
    assert (kept.model.image_size, kept.dataset.max_objects) == (512, 5)
    assert (kept.trainer.num_steps, kept.dataset.video_clip_length) == (7, 4)
    demo = REPOSITORY / "experiments" / "coco_point_bbox.yaml"
    assert prepare_experiment(demo, {}, smoke=True).model.image_size == 128  # never more


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ("flags : fpu avx512_bf16", {}, True),
        ("flags : fpu amx_bf16", {}, True),
        ("flags : fpu avx512f", {}, False),
        ("flags : fpu amx_bf16", {"trainer.bf16": False}, False),
        (
            "flags : fpu amx_bf16",
            {"model.image_size": 128, "dataset.image_size": [128, 128]},
            False,
        ),
    ],
)
def test_bf16_is_recommended_where_it_was_measured(
    write, tmp_path, monkeypatch, flags, changes, expected
):
    experiment = load_experiment(write("dataset: {data_path: a.json}"), changes)
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "cpuinfo")
    assert bool(bf16_note(experiment, torch.device("cpu"))) == expected
    assert bf16_note(experiment, torch.device("cuda")) is None
