"""The gradient audit, and what is kept of a step that is not finite."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_coco
from rich.console import Console
from small_run import (
    CONFIG,
    assert_same,
    make_trainer,
    rows,
    small_experiments,
    weights,
)
from test_model import loss_of, make_clip, make_model

from sam2train import checkpoint
from sam2train import trainer as trainer_module
from sam2train.clips import collate_fn
from sam2train.errors import UserError
from sam2train.experiment import Experiment, build_model
from sam2train.export import export_checkpoint
from sam2train.pretrained import MEMORY
from sam2train.trainer_step import audit_gradients, has_tracked_frame, modules_without_gradient


def make_experiment(model, *, prompt="point", clip_length=3, **settings):
    """The experiment that trains such a model; it reads no file."""
    return Experiment.model_validate(
        {
            "dataset": {
                "data_path": "unread",
                "image_size": [64, 64],
                "video_clip_length": clip_length,
                "prompt_types": [prompt],
            },
            "model": {
                "image_size": 64,
                "trainable_modules": list(model.trainable_modules),
                "num_maskmem": model.num_maskmem,
                "max_obj_ptrs_in_encoder": model.max_obj_ptrs_in_encoder,
                "memory_gradient": model.memory_gradient,
                **settings,
            },
        }
    )


def test_counts_and_norms_by_hand():
    model = make_model(["obj_ptr_tpos_proj", "no_mem_embed"])
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    weight = model.sam2.obj_ptr_tpos_proj.weight  # its bias gets no gradient
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 0], weight.grad[1, 1] = 3, 4
    assert audit_gradients(model) == {
        "audit/obj_ptr_tpos_proj/tensors": 2,
        "audit/obj_ptr_tpos_proj/with_gradient": 1,
        "audit/obj_ptr_tpos_proj/norm": 5.0,
        "audit/no_mem_embed/tensors": 1,
        "audit/no_mem_embed/with_gradient": 0,
        "audit/no_mem_embed/norm": 0.0,
    }


@pytest.mark.parametrize(
    ("trainable", "settings", "num_frames", "reason"),
    [
        ("memory_encoder", {"memory_gradient": "detached"}, 3, "`detached`"),
        ("memory_encoder", {"num_maskmem": 0}, 3, "num_maskmem is 0"),
        ("memory_attention", {}, 1, "video_clip_length is 1"),
        ("obj_ptr_tpos_proj", {"max_obj_ptrs_in_encoder": 0}, 3, "no object pointers"),
        ("no_mem_pos_enc", {}, 3, "never reads it"),
        ("mask_downsample", {}, 3, "only mask prompts read it"),
    ],
)
def test_what_is_said_of_a_module_without_gradient(trainable, settings, num_frames, reason):
    model = make_model([trainable, "mask_decoder"], **settings)
    loss_of(model, make_clip(("point", 0), num_frames=num_frames)).backward()
    (found,) = modules_without_gradient(model, make_experiment(model, clip_length=num_frames))
    assert found.text.startswith(f"{trainable} got no gradient")
    assert reason in found.text
    assert not found.may_come


def test_a_parameter_that_another_prompt_reads_may_get_its_gradient_later():
    model = make_model(["no_mem_embed", "mask_decoder"])
    loss_of(model, make_clip(("mask", 0), num_frames=3)).backward()
    (found,) = modules_without_gradient(model, make_experiment(model, prompt="point"))
    assert "prompted by points or boxes" in found.text
    assert found.may_come
    (found,) = modules_without_gradient(model, make_experiment(model, prompt="mask"))
    assert not found.may_come


def test_nothing_is_said_of_modules_that_learn():
    model = make_model(["memory_attention", "memory_encoder", "obj_ptr_proj"])
    loss_of(model, make_clip(("point", 0), num_frames=3)).backward()
    assert modules_without_gradient(model, make_experiment(model)) == []


def test_a_batch_has_a_tracked_frame_where_one_follows_a_prompt():
    last, empty = make_clip(("point", 2), num_frames=3), make_clip(("empty", 0), num_frames=3)
    assert not has_tracked_frame(collate_fn([last, empty]))
    assert has_tracked_frame(collate_fn([last, make_clip(("mask", 1), num_frames=3)]))
    # Padding is no frame: the short clip ends with its prompt, whatever the long one does.
    short = make_clip(("point", 0), num_frames=1)
    assert not has_tracked_frame(collate_fn([short, last]))


# -- in a run


@pytest.fixture
def experiment(tmp_path):
    return small_experiments(tmp_path)


def test_a_listed_module_without_gradient_stops_the_run(experiment, tmp_path):
    settings = experiment(
        model={"memory_gradient": "detached"}, dataset={"prompt_types": ["point"]}
    )
    trainer = make_trainer(settings, tmp_path / "run")
    with pytest.raises(UserError, match=r"memory_encoder got no gradient.*memory_gradient"):
        trainer.run()


def test_a_run_may_be_told_to_go_on_without_a_gradient(experiment, tmp_path, monkeypatch):
    settings = experiment(
        model={"num_maskmem": 0, "trainable_modules": ["memory_attention", "mask_decoder"]},
        trainer={"audit": "warn", "num_steps": 1},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    before = {name: value.clone() for name, value in trainer.model.sam2.state_dict().items()}
    trainer.run()
    assert "memory_attention got no gradient" in "".join(said)
    after = trainer.model.sam2.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not value.equal(before[name])}
    assert changed == {"sam_mask_decoder"}


def test_the_audit_is_logged_at_step_one(experiment, tmp_path):
    make_trainer(experiment(), tmp_path / "run").run()
    audit = next(row for row in rows(tmp_path / "run") if "audit/memory_encoder/norm" in row)
    assert audit["step"] == 1
    assert (
        audit["audit/memory_encoder/with_gradient"] == audit["audit/memory_encoder/tensors"] == 40
    )
    assert audit["audit/memory_attention/norm"] > 0


def late_object(folder, num_videos, late):
    """Videos of three frames, in some of which the one object shows on the last frame only."""
    absent = [(video_id, t, 1) for video_id in late for t in (0, 1)]
    sizes = {"num_videos": num_videos, "num_frames": 3, "num_objects": 1, "size": (64, 64)}
    return str(make_coco(folder, absent=absent, **sizes))


def test_a_clip_without_anything_to_track_is_passed_over(experiment, tmp_path):
    """Its loss has no graph; the audit waits for a clip that says something."""
    data = late_object(tmp_path / "late", 2, late=[1])
    settings = experiment(
        dataset={"data_path": data, "val_path": None, "shuffle": False}, trainer={"num_steps": 3}
    )
    trainer = make_trainer(settings, tmp_path / "run")
    trainer.run()
    lines = rows(tmp_path / "run")
    learnt = [r["audit/batches_with_gradient"] for r in lines if "audit/batches_with_gradient" in r]
    assert learnt == [0, 1, 0]
    (audit,) = [row for row in lines if "audit/memory_encoder/norm" in row]
    assert audit["step"] == 2


def test_a_resumed_run_goes_on_waiting_for_the_audit(experiment, tmp_path):
    data = late_object(tmp_path / "late", 3, late=[1, 2])
    settings = {
        "dataset": {"data_path": data, "val_path": None, "shuffle": False},
        "model": {"memory_gradient": "detached"},
    }
    first = experiment(**settings, trainer={"num_steps": 2})
    make_trainer(first, tmp_path / "run").run()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    with pytest.raises(UserError, match="memory_encoder got no gradient"):
        make_trainer(experiment(**settings), tmp_path / "run", resume=last).run()


def test_data_without_anything_to_track_stop_the_run(experiment, tmp_path):
    data = late_object(tmp_path / "late", 2, late=[1, 2])
    settings = experiment(dataset={"data_path": data, "val_path": None})
    with pytest.raises(UserError, match="no frame after a prompt was there to learn from"):
        make_trainer(settings, tmp_path / "run").run()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": {"video_clip_length": 1}}, "dataset.video_clip_length is 1"),
        ({"model": {"num_maskmem": 0}}, "model.num_maskmem is 0"),
        (
            {"model": {"trainable_modules": ["obj_ptr_proj"], "max_obj_ptrs_in_encoder": 0}},
            "model.max_obj_ptrs_in_encoder is 0",
        ),
        ({"model": {"trainable_modules": ["no_mem_pos_enc"]}}, "SAM 2 never reads it"),
        (
            {"model": {"trainable_modules": ["no_obj_ptr"], "max_obj_ptrs_in_encoder": 0}},
            "model.max_obj_ptrs_in_encoder is 0",
        ),
        (
            {"model": {"trainable_modules": ["no_obj_embed_spatial"], "num_maskmem": 0}},
            "model.num_maskmem is 0",
        ),
        (
            {
                "model": {"trainable_modules": ["memory_attention", "mask_downsample"]},
                "dataset": {"prompt_types": ["point"]},
            },
            "mask_downsample got no gradient: only mask prompts read it",
        ),
        (
            {
                "model": {"trainable_modules": ["no_mem_embed"]},
                "dataset": {"prompt_types": ["mask"]},
            },
            "prompted by points or boxes read it",
        ),
    ],
)
def test_the_audit_says_why(experiment, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make_trainer(experiment(**changes), tmp_path / "run").run()
    assert "trainer.audit=warn" in str(caught.value)


def test_what_hangs_on_the_draw_is_a_warning(experiment, tmp_path, monkeypatch):
    """No mask prompt has come at the first step; later ones may bring one."""
    settings = experiment(
        model={"trainable_modules": ["memory_attention", "mask_downsample"]},
        dataset={"prompt_types": ["point", "mask"], "prompt_weights": [1e9, 1]},
        trainer={"num_steps": 1},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    trainer.run()
    assert "warning: model.trainable_modules: mask_downsample got no gradient" in "".join(said)


def said_by(trainer, monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    return said


def test_memory_trains_its_seven_parts_and_those_that_rest_are_no_error(
    experiment, tmp_path, monkeypatch
):
    settings = experiment(model={"trainable_modules": ["memory"]}, trainer={"num_steps": 1})
    trainer = make_trainer(settings, tmp_path / "run")
    with torch.no_grad():  # all objects are called visible: nothing reads the embeddings of absence
        trainer.model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 20
    said = said_by(trainer, monkeypatch)
    trainer.run()
    assert "got no gradient" not in "".join(said)
    written = weights(tmp_path / "run" / "checkpoints" / "last.pt")
    assert set(MEMORY) <= {name.split(".")[0] for name in written}


@pytest.mark.parametrize(
    ("model", "dead", "alive"),
    [
        ({"num_maskmem": 0}, ["memory_attention", "memory_encoder"], []),
        (
            {"memory_gradient": "detached"},
            ["memory_encoder", "obj_ptr_proj"],
            ["memory_attention", "maskmem_tpos_enc", "obj_ptr_tpos_proj"],
        ),
    ],
)
def test_memory_hides_no_dead_part(experiment, tmp_path, model, dead, alive):
    model = {"trainable_modules": ["memory", "mask_decoder"], **model}
    with pytest.raises(UserError) as caught:
        make_trainer(experiment(model=model), tmp_path / "run").run()
    for part in dead:
        assert f"{part} (of `memory`) got no gradient" in str(caught.value)
    for part in alive:
        assert f"{part} (of" not in str(caught.value)


def test_memory_without_pointers_is_a_warning(experiment, tmp_path, monkeypatch):
    """Nothing reads their projections then, and the experiment says so itself."""
    model = {"trainable_modules": ["memory"], "max_obj_ptrs_in_encoder": 0}
    trainer = make_trainer(experiment(model=model, trainer={"num_steps": 1}), tmp_path / "run")
    said = said_by(trainer, monkeypatch)
    trainer.run()
    text = "".join(said)
    for part in ("obj_ptr_proj", "obj_ptr_tpos_proj"):
        assert f"{part} (of `memory`) got no gradient: model.max_obj_ptrs_in_encoder is 0" in text


BASE_ROWS = {"num_maskmem": 4, "config_path": CONFIG, "image_size": 64}


@pytest.fixture
def base(experiment, tmp_path):
    """A base of four temporal rows that says that rows 1 and 2 were never trained."""
    model = build_model(experiment(model=BASE_ROWS))
    content = {"model": model.sam2.state_dict(), "untrained_rows": [1, 2]}
    torch.save(content, tmp_path / "base.pt")
    return str(tmp_path / "base.pt")


@pytest.mark.parametrize(
    ("modules", "num_maskmem", "length", "warned"),
    [
        (["memory_attention"], 4, 5, "of the base in rows 1 to 2,"),
        (["memory_encoder"], 3, 5, "of the base in row 1,"),
        (["memory_attention"], 2, 5, None),
        (
            ["memory_attention"],
            6,
            5,
            "of the base and copies of row 2 in rows 1 to 4,",
        ),
        (["memory"], 4, 5, None),
        (["*"], 6, 7, None),
        (["memory"], 4, 3, "of the base in rows 1 to 2,"),
        (["mask_decoder"], 4, 5, None),
    ],
)
def test_memories_with_untrained_rows_are_warned_of_once(
    experiment, tmp_path, monkeypatch, base, modules, num_maskmem, length, warned
):
    settings = experiment(
        model={
            "checkpoint_path": base,
            "num_maskmem": num_maskmem,
            "trainable_modules": modules,
        },
        dataset={"video_clip_length": length, "val_path": None},
        trainer={"num_steps": 2, "audit": "warn"},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = said_by(trainer, monkeypatch)
    trainer.run()
    found = [text for text in said if "maskmem_tpos_enc keeps" in text]
    assert len(found) == (warned is not None)
    if warned:
        assert f"warning: maskmem_tpos_enc keeps random values {warned} while" in found[0]
        assert ("`memory` in model.trainable_modules" in found[0]) == (modules != ["memory"])


def test_a_base_that_says_nothing_is_warned_of_where_the_memory_grew(
    experiment, tmp_path, monkeypatch
):
    base = tmp_path / "base.pt"
    torch.save({"model": build_model(experiment(model=BASE_ROWS)).sam2.state_dict()}, base)
    for num_maskmem, warned in ((4, 0), (3, 0), (6, 1)):
        model = {"checkpoint_path": str(base), "num_maskmem": num_maskmem}
        settings = experiment(model=model, trainer={"num_steps": 0}, dataset={"val_path": None})
        trainer = make_trainer(settings, tmp_path / f"run_{num_maskmem}")
        said = said_by(trainer, monkeypatch)
        trainer.run()
        assert "".join(said).count("keeps copies of row 2 in rows 3 to 4,") == warned


@pytest.mark.parametrize(
    ("modules", "length", "steps", "left"),
    [
        (["memory_attention"], 5, 2, [1, 2]),
        (["memory"], 5, 2, []),
        (["memory"], 4, 2, [2]),
        (["memory"], 5, 0, [1, 2]),
    ],
)
def test_checkpoints_and_exports_say_which_rows_are_untrained(
    experiment, tmp_path, base, modules, length, steps, left
):
    settings = experiment(
        model={"checkpoint_path": base, "num_maskmem": 4, "trainable_modules": modules},
        dataset={"video_clip_length": length, "val_path": None},
        trainer={"num_steps": steps},
    )
    make_trainer(settings, tmp_path / "run").run()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["untrained_rows"] == left
    quiet = Console(quiet=True)
    export_checkpoint(settings, last, tmp_path / "out.pt", half=False, console=quiet)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written.get("untrained_rows", []) == left
    # And as the base of another run.
    model = {"checkpoint_path": str(tmp_path / "out.pt"), "num_maskmem": 4}
    assert list(build_model(experiment(model=model)).untrained_rows) == left

    # A checkpoint from before it said so: frozen rows are those of the base.
    content = checkpoint.load(last)
    del content["untrained_rows"]
    checkpoint.save(last, content)
    export_checkpoint(settings, last, tmp_path / "old.pt", half=False, console=quiet)
    written = torch.load(tmp_path / "old.pt", weights_only=True)
    assert written.get("untrained_rows", []) == ([] if modules == ["memory"] else left)


def test_a_resumed_run_remembers_which_rows_it_has_trained(experiment, tmp_path, base):
    model = {"checkpoint_path": base, "num_maskmem": 4, "trainable_modules": ["memory"]}
    build = partial(experiment, model=model, dataset={"video_clip_length": 5, "val_path": None})
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    make_trainer(build(trainer={"num_steps": 2}), tmp_path / "run").run()
    make_trainer(build(trainer={"num_steps": 2}), tmp_path / "run", resume=last).run()
    assert checkpoint.load(last)["untrained_rows"] == []


def test_a_loss_that_is_not_finite_stops_before_the_weights(experiment, tmp_path):
    trainer = make_trainer(experiment(), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.sam2.state_dict().items()}
    clip = replace(trainer.train_data[0], image_keys=None)
    clip.images[:, :, 10, 10] = float("nan")
    trainer.batches = lambda: iter([collate_fn([clip])])
    with pytest.raises(FloatingPointError, match=r"step 1: .*not finite.* video 1 frames \d\.\.\d"):
        trainer.run()
    assert_same(before, trainer.model.sam2.state_dict())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


def spoil_parameter(trainer, clip, monkeypatch):
    next(iter(trainer.parameters.values())).data[0] = float("nan")
    return next(iter(trainer.parameters))


def spoil_input(trainer, clip, monkeypatch):
    clip.images[:, :, 10, 10] = float("inf")
    return "the input, the frames of video 1"


def spoil_loss(trainer, clip, monkeypatch):
    """What it is computed from is finite: the term alone is not."""
    computed = trainer_module.sum_losses

    def with_a_bad_term(*arguments):
        sums = computed(*arguments)
        return {**sums, "loss/dice": sums["loss/dice"] * float("nan")}

    monkeypatch.setattr(trainer_module, "sum_losses", with_a_bad_term)
    return "the loss loss/dice, nan"


def spoil_gradient(trainer, clip, monkeypatch):
    """The loss is finite, and a gradient overflows on its way back."""
    name, parameter = list(trainer.parameters.items())[3]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    return f"the gradient of {name}, "


@pytest.mark.parametrize("spoil", [spoil_parameter, spoil_input, spoil_loss, spoil_gradient])
def test_a_step_that_is_not_finite_is_kept(experiment, tmp_path, monkeypatch, spoil):
    """With what was bad first; the run goes on from the step before, bit for bit."""
    settings = experiment(trainer={"save_every": 100, "val_every": 100}, dataset={"shuffle": False})
    whole = make_trainer(settings, tmp_path / "whole")
    whole.run()
    trainer = make_trainer(settings, tmp_path / "run")
    step = trainer.train_step

    def third_is_bad(batches):
        if trainer.step != 2:
            return step(batches)
        found.append({n: p.detach().clone() for n, p in trainer.parameters.items()})
        # It is spoilt after it got its keys.
        clip = replace(trainer.train_data[0], image_keys=None)
        expected.append(spoil(trainer, clip, monkeypatch))
        return step(iter([collate_fn([clip])]))

    found, expected = [], []
    trainer.train_step = third_is_bad
    with pytest.raises(FloatingPointError, match="The first bad value") as caught:
        trainer.run()
    assert expected[0] in str(caught.value)
    kept = torch.load(tmp_path / "run" / "bad_batch_3.pt", weights_only=True)
    assert expected[0] in kept["first_bad"]
    assert kept["step"] == 3
    assert kept["clips"][0].startswith("video 1 frames")
    assert kept["batches"][0]["images"].shape == (3, 1, 3, 64, 64)
    assert {"loss/dice", "loss/focal"} <= kept["losses"].keys()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["step"] == 2
    monkeypatch.undo()
    if spoil is not spoil_parameter:
        make_trainer(settings, tmp_path / "run", resume=last).run()
        assert_same(weights(last), weights(tmp_path / "whole" / "checkpoints" / "last.pt"))
