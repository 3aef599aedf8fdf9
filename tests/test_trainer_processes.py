"""Several processes train, score and go on as one."""

# ruff: noqa: F811

import pytest
import torch
from test_distributed import settings, together  # noqa: F401
from test_trainer import experiment, make_trainer, rows, weights  # noqa: F401

from sam2train import distributed
from sam2train.data_loader import load_batches
from sam2train.errors import UserError

# Of the largest of a tensor's changes over 5 steps: 3e-4 was measured. Sums in another order round
# differently, and AdamW makes a step of full size of the smallest gradient.
BOUND = 2e-3


def train(settings, run_dir, resume=None):
    run = make_trainer(settings, run_dir, resume=resume)
    run.run()
    return {name for name, p in run.parameters.items() if p not in run.optimizer.state}


@pytest.mark.parametrize(("count", "num_batches", "num_clicks"), [(2, 2, 0), (3, 1, 2)])
def test_weights_are_those_of_one_process_with_the_joint_batch(
    tmp_path, settings, count, num_batches, num_clicks
):
    clicks = {"interaction": {"num_correction_pt_per_frame": num_clicks}}
    run = make_trainer(settings(1), tmp_path / "began")
    began = {name: p.detach() for name, p in run.parameters.items()}
    alone = train(settings(count, num_batches, **clicks), tmp_path / "alone")
    found = together(count, train, settings(1, num_batches, **clicks), tmp_path / "together")
    assert found == [alone] * count  # the same parameters never got a gradient
    assert "no_mem_pos_enc" in alone
    one = weights(tmp_path / "alone" / "checkpoints" / "last.pt")
    several = weights(tmp_path / "together" / "checkpoints" / "last.pt")
    assert one.keys() == several.keys()
    for name, start in began.items():
        change, apart = (one[name] - start).abs().max(), (one[name] - several[name]).abs().max()
        assert apart <= BOUND * change, name
        assert (name in alone) == (change == 0)
    for single, joint in zip(*map(rows, (tmp_path / "alone", tmp_path / "together")), strict=True):
        timed = {"seconds", "clips_per_second", "memory_gb", "features/hit_rate"}
        assert single.keys() == joint.keys()
        for name in single.keys() - timed:
            assert joint[name] == pytest.approx(single[name], rel=1e-3, abs=1e-4), name


def test_validation_rows_are_those_of_one_process(tmp_path, experiment):
    settings = experiment(
        trainer={"num_steps": 0}, evaluation={"max_videos": None, "num_overlays": 1}
    )
    train(settings, tmp_path / "alone")
    together(2, train, settings, tmp_path / "together")
    for name in ("scores.csv", "horizon.csv"):
        assert (tmp_path / "together" / name).read_text() == (tmp_path / "alone" / name).read_text()
    assert len((tmp_path / "alone" / "scores.csv").read_text().splitlines()) > 6
    folders = [tmp_path / name / "overlays" for name in ("alone", "together")]
    alone, several = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert alone == several


def draw_clips(settings, run_dir, resume=None):
    """The clips of each step of a run that learns nothing."""
    run = make_trainer(settings, run_dir, resume=resume)
    seen = []

    def step(batches):
        collected = run._next_batches(batches)
        seen.append([name for batch in collected for name in batch.names])
        return {"loss": torch.tensor(0.0)}

    run.train_step = step
    run.run()
    return seen


def test_a_run_goes_on_with_other_numbers_of_processes_in_the_same_order(tmp_path, settings):
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    steps = []
    for count, num_batches, num_steps in ((2, 3, 1), (1, 6, 2), (3, 2, 3)):
        config = settings(2, num_batches, trainer={"num_steps": num_steps})
        found = together(count, draw_clips, config, tmp_path / "run", last if steps else None)
        assert all(len(of_process) == 1 for of_process in found), found
        pairs = [zip(part[0][::2], part[0][1::2], strict=True) for part in found]
        batches = [pair for place in zip(*pairs, strict=True) for pair in place]
        steps.append([name for pair in batches for name in pair])
    data = make_trainer(settings(1), tmp_path / "other").train_data
    stream = load_batches(data, settings(1).dataset, 0, start=0, pin_memory=False)
    expected = [next(stream).names[0] for _ in range(36)]
    assert [name for step in steps for name in step] == expected
    content = torch.load(last, weights_only=True)
    assert (content["clips"], content["clips_per_step"]) == (36, 12)
    assert len(content["rng"]["of_others"]) == 2
    # Other settings may not make another number of clips; another number of processes is told.
    with pytest.raises(UserError, match="a step had 12 clips until now, and has 10 from here"):
        make_trainer(settings(2, 5), tmp_path / "run", resume=last)
    run = make_trainer(settings(2, 2), tmp_path / "run", resume=last)
    assert "a step had 12 clips until now, and has 4 from here" in run._warnings[0]
    assert run.num_clips == 36


def break_one(settings, run_dir):
    run = make_trainer(settings, run_dir)
    if distributed.rank() == 1:
        real = run._next_batches

        def damaged(batches):
            (batch,) = real(batches)
            if run.step == 1:
                batch.masks[:] = True
                run.model.sam2.maskmem_tpos_enc.data.fill_(torch.nan)
            return [batch]

        run._next_batches = damaged
    run.run()


def test_the_clips_of_a_bad_step_are_kept_from_all_processes(tmp_path, settings):
    first, second = together(2, break_one, settings(1), tmp_path / "run")
    assert isinstance(first, FloatingPointError), first
    assert "is not finite, on video" in str(first)
    assert isinstance(second, SystemExit)
    assert second.code == 1
    content = torch.load(tmp_path / "run" / "bad_batch_2.pt", weights_only=True)
    assert len(content["clips"]) == 2
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 1
