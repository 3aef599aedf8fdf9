"""The tool that measures speeds: what it compares is the same, what it counts is right."""

import json
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_coco
from tensors import peak_of_tensors

from sam2train import speed, speed_clock, speed_data, speed_step
from sam2train.errors import MachineFault, UserError
from sam2train.files import REPOSITORY
from sam2train.runlog import RunLog
from sam2train.speed_clock import Mismatch
from sam2train.sweep_file import grid, load_sweep

for needed in ("tensordict", "fvcore", "submitit", "tensorboard"):
    pytest.importorskip(needed)

CPU = torch.device("cpu")
DEMO = str(REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml")
SMALL = speed_step.StepSize(2, DEMO, 64, 3)


def tiny_gemms(device):
    """Matrices that take no time."""
    return {
        f"GEMM {name}": lambda: torch.rand(8, 8) @ torch.rand(8, 8)
        for name in ("float32", "bfloat16")
    }


@pytest.fixture(autouse=True)
def no_large_matrices(monkeypatch):
    monkeypatch.setattr(speed_step, "gemms", tiny_gemms)


def test_variants_run_in_turn_after_a_round_that_does_not_count():
    order = []
    runs = {name: partial(order.append, name) for name in "abc"}
    seconds = speed_clock.alternate(runs, 2, CPU)
    assert order == list("abcabcabc")
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    runs = {"slow": lambda: time.sleep(0.05), "fast": lambda: None}
    seconds = speed_clock.alternate(runs, 1, CPU, warm_up=False)
    assert seconds["slow"][0] >= 0.05 > seconds["fast"][0]


def test_a_ratio_says_how_many_times_the_other_is_ours():
    row = speed_clock.Row("step", "a step", "somewhere", 2.0, 5.0, "s")
    assert row.as_json()["ratio"] == row.ratio == 2.5
    assert "5.00 s, 2.50 times ours" in speed._line(row)


def test_operations_of_products_and_of_fused_attention_forward_and_backward():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert speed_clock.count_operations(lambda: a @ b) == 2 * 3 * 5 * 7
    query = torch.rand(1, 2, 64, 16, requires_grad=True)
    key, value = (torch.rand(1, 2, 96, 16, requires_grad=True) for _ in range(2))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    product = 2 * 2 * 64 * 96 * 16  # over two heads
    assert speed_clock.count_operations(attend) == 2 * product
    # Backward: the scores again, and four products of gradients.
    assert speed_clock.count_operations(lambda: attend().sum().backward()) == (2 + 5) * product


def test_the_rate_of_a_machine_is_operations_by_the_median_second():
    seconds = {"GEMM float32": [0.5, 0.1, 0.2], "something": [1.0]}
    assert speed_clock.gemm_rates(seconds, CPU) == {"float32": 2 * 2048**3 / 0.2}


def test_a_process_of_its_own_has_the_peak_of_a_run(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))
    assert 200e6 <= speed_clock.in_process(peak_of_tensors, 200) < 215e6
    with pytest.raises(MachineFault, match=r"a process that measures has failed: TypeError"):
        speed_clock.in_process(json.loads)


def test_steps_of_both_are_compared_on_the_same_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_step, "has_fast_bf16", lambda device: True)
    plain, cached, recomputed, bf16 = rows = speed_step.measure_steps(
        CPU, tmp_path, [SMALL], rounds=1
    )
    assert plain.what == "step, no cache, dropout as SAM 2's"
    assert bf16.what == f"{cached.what}, bf16" == "step, features cached, no dropout, bf16"
    for row in rows:
        assert row.ours > 0
        assert row.other == rows[0].other > 0
        assert row.details["loss"] > 1
    ours, theirs = plain.details["operations"], plain.details["other"]["operations"]
    # The memory of the last frame, which nobody reads, is encoded by SAM 2 only.
    assert 0.8 * theirs < ours <= theirs
    with torch.no_grad():
        batch = speed_step.make_batch(SMALL)
        model = speed_step.build_ours(DEMO, 64, CPU)
        encoder = speed_clock.count_operations(lambda: model.encode_images(batch.flat_img_batch))
    assert ours - cached.details["operations"] == pytest.approx(encoder, rel=0.01)
    assert recomputed.details["operations"] > 1.2 * cached.details["operations"]
    line = speed._line(rows[0])
    assert "sam2.1_hiera_demo, 64 px, T = 3, 2 objects" in line
    assert "GFLOP" in line


def test_no_comparison_of_different_losses(tmp_path):
    ours, theirs = speed_step.OurStep(SMALL, CPU, tmp_path), speed_step.TheirStep(SMALL, CPU)
    batch = speed_step.make_batch(SMALL)
    assert speed_step.check_same_loss(ours, theirs, batch) > 1
    with torch.no_grad():
        next(iter(ours.parameters.values())).mul_(1.5)
        ours.model.sam2.sam_mask_decoder.iou_prediction_head.layers[-1].bias += 1
    with pytest.raises(Mismatch, match=r"our loss is .*, SAM 2's .*: nothing is compared"):
        speed_step.check_same_loss(ours, theirs, batch)


def test_dropout_of_a_step_is_that_of_its_variant(tmp_path):
    step, batch = speed_step.OurStep(SMALL, CPU, tmp_path), speed_step.make_batch(SMALL)
    speed_step.set_dropout(step.model.sam2, 0.5)
    assert step.loss(batch).item() != step.loss(batch).item()
    speed_step.set_dropout(step.model.sam2, 0.0)
    assert step.loss(batch).item() == step.loss(batch).item()


def test_memory_is_that_of_the_step_alone(tmp_path, monkeypatch):
    asked = []

    def peak(function, whose, device, folder, size):
        asked.append((function.__name__, whose, device, *size))
        return {"equal": 20, "ours": 10, "cached": 5, "recomputed": 2, "theirs": 30}[whose] * size[
            -1
        ]

    monkeypatch.setattr(speed_step, "in_process", peak)
    small = replace(SMALL, num_objects=1)
    equal, whole, cached, recomputed, frame = speed_step.measure_memory(CPU, tmp_path, SMALL, small)
    assert (equal.ours, whole.ours, cached.ours, whole.other) == (60, 30, 15, 90)
    assert recomputed.ours == 6
    assert (frame.ours, frame.other) == (10, 30)
    assert ("step_peak", "theirs", "cpu", 1, DEMO, 64, 6) in asked


@pytest.mark.parametrize("whose", ["equal", "ours", "cached", "recomputed", "theirs"])
def test_the_peak_is_that_of_one_step(whose, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(speed_step, "peak_of", lambda run, device: ran.append(run) or 7)
    assert speed_step.step_peak(whose, "cpu", str(tmp_path), [2, DEMO, 64, 3]) == 7
    (run,) = ran
    run()
    assert bool(list(tmp_path.rglob("*.safetensors"))) == (whose in ("cached", "recomputed"))


def test_evaluation_is_compared_on_the_same_masks(tmp_path, monkeypatch):
    options = {"config_path": DEMO, "image_size": 64, "size": (48, 80), "num_frames": 4}
    rows = speed_step.measure_evaluation(CPU, tmp_path / "a", objects=(2,), rounds=1, **options)
    assert [row.what for row in rows] == ["a frame", "a frame, features cached"]
    for row in rows:
        assert row.details["agreement"] > 0.98
        assert row.ours > 0
    assert len(list((tmp_path / "a").rglob("*.safetensors"))) == 4
    monkeypatch.setattr(speed_step, "_predict", lambda *_: [{1: ~m[1], 2: m[2]} for m in found])
    found = [{1: torch.zeros(48, 80).bool().numpy(), 2: torch.zeros(48, 80).bool().numpy()}] * 4
    with pytest.raises(Mismatch, match=r"agree with the predictor's on 0.* nothing is compared"):
        speed_step.measure_evaluation(CPU, tmp_path / "b", objects=(2,), rounds=1, **options)


def test_loaders_are_compared_on_the_same_clip(tmp_path):
    options = {
        "size": (240, 320),
        "image_size": 64,
        "num_frames": 3,
        "film_frames": 40,
        "rounds": 1,
    }
    rows = speed_data.measure_loader(tmp_path, **options)
    assert [(row.what, row.beside) for row in rows] == [
        ("a frame of a clip", "SAM 2"),
        ("a frame of a clip", "PIL + torchvision"),
        ("a frame of a clip, masks cached", "SAM 2"),
        ("a frame of a clip, augmented", "SAM 2, augmented"),
        ("bytes of a batch from a worker", "SAM 2"),
        ("a clip at the end of a film", "at its beginning"),
    ]
    assert all(row.ours > 0 and row.other > 0 for row in rows)
    pixels = 3 * 64 * 64
    assert rows[4].other == pixels * (3 * 4 + 3)  # float32 pictures, bool masks of three objects

    files = speed_clock.VideoFiles(tmp_path / "jpegs")
    theirs = speed_data._their_loader(files, 64, 3, 3)()
    shifted = replace_masks(theirs, theirs.masks.roll(20, -1))
    speed_data._check_same(theirs, theirs)
    with pytest.raises(Mismatch, match="nothing is compared"):
        speed_data._check_same(shifted, theirs)


def replace_masks(batch, masks):
    other = batch.clone()
    other.masks = masks
    return other


def test_a_large_json_is_read_by_both(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_data, "in_process", lambda run, path: run(path))
    read, worker = speed_data.measure_index(tmp_path, num_annotations=450, rounds=1)
    assert read.at == worker.at == "450 annotations"
    assert read.ours > 0
    path = tmp_path / "many" / "annotations.json"
    assert len(json.loads(path.read_text())["annotations"]) == 450
    assert sum(len(video.object_ids) for video in speed_data._read_dataset(path).videos) == 30


def test_parts_by_name_and_a_file(tmp_path, monkeypatch, capsys):
    ran = []

    def measure(name, device, folder):
        ran.append(name)
        if name == "index":
            raise Mismatch("they differ: nothing is compared")
        return [speed_clock.Row(name, "it", "here", 1e6, 3e6, "B", "the other")]

    monkeypatch.setattr(speed, "_measure", measure)
    file = tmp_path / "speed.json"
    assert speed.measure_words(["loader", "step", "--json", str(file), "--device", "cpu"]) == 0
    assert ran == ["step", "loader"]
    said = capsys.readouterr().out
    assert "it (here): 1.0 MB; the other 3.0 MB, 3.00 times ours" in said
    content = json.loads(file.read_text())
    assert [row["part"] for row in content["rows"]] == ["step", "loader"]
    assert content["environment"]["packages"]["sam2"]
    assert speed.measure_words(["--device", "cpu", "--json", str(file)]) == 1
    assert ran[2:] == ["step", "memory", "evaluation", "loader", "index"]
    assert "nothing is compared" in capsys.readouterr().err
    assert len(json.loads(file.read_text())["rows"]) == 4  # of the parts before


@pytest.mark.parametrize(
    ("words", "text"),
    [(["steps"], "unknown part 'steps'; expected step, memory"), (["--device", "qpu"], "device:")],
)
def test_a_users_mistake_is_a_message(words, text, capsys):
    assert speed.measure_words(words) == 2
    assert text in capsys.readouterr().err


def test_without_sam2s_training_code_the_way_to_it_is_told(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'tensordict'")

    monkeypatch.setattr("sam2train.speed_clock.import_module", missing)
    with pytest.raises(UserError, match=r"No module named 'tensordict'.*pip install sam2==1.1.0"):
        speed_step.TheirStep(SMALL, CPU)


# -- whole runs -----------------------------------------------------------------------------------


def test_a_sweep_is_compared_with_as_many_separate_runs(tmp_path, monkeypatch):
    commands = []

    def run(command, folder, **options):
        commands.append(command)
        time.sleep(0.3 if "--jobs" in command else 0.1)

    monkeypatch.setattr(speed, "_run", run)
    monkeypatch.setattr(speed, "_draw_demo", lambda: None)
    (row,) = speed.measure_sweep(CPU, tmp_path / "s", num_trials=8, num_steps=3, rounds=2)
    assert 0.3 <= row.ours < 0.6
    assert 0.8 <= row.other < 1.6
    assert "trainer.num_steps=3" in commands[0]
    sweep = load_sweep(tmp_path / "s" / "rates.yaml")
    assert len(grid(sweep)) == 8


def test_the_start_ends_where_the_first_step_begins(tmp_path, monkeypatch):
    def run(command, folder, **options):
        script = command[0].endswith("first_step.py")
        begun = time.monotonic()
        time.sleep(0.2 if script else 0.05)
        return f"something\nfirst step at {begun + 0.1}\n" if script else ""

    monkeypatch.setattr(speed, "_run", run)
    monkeypatch.setattr(speed, "_draw_demo", lambda: None)
    start, wrong = speed.measure_start(tmp_path / "start", rounds=2)
    assert 0.1 <= start.ours < 0.2 > start.other >= 0.05
    assert len(start.details["ours"]) == 2
    assert (wrong.what, wrong.beside) == ("until a wrong setting is told", "import torch")


def test_a_run_that_fails_is_told_with_its_last_line(tmp_path):
    assert speed._run(["-c", "print(3)"], tmp_path) == "3\n"
    with pytest.raises(MachineFault, match=r"ended with 1: ValueError: no such thing"):
        speed._run(["-c", "raise ValueError('no such thing')"], tmp_path)
    with pytest.raises(MachineFault, match=r"ended with 0: 3"):
        speed._run(["-c", "print(3)"], tmp_path, code=2)


def test_a_line_of_the_log_is_timed_beside_its_step(tmp_path, monkeypatch):
    data = make_coco(tmp_path / "data", num_frames=4, size=(64, 64))
    experiment = tmp_path / "small.yaml"
    experiment.write_text(
        f"dataset: {{data_path: {data}, image_size: [64, 64], video_clip_length: 2}}\n"
        f"model: {{config_path: {DEMO}, image_size: 64}}\n"
    )
    monkeypatch.setattr(speed, "EXPERIMENT", str(experiment))
    monkeypatch.setattr(speed, "_draw_demo", lambda: None)
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog.log

    def slow(self, *values, **options):
        time.sleep(0.2)
        log(self, *values, **options)

    monkeypatch.setattr(RunLog, "log", slow)
    (row,) = speed.measure_log(CPU, tmp_path / "run", num_steps=2)
    assert row.ours >= row.other + 0.2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == [1, 2, 3]
