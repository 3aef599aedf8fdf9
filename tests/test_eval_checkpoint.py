"""`--evaluate` from the command line to the files."""

import csv
import io
import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_coco
from PIL import Image
from test_data_vos import keep_masks, make_vos, save_ids, write_meta

from sam2train import checkpoint, cli, eval_checkpoint
from sam2train.data_pictures import read_id_mask
from sam2train.data_videos import list_pictures
from sam2train.datasets import COCODataset
from sam2train.eval_checkpoint import CellPrompts, segment_frame
from sam2train.files import REPOSITORY, file_hash
from sam2train.metrics import mean_scores, score_video
from sam2train.model import SAM2Model
from sam2train.prompts import NOISE, Cell, all_cells, mask_center, mask_to_box, next_click


def write_small(root):
    """root/small.yaml, an experiment of two steps, with its data of two videos."""
    data = make_coco(
        root / "data", num_videos=2, num_frames=5, size=(64, 64), absent=[(1, 0, 2), (2, 2, 1)]
    )
    sections = {
        "dataset": {
            "data_path": str(data),
            "val_path": str(data),
            "image_size": [64, 64],
            "video_clip_length": 3,
            "prompt_types": ["bbox"],
        },
        "model": {
            "config_path": "sam2train/configs/sam2.1_hiera_demo.yaml",
            "image_size": 64,
            "num_maskmem": 2,
        },
        "trainer": {"num_steps": 2, "val_every": 2, "save_every": 2, "device": "cpu"},
        "tracking": {"mode": "disabled"},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(sections))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with small.yaml, its data, and a run of it."""
    root = tmp_path_factory.mktemp("trained")
    write_small(root)
    assert cli.main([str(root / "small.yaml"), "--run-dir", str(root / "run")]) == 0
    return root


def call(trained, *words) -> int:
    return cli.main([str(trained / "small.yaml"), *map(str, words)])


def fails(capsys, trained, *words) -> str:
    capsys.readouterr()
    assert call(trained, *words) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_checkpoint_beside_its_baselines(trained, tmp_path, capsys):
    out, masks = tmp_path / "out", tmp_path / "masks"
    source = trained / "run" / "checkpoints" / "best.pt"
    assert call(trained, "--evaluate", source, "--run-dir", out, "--save-masks", masks) == 0
    printed = capsys.readouterr().out
    for text in ("untouched base", "copy the first", "Memory horizon", "after_prompt", str(out)):
        assert text in printed
    rows = table(out / "scores.csv")
    assert {row["model"] for row in rows} == {"trained", "base", "copy_first_mask"}
    assert len(rows) == 3 * 4
    late = [row for row in rows if (row["video_id"], row["object_id"]) == ("1", "2")]
    assert {row["prompt_frame"] for row in late} == {"1"}
    assert {row["void"] for row in rows} == {"ignore"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["checkpoint"]["sha256"] == file_hash(source)
    mean = np.mean([float(row["J_and_F"]) for row in rows if row["model"] == "trained"])
    assert summary["val/J_and_F"] == pytest.approx(mean)
    assert summary["val/gain_over_copy_first_mask"]["num_videos"] == 2
    assert summary["void"] == "ignore"
    frames = [r for r in table(out / "frames.csv") if r["model"] == "trained"]
    for visible, name, count in ((0, "absence_recall", "absent"), (1, "false_absences", "visible")):
        scores = [float(r["object_score"]) for r in frames if int(r["visible"]) == visible]
        assert summary[f"horizon/num_{count}"] == len(scores) > 0
        assert summary[f"horizon/{name}"] == np.mean(np.array(scores) <= 0)
        assert f"base/horizon/{name}" in summary
        assert f"copy_first_mask/horizon/{name}" not in summary
    for text in ("object score AUC", "recall of absence", "false absences"):
        assert len(re.findall(rf"│ {text} +│", printed)) == 1
    assert {path.name for path in out.glob("*.png")} == {"horizon.png"}
    assert len(list((out / "overlays").glob("val_*.jpg"))) == 2
    assert len(list((out / "overlays").glob("base_*.webm"))) == 2
    assert {row["model"] for row in table(out / "horizon.csv")} == {
        "trained",
        "base",
        "copy_first_mask",
    }
    assert not (out / "config.yaml").exists()  # it is no run
    pictures = sorted((masks / "1").glob("*.png"))
    assert len(pictures) == 5
    with Image.open(pictures[0]) as picture:
        assert picture.mode == "P"
        assert 2 not in np.array(picture)  # object 2 is not there yet


def test_scores_by_attribute(trained, tmp_path, capsys):
    csv_file = tmp_path / "mine.csv"
    csv_file.write_text("video,object,attribute\n1,2,late\n1,,first video\n2,1,late\n9,1,none\n")
    setting = f"evaluation.attributes={csv_file}"
    assert call(trained, "--evaluate", "base", "--run-dir", tmp_path / "out", setting) == 0
    assert "J&F by attribute" in capsys.readouterr().out
    rows = table(tmp_path / "out" / "scores_by_attribute.csv")
    scores = table(tmp_path / "out" / "scores.csv")
    counts = {(row["attribute"], row["num_objects"], row["num_videos"]) for row in rows}
    assert counts == {("late", "2", "2"), ("first video", "2", "1")}
    late = [("1", "2"), ("2", "1")]
    for row in rows:
        if row["attribute"] == "late":
            own = [s for s in scores if s["model"] == row["model"]]
            own = [float(s["J_and_F"]) for s in own if (s["video_id"], s["object_id"]) in late]
            assert float(row["J_and_F"]) == pytest.approx(np.mean(own))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the columns video and attribute"),
        ("video,attribut\n1,x\n", "no column attribute"),
        ("video,attribute\n,x\n", "line 2"),
        ("video,attribute\nother,x\n", "names no object that was scored"),
    ],
)
def test_a_wrong_file_of_attributes(trained, tmp_path, capsys, content, words):
    path = tmp_path / "mine.csv"
    path.write_text(content)
    options = "--run-dir", tmp_path / "out", f"evaluation.attributes={path}"
    message = fails(capsys, trained, "--evaluate", "base", *options)
    assert words in message
    assert str(path) in message


def test_the_training_says_the_same(trained, tmp_path):
    """The trainer scores through the same functions: the same numbers, to the bit."""
    out = tmp_path / "out"
    source = trained / "run" / "checkpoints" / "last.pt"
    assert call(trained, "--evaluate", source, "--run-dir", out, "--no-base") == 0
    summary = json.loads((out / "summary.json").read_text())
    run = json.loads((trained / "run" / "summary.json").read_text())
    assert summary["val/J_and_F"] == run["val/J_and_F"]
    assert "val/base/J_and_F" not in summary


def test_the_prompts_have_a_seed_of_their_own(trained, tmp_path):
    """Not that of the training; it stands beside the scores."""
    rows, words = [], ("--evaluate", "base", "evaluation.prompt_types=[point]")
    for name, change in (("a", ""), ("b", "trainer.seed=1"), ("c", "evaluation.seed=1")):
        out = tmp_path / name
        assert call(trained, *words, "--run-dir", out, *filter(None, [change, "model.seed=0"])) == 0
        rows.append((out / "scores.csv").read_text())
        summary = json.loads((out / "summary.json").read_text())
        assert summary["evaluation_seed"] == (name == "c")
        assert summary["seed"] == (name == "b")
    assert rows[0] == rows[1] != rows[2]


def test_an_exported_file_scores_as_its_checkpoint(trained, tmp_path):
    source = trained / "run" / "checkpoints" / "last.pt"
    assert call(trained, "--export", source, tmp_path / "w.pt") == 0
    words = ("--evaluate", tmp_path / "w.pt", "--run-dir", tmp_path / "out", "--no-base")
    assert call(trained, *words) == 0
    run = json.loads((trained / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "out/summary.json").read_text())["val/J_and_F"] == pytest.approx(
        run["val/J_and_F"], abs=1e-9
    )


def test_the_test_split_and_its_warning(trained, tmp_path, capsys):
    data = trained / "data" / "annotations.json"
    out = tmp_path / "out"
    words = ("--evaluate", "base", "--split", "test", f"dataset.test_path={data}")
    assert call(trained, *words, "--run-dir", out) == 0
    assert "too high" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert "too high" in summary["warnings"][0]
    assert {row["split"] for row in table(out / "scores.csv")} == {"test"}


def test_a_run_reports_its_best_on_test(trained, tmp_path, capsys):
    sizes = {"num_videos": 1, "num_frames": 4, "size": (64, 64), "absent": [(1, 2, 1)]}
    test = make_coco(tmp_path / "test", **sizes)
    run = tmp_path / "run"
    assert call(trained, f"dataset.test_path={test}", "--run-dir", run) == 0
    printed = capsys.readouterr().out  # validation at the first and the last step, and test
    for text in ("recall of absence", "false absences"):
        assert len(re.findall(rf"│ {text} +│", printed)) == 3
    summary = json.loads((run / "summary.json").read_text())
    (warning,) = summary["warnings"]  # it is validated on what it was trained on
    assert "data_path and dataset.val_path share frames (video 1, 2)" in warning
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert summary["test/step"] == best["step"]
    out = tmp_path / "out"
    words = ("--evaluate", run / "checkpoints" / "best.pt", "--split", "test")
    assert call(trained, *words, f"dataset.test_path={test}", "--run-dir", out) == 0
    again = json.loads((out / "summary.json").read_text())
    for name in ("test/J_and_F", "test/base/J_and_F", "test/copy_first_mask/J_and_F"):
        assert summary[name] == again[name]
    names = ("absence_recall", "false_absences", "num_absent", "num_visible", "object_score_auc")
    for name in (f"horizon/{name}" for name in names):
        assert summary[f"test/{name}"] == again[name]
        assert name in summary  # of the validation videos
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged if name in row] == [0, 2]
    curves = {(row["split"], row["model"]) for row in table(run / "horizon.csv")}
    assert curves == {("val", "trained"), ("test", "trained"), ("test", "base")}


def test_a_run_folder_stands_for_its_best_checkpoint(trained, tmp_path):
    out = tmp_path / "out"
    words = ("--no-base", "evaluation.max_videos=1", "--run-dir", out)
    assert call(trained, "--evaluate", trained / "run", *words) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"]["path"] == str(trained / "run" / "checkpoints" / "best.pt")


class TestMistakes:
    def test_no_such_checkpoint(self, capsys, trained, tmp_path):
        message = fails(capsys, trained, "--evaluate", tmp_path / "no.pt")
        assert "no.pt: no such checkpoint" in message

    def test_no_such_split(self, capsys, trained):
        assert "dataset.test_path is null" in fails(
            capsys, trained, "--evaluate", "base", "--split", "test"
        )

    def test_a_folder_in_use(self, capsys, trained):
        words = ("--evaluate", "base", "--run-dir", trained / "run")
        assert "there is something already" in fails(capsys, trained, *words)

    def test_options_that_do_not_go_together(self, capsys, trained, tmp_path):
        assert "--evaluate" in fails(capsys, trained, "--save-masks", tmp_path)
        words = ("--evaluate", "base", "--save-masks-as", "sav", "--run-dir", tmp_path / "out")
        assert "add --save-masks" in fails(capsys, trained, *words)
        assert "give one" in fails(capsys, trained, "--evaluate", "base", "--prompt-matrix", "base")

    def test_another_base(self, capsys, trained, tmp_path):
        """A checkpoint holds only what was trained: over another base it is another model."""
        source = trained / "run" / "checkpoints" / "last.pt"
        assert call(trained, "--export", source, tmp_path / "w.pt") == 0
        run = tmp_path / "run"
        words = (f"model.checkpoint_path={tmp_path / 'w.pt'}", "dataset.val_path=null")
        assert call(trained, *words, "trainer.num_steps=1", "--run-dir", run) == 0
        message = fails(capsys, trained, "--evaluate", run / "checkpoints" / "last.pt")
        assert "w.pt" in message
        assert "model.checkpoint_path has random weights" in message

    def test_a_checkpoint_of_trained_parameters_is_no_base(
        self, capsys, trained, tmp_path, monkeypatch
    ):
        """The line that the message gives writes a file which is one."""
        source, run = trained / "run" / "checkpoints" / "last.pt", tmp_path / "run"
        assert call(trained, "--export", source, tmp_path / "w.pt") == 0
        words = (f"model.checkpoint_path={tmp_path / 'w.pt'}", "dataset.val_path=null")
        assert call(trained, *words, "trainer.num_steps=1", "--run-dir", run) == 0
        partial = run / "checkpoints" / "last.pt"
        message = fails(capsys, trained, f"model.checkpoint_path={partial}", "--evaluate", "base")
        assert "holds only what that run trained" in message
        assert "missing" not in message
        line = shlex.split(message.splitlines()[-1])
        assert line[:2] == ["python", "run.py"]
        monkeypatch.chdir(tmp_path)
        assert cli.main(line[2:]) == 0
        words = ("model.checkpoint_path=OUT.pt", "--evaluate", "base", "--run-dir", "out")
        assert call(trained, *words, "evaluation.max_videos=1") == 0


def test_the_demo_scores_as_it_did(tmp_path):
    """The base on two demo videos, as it scored when its weights were made (one thread).
    Other builds of torch and OpenCV round differently: the last digits may move."""
    words = ["--evaluate", "base", "--run-dir", str(tmp_path / "run"), "evaluation.max_videos=2"]
    words += ["trainer.device=cpu", "tracking.mode=disabled", "evaluation.num_overlays=0"]
    assert cli.main([str(REPOSITORY / "experiments" / "coco_point_bbox.yaml"), *words]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val/num_objects"] == 11
    assert summary["val/J_and_F"] == pytest.approx(0.50702, abs=2e-3)


SIZE = (64, 64)


def rectangle(left, top, right, bottom, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


@pytest.fixture
def data(tmp_path):
    return COCODataset(make_coco(tmp_path, num_frames=3, size=SIZE), SIZE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = "sam2train/configs/sam2.1_hiera_demo.yaml"
    return SAM2Model(None, config, device="cpu", image_size=64).load().train()


def draw(model, data, *cell):
    return CellPrompts(model, Cell(*cell))(data, data.videos[0], np.random.default_rng(5))


def test_the_matrix_has_every_prompt_clean_and_moved():
    cells = all_cells()
    names = ["1 click", "3 clicks", "5 clicks", "bbox", "mask"]
    assert list(dict.fromkeys(cell.name for cell in cells)) == names
    assert len(cells) == len(set(cells)) == 5 * len(NOISE)
    assert NOISE[0] == 0


def test_the_first_click_is_the_middle_of_the_object(model, data):
    for prompt in draw(model, data, "point", 1, 0.0):
        mask = data.read_mask(data.videos[0], 0, prompt["object_id"], SIZE)
        np.testing.assert_array_equal(prompt["points"], mask_center(mask)[None])
        assert prompt["labels"].tolist() == [1]


def test_further_clicks_fall_on_what_the_model_gets_wrong(model, data, monkeypatch):
    """A model that first finds the left half only, then everything and a blob elsewhere."""
    video = data.videos[0]
    truth = data.read_mask(video, 0, 1, SIZE)
    left, _, right, _ = mask_to_box(truth).astype(int)
    half = truth.copy()
    half[:, (left + right) // 2 :] = False
    blob = truth | rectangle(50, 50, 60, 60)
    answers = {1: half, 2: blob, 3: truth}
    monkeypatch.setattr(
        eval_checkpoint,
        "segment_frame",
        lambda model, data, video, prompt, bf16: answers[len(prompt["labels"])],
    )
    monkeypatch.setattr(eval_checkpoint, "first_views", lambda data, video: iter([(1, 0, truth)]))
    (prompt,) = draw(model, data, "point", 5, 0.0)
    assert prompt["labels"].tolist() == [1, 1, 0]  # nothing is wrong after three
    missed = truth & ~half
    x, y = prompt["points"][1].astype(int)
    assert missed[y, x]
    assert prompt["points"][2].tolist() == [55, 55]
    assert prompt["points"].dtype == np.float32
    assert prompt["labels"].dtype == np.int32


def test_the_model_answers_and_is_left_as_it_was(model, data):
    (prompt, _) = draw(model, data, "bbox", 0, 0.0)
    mask = segment_frame(model, data, data.videos[0], prompt)
    assert (mask.shape, mask.dtype) == (SIZE, bool)
    assert model.training
    three = draw(model, data, "point", 3, 0.0)
    assert {len(prompt["points"]) for prompt in three} <= {2, 3}


@pytest.mark.parametrize("kind", [("point", 1), ("bbox", 0), ("mask", 0)])
def test_noise_grows_with_its_strength_along_one_direction(model, data, kind):
    """The same random numbers at every strength: scores differ by the strength only."""
    clean, weak, strong = (draw(model, data, *kind, noise) for noise in (0.0, 0.1, 0.2))
    assert draw(model, data, *kind, 0.1)[0]["points"].tolist() == weak[0]["points"].tolist()
    for a, b, c in zip(clean, weak, strong, strict=True):
        if kind[0] == "mask":
            assert a["mask"].sum() > 0
            assert not np.array_equal(a["mask"], c["mask"])
        else:
            inside = (c["points"] > 0) & (c["points"] < np.array(SIZE)[::-1] - 1)  # not held back
            assert inside.any()
            twice = 2 * (b["points"] - a["points"])
            np.testing.assert_allclose(
                twice[inside], (c["points"] - a["points"])[inside], atol=1e-4
            )
            assert not np.array_equal(a["points"], b["points"])


def test_nothing_wrong_is_no_click():
    mask = rectangle(5, 5, 9, 9)
    assert next_click(mask, mask.copy()) is None


@pytest.mark.parametrize("shift", [(0, 3), (4, 0), (-5, 2), (0, 40)])
@pytest.mark.parametrize("box", [(12, 10, 31, 25), (0, 0, 20, 40), (30, 30, 30, 30)])
def test_a_click_on_an_error_is_that_of_sam2(box, shift):
    """The predicted mask is the true one, moved: it misses a strip and adds another."""
    sam2_utils = pytest.importorskip("sam2.modeling.sam2_utils")
    mask = rectangle(*box)
    guess = np.roll(mask, shift, (0, 1))
    pair = [torch.from_numpy(part)[None, None] for part in (mask, guess)]
    points, labels = sam2_utils.get_next_point(*pair, "center")
    click = next_click(mask, guess)
    assert (click[0].tolist(), click[1]) == (points[0, 0].tolist(), labels[0, 0])


def test_changes_by_noise_have_their_intervals(tmp_path, capsys):
    write_small(tmp_path)
    five = make_coco(tmp_path / "five", num_videos=5, num_frames=2, size=(64, 64))
    words = ("--prompt-matrix", "base", "--run-dir", tmp_path / "out", f"dataset.val_path={five}")
    assert call(tmp_path, *words) == 0
    for row in table(tmp_path / "out" / "prompt_matrix.csv"):
        assert (row["change"] == "") == (row["noise"] == "0.0")
        if row["change"]:
            low, change, high = (float(row[f"change{end}"]) for end in ("_low", "", "_high"))
            assert low <= change <= high
    assert "[+" in capsys.readouterr().out


def test_the_prompt_matrix(tmp_path, capsys):
    write_small(tmp_path)
    out = tmp_path / "out"
    words = ("--prompt-matrix", "base", "--run-dir", out)
    assert call(tmp_path, *words, "evaluation.max_videos=1", "evaluation.max_frames=2") == 0
    rows = table(out / "prompt_matrix.csv")
    kinds = {(row["prompt"], row["clicks"], row["noise"]) for row in rows}
    assert len(kinds) == len(rows) == 20
    assert {clicks for prompt, clicks, _ in kinds if prompt == "point"} == {"1", "3", "5"}
    assert {noise for _, _, noise in kinds} == {"0.0", "0.1", "0.2", "0.4"}
    assert all(row["change"] == "" for row in rows)  # one video has no interval
    assert (out / "prompt_matrix.png").stat().st_size > 10_000
    assert len(table(out / "prompt_matrix_objects.csv")) == 20 * len(
        {row["object_id"] for row in table(out / "prompt_matrix_objects.csv")}
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["matrix/base/bbox/noise_0.0/J_and_F"] == pytest.approx(
        float(next(r for r in rows if r["prompt"] == "bbox")["J_and_F"])
    )
    assert "3 clicks" in capsys.readouterr().out


# What people publish: the commands of experiments/README.md on small folders of the same layout


@pytest.fixture
def publish(trained, tmp_path, monkeypatch):
    """Runs the command that names a path, with the small experiment at its own size."""
    blocks = re.findall(
        r"```bash\n(.*?)```", (REPOSITORY / "experiments/README.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)

    def run(path, *more) -> int:
        (block,) = [block for block in blocks if f"dataset.val_path={path} " in block]
        words = shlex.split(block.replace("\\\n", " "))
        assert words[:3] == ["python", "run.py", "experiments/sam2.1_tiny.yaml"]
        sized = [word for word in words[3:] if "image_size=" not in word]
        assert len(sized) == len(words) - 5
        return call(trained, *sized, "--run-dir", "out", *more)

    return run


def read_ids(folder, object_ids):
    """Object id -> (T, H, W) bool of the PNGs in a folder."""
    ids = np.stack([read_id_mask(path) for path in list_pictures(folder)])
    return {o: ids == o for o in object_ids}


def read_apart(folder, names):
    """The same where each object has a folder of its own."""
    stacks = {o: list_pictures(folder / name) for o, name in names.items()}
    return {o: np.stack([read_id_mask(path) > 0 for path in s]) for o, s in stacks.items()}


def score_again(out, predicted, truth, policy):
    """Mean J&F of saved masks against those of the data set, by video; scores.csv has the same."""
    rows = [row for row in table(out / "scores.csv") if row["model"] == "base"]
    again = [score_video(predicted[v], truth[v], policy) for v in sorted(truth)]
    for row, scores in zip(rows, [o for video in again for o in video.objects], strict=True):
        assert float(row["J_and_F"]) == pytest.approx(scores.J_and_F)
        assert (row["object_id"], row["frame_policy"]) == (str(scores.object_id), policy)
        assert int(row["num_frames"]) == len(scores.frames)
    return mean_scores(again)["J_and_F"]


def inside(place):
    """Name -> ids of the PNGs of a zip, in their order."""
    with zipfile.ZipFile(place) as archive:
        return {n: np.array(Image.open(io.BytesIO(archive.read(n)))) for n in archive.namelist()}


def test_davis_2017(publish, capsys):
    """A list of ImageSets, 480p, the first and the last frame left out, void is background."""
    masks, out = Path("DAVIS/Annotations/480p"), Path("out")
    make_vos(Path("DAVIS"), below="480p")
    Path("DAVIS/ImageSets/2017").mkdir(parents=True)
    Path("DAVIS/ImageSets/2017/val.txt").write_text("swan\n")
    assert publish("DAVIS/ImageSets/2017/val.txt") == 0
    found, truth = ({"swan": read_ids(m / "swan", [1, 2])} for m in (Path("davis_masks"), masks))
    mean = score_again(out, found, truth, "davis")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["val/J_and_F"] == pytest.approx(mean)
    assert summary["void"] == "background"
    assert all((found["swan"][o][0] == truth["swan"][o][0]).mean() > 0.9 for o in (1, 2))
    assert "VIDEO/FRAME.png, as DAVIS and MOSE have it" in capsys.readouterr().out


def test_mose(publish, trained, capsys):
    """The first masks alone: all frames of both videos, at the top of the zip, and no score."""
    mose = make_vos(Path("MOSE/valid"))
    keep_masks(mose, {"00000": [1, 2]})
    assert publish("MOSE/valid") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "nothing can be scored here; upload to its evaluation server: mose.zip" in printed
    assert "J&F" not in printed
    assert "nothing to track" not in printed
    found = inside("mose.zip")
    assert list(found) == [f"{video}/0000{t}.png" for video in ("bear", "swan") for t in range(6)]
    given = read_id_mask(mose / "Annotations" / "swan" / "00000.png")
    assert (found["swan/00000.png"] == given).mean() > 0.9
    assert not Path("out/scores.csv").exists()
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["status"] == "finished"
    assert not [key for key in summary if "J_and_F" in key]
    words = ("dataset.dataset_type=vos", "dataset.val_path=MOSE/valid", "--run-dir", "other")
    message = fails(capsys, trained, *words, "--evaluate", "base")
    assert "nothing can be scored here; --save-masks MASKS.zip" in message


def test_youtube_vos(publish, capsys):
    """The frames that are asked for, of all that there are; object 2 has its mask on frame 2."""
    valid, every = make_vos(Path("YouTube/valid"), names=["003234408d"]), Path("YouTube/all_frames")
    keep_masks(valid, {"00000": [1], "00002": [2]})
    write_meta(valid, {"1": ["00000", "00002", "00004"], "2": ["00002", "00004"]})
    (every / "valid_all_frames").mkdir(parents=True)
    (valid / "JPEGImages").rename(every / "valid_all_frames" / "JPEGImages")
    assert publish("YouTube/all_frames/valid_all_frames") == 0
    assert "--save-masks-as" not in capsys.readouterr().out
    found = inside("youtube.zip")
    assert list(found) == [f"Annotations/003234408d/0000{t}.png" for t in (0, 2, 4)]
    late = read_id_mask(valid / "Annotations" / "003234408d" / "00002.png") == 2
    assert 2 not in found["Annotations/003234408d/00000.png"]
    assert (found["Annotations/003234408d/00002.png"] == 2)[late].mean() > 0.9
    words = ("--run-dir", "other", "--save-masks", "other.zip", "--save-masks-as", "davis")
    assert publish("YouTube/all_frames/valid_all_frames", *words) == 0
    assert "--save-masks-as youtube_vos" in capsys.readouterr().out
    assert len(inside("other.zip")) == 6


def test_lvos(publish):
    """Every fifth frame by its number in the film; its meta.json asks for all of them."""
    lvos = make_vos(Path("LVOS/test"), names=["0tCWPOrc"])
    keep_masks(lvos, {"00000": [1], "00003": [2]})
    for path in [*lvos.rglob("*.png")]:
        path.rename(path.with_name(f"{5 * int(path.stem) + 1:08d}.png"))
    objects = {o: {"frame_range": {"start": "1", "end": "26", "frame_nums": "6"}} for o in "12"}
    (lvos / "meta.json").write_text(json.dumps({"videos": {"0tCWPOrc": {"objects": objects}}}))
    assert publish("LVOS/test") == 0
    found = inside("lvos.zip")
    assert list(found) == [f"Annotations/0tCWPOrc/{t:08d}.png" for t in range(1, 27, 5)]
    assert [2 in ids for ids in found.values()][:4] == [False, False, False, True]


def test_sav(publish):
    """Folders of objects that overlap, every second frame labelled, objects scored apart."""
    sav, masks = make_vos(Path("sav_val"), names=["sav_000001"]), Path("sav_val/Annotations_6fps")
    (sav / "JPEGImages").rename(sav / "JPEGImages_24fps")
    for t in (0, 2, 4):
        ids = read_id_mask(sav / "Annotations" / "sav_000001" / f"0000{t}.png")
        for name, mask in (("000", ids > 0), ("001", ids == 2)):  # a whole and a part of it
            save_ids(masks / "sav_000001" / name / f"0000{t}.png", 255 * mask)
    shutil.rmtree(sav / "Annotations")
    (sav / "sav_val.txt").write_text("sav_000001\n")
    assert publish("sav_val/sav_val.txt") == 0
    places = Path("sav_masks/sav_000001"), masks / "sav_000001"
    found, truth = (read_apart(place, {0: "000", 1: "001"}) for place in places)
    assert [mask.shape[0] for mask in found.values()] == [6, 6]
    assert (found[0] & found[1]).any()
    labelled = {o: mask[::2] for o, mask in found.items()}
    score_again(Path("out"), {"sav_000001": labelled}, {"sav_000001": truth}, "sav")


def test_a_run_is_not_validated_on_a_test_set(trained, tmp_path, capsys):
    mose = make_vos(tmp_path / "valid")
    keep_masks(mose, {"00000": [1, 2]})
    words = ["dataset.dataset_type=vos", f"dataset.data_path={make_vos(tmp_path / 'train')}"]
    words.append(f"dataset.val_path={tmp_path / 'train'}")
    message = fails(capsys, trained, *words, f"dataset.test_path={mose}")
    assert "dataset.test_path: each object has a mask on one frame only" in message
    words[-1] = f"dataset.val_path={mose}"
    assert "nothing can be scored" in fails(capsys, trained, *words, "--prompt-matrix", "base")
