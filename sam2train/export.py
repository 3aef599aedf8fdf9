"""A run's checkpoint as weights for other programs: SAM 2's own file, the same as safetensors, or a
folder that transformers loads, with a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from sam2train.checkpoint import Loaded, as_trained, load, load_checkpoint
from sam2train.clips import Prompt, empty_prompt
from sam2train.config import to_yaml
from sam2train.config_yaml import read_yaml
from sam2train.errors import UserError
from sam2train.experiment import Experiment, build_model
from sam2train.export_transformers import (
    has_transformers,
    masks_of_transformers,
    processor_config,
    transformers_config,
    transformers_weights,
)
from sam2train.files import file_hash, replacing, write_text
from sam2train.lora import merge_lora
from sam2train.machine import say
from sam2train.memory import track_clip
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.model import SAM2Model
from sam2train.pretrained import PUBLISHED, resolve_config
from sam2train.prompts import box_fields
from sam2train.run_folder import RunFolder, read_table
from sam2train.scores import SCORE_COLUMNS, difference, read_scores

# Pixels of the test clip that half precision may move over the edge of a mask. A guess.
_HALF_TOLERANCE = 0.01
# Pixels that transformers may see on another side: it computes the same in another order.
_TRANSFORMERS_TOLERANCE = 0.002
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # any other OUT is a folder
_SAM2_FILE = "sam2.pt"  # in that folder: SAM 2's own layout
_CONFIG_FILE = "sam2.yaml"  # and its config, where that is none of SAM 2's package


def export_checkpoint(
    experiment: Experiment,
    source: Path,
    target: Path,
    *,
    half: bool,
    console: Console,
    push: str | None = None,
) -> None:
    """Write all of SAM 2's weights, trained or not.

    `OUT.pt` holds `{"model": state_dict}` and beside it, as `untrained_rows`, the temporal rows
    that no training has reached, if there are any; `OUT.safetensors` holds the same. A folder holds
    the weights for transformers' `Sam2VideoModel`, SAM 2's file and a model card.

    Before it gets its name the file is read back into a new model, strictly, which must then find
    the same masks in a small generated clip; so must transformers, where that is installed.

    Args:
        source: a checkpoint of a run of this experiment; what the run changed in the model counts.
        half: store float16; SAM 2 loads it into float32, about 3 decimal digits remain.
        push: ORG/NAME on huggingface.co that the folder is uploaded to.

    Raises:
        UserError: a checkpoint that is missing or belongs to another base or architecture; in half
            precision also one whose masks change too much; a model that transformers does not have.
    """
    is_folder = target.suffix.lower() not in _FILES
    if push is not None:
        if not is_folder:
            raise UserError(f"--push {push}: uploads a folder; name one instead of {target}")
        hub = _open_hub(push)
    experiment = as_trained(experiment, source)
    _make_room(target)
    model = build_model(experiment)
    loaded = load_checkpoint(model, experiment, source)
    merge_lora(model.sam2)
    experiment = _changed(experiment, lora=None)
    weights = {
        name: value.detach().cpu().to(torch.float16 if half else value.dtype)
        for name, value in model.sam2.state_dict().items()
    }
    if is_folder:
        told = _write_folder(experiment, model, loaded, weights, source, target, half)
    else:
        with replacing(target) as partial:
            _write_weights(partial, weights, loaded, as_safetensors=target.suffix == _FILES[-1])
            told = _read_back(experiment, model, partial, weights, target, half)
    files = [target] if not is_folder else [path for path in target.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    say(console, f"wrote {target} ({size:.1f} MB); {told}")
    for line in how_to_load(experiment, target).splitlines():
        say(console, f"  {line}")
    if push is not None:
        say(console, f"uploaded to {hub(target)}")


def _write_weights(
    path: Path, weights: Mapping[str, torch.Tensor], loaded: Loaded, *, as_safetensors: bool
) -> None:
    rows = list(loaded.untrained_rows)
    if as_safetensors:
        metadata = {"format": "pt"} | ({"untrained_rows": json.dumps(rows)} if rows else {})
        save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
        return
    content: dict[str, Any] = {"model": dict(weights)}
    if rows:
        content["untrained_rows"] = rows
    with open(path, "wb") as file:  # torch would store the temporary file's name in it
        torch.save(content, file)


def _read_back(
    experiment: Experiment,
    model: SAM2Model,
    path: Path,
    weights: Mapping[str, torch.Tensor],
    target: Path,
    half: bool,
) -> str:
    """What a strict load of the file shows; UserError where the masks are others."""
    again = build_model(_changed(experiment, checkpoint_path=str(path)))
    _compare_weights(again, weights)
    apart, pixels = compare_masks(model, again)
    if apart > (_HALF_TOLERANCE if half else 0):
        raise UserError(
            f"--export {target}: read back, {apart:.2%} of the pixels of a test clip change "
            "sides; nothing was written" + ("; export without --half" if half else "")
        )
    same = "the same masks" if apart == 0 else f"masks that differ in {apart:.2%} of the pixels"
    return f"it loads strictly and gives {same} ({pixels:,} pixels in a test clip)"


def _write_folder(
    experiment: Experiment,
    model: SAM2Model,
    loaded: Loaded,
    weights: Mapping[str, torch.Tensor],
    source: Path,
    target: Path,
    half: bool,
) -> str:
    """Write the folder for transformers; it appears whole or not at all. Returns what was found."""
    config = transformers_config(model.sam2)
    config["dtype"] = "float16" if half else "float32"
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    partial.mkdir()
    try:
        theirs = transformers_weights(model.sam2, weights)
        theirs = {name: value.contiguous() for name, value in theirs.items()}
        save_file(theirs, partial / "model.safetensors", {"format": "pt"})
        side = model.image_size
        for name, content in (("config", config), ("processor_config", processor_config(side))):
            write_text(partial / f"{name}.json", json.dumps(content, indent=2) + "\n")
        _write_weights(partial / _SAM2_FILE, weights, loaded, as_safetensors=False)
        if not (found := _config_of(experiment))[1]:
            shutil.copyfile(found[0], partial / _CONFIG_FILE)
        told = _read_back(experiment, model, partial / _SAM2_FILE, weights, target, half)
        checked = "transformers is not installed here: that it loads there was not checked"
        if has_transformers():
            apart = compare_with_transformers(model, partial)
            if apart > (_HALF_TOLERANCE if half else _TRANSFORMERS_TOLERANCE):
                raise UserError(
                    f"--export {target}: in transformers, {apart:.2%} of the pixels of a test clip "
                    "change sides; nothing was written; export a file OUT.pt instead"
                )
            checked = f"transformers loads it, and {apart:.2%} of the pixels differ"
        write_text(partial / "README.md", model_card(experiment, loaded, source, target.name))
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{_SAM2_FILE}: {told}; {checked}"


@torch.no_grad()
def compare_with_transformers(model: SAM2Model, folder: Path) -> float:
    """The share of pixels of a generated clip that are in the mask of one of them only.

    Both as SAM 2's predictor is: masks of clicks and boxes enter the memory binarised, and the
    decoder falls back to one of three masks where the single one is not stable.
    """
    clip, prompt = _test_clip(model.image_size)
    theirs = masks_of_transformers(folder, clip[0], torch.from_numpy(prompt["box"]))
    sam2, decoder = model.sam2, model.sam2.sam_mask_decoder
    before = sam2.binarize_mask_from_pts_for_mem_enc, decoder.dynamic_multimask_via_stability
    was_training = model.training
    model.eval()
    try:
        sam2.binarize_mask_from_pts_for_mem_enc = decoder.dynamic_multimask_via_stability = True
        features = model.encode_images(clip[0])
        outputs = track_clip(
            sam2,
            lambda t: features.select(torch.tensor([t], device=model.device)),
            clip.shape[1],
            {0: [prompt]},
        )
        ours = torch.cat([output.low_res_logits for output in outputs]).float().cpu()
    finally:
        sam2.binarize_mask_from_pts_for_mem_enc, decoder.dynamic_multimask_via_stability = before
        model.train(was_training)
    return float((((ours > 0) != (theirs > 0)) | theirs.isnan()).float().mean())


def _make_room(target: Path) -> None:
    """The folder of a file that is not there yet; UserError where that cannot be."""
    if target.exists():
        raise UserError(
            f"--export {target}: there is something already; name another file, or remove it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--export {target}: {problem.strerror}; name another place") from None


def _open_hub(name: str) -> Any:
    """A function that uploads a folder and returns its address.

    Raises:
        UserError: no huggingface_hub, no token, or no such name.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"--push {name}: expected ORG/NAME")
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(
            f"--push {name}: huggingface_hub is not installed; pip install huggingface_hub"
        ) from None
    if get_token() is None:
        raise UserError(f"--push {name}: no token; run `hf auth login`, or set HF_TOKEN")

    def upload(folder: Path) -> str:
        api = HfApi()
        try:
            address = api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder)
        except (HfHubHTTPError, OSError) as problem:
            raise UserError(
                f"--push {name}: {problem}; {folder} is written: upload it with "
                f"`hf upload {name} {folder}`"
            ) from None
        return str(address)

    return upload


def how_to_load(experiment: Experiment, target: Path) -> str:
    """Python that builds this model in SAM 2, and of a folder in transformers too, to be pasted."""
    is_folder = target.suffix.lower() not in _FILES
    config, inside = _config_of(experiment)
    parts = config.parts
    home, name = (target, _CONFIG_FILE) if is_folder else (config.parent, config.name)
    if inside:
        name = "/".join(parts[parts.index("configs") :])
    settings = {"num_maskmem": experiment.model.num_maskmem}
    settings |= {"image_size": experiment.model.image_size}
    if (pointers := experiment.model.max_obj_ptrs_in_encoder) == 0:
        settings["use_obj_ptrs_in_encoder"] = "false"
    elif pointers != 16:  # SAM 2's own
        settings["max_obj_ptrs_in_encoder"] = pointers
    extra = ", ".join(f'"++model.{key}={value}"' for key, value in settings.items())
    lines = ["from sam2.build_sam import build_sam2_video_predictor"]
    if not inside:  # SAM 2 looks for configs in its own package
        lines += [
            "import os",
            "from hydra import initialize_config_dir",
            "from hydra.core.global_hydra import GlobalHydra",
            "GlobalHydra.instance().clear()",
            f'initialize_config_dir(os.path.abspath("{home}"), version_base="1.2")',
        ]
    file = target / _SAM2_FILE if is_folder else target
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = f'"{name}", "{file}", device="{device}", hydra_overrides_extra=[{extra}]'
    if target.suffix.lower() == ".safetensors":
        lines += ["from safetensors.torch import load_file"]
        arguments = arguments.replace(f'"{file}"', "None")
    lines += [f"predictor = build_sam2_video_predictor({arguments})"]
    if target.suffix.lower() == ".safetensors":
        lines += [f'predictor.load_state_dict(load_file("{file}"))']
    if is_folder:
        lines += [
            "from transformers import Sam2VideoModel, Sam2VideoProcessor",
            f'model = Sam2VideoModel.from_pretrained("{target}")',
            f'processor = Sam2VideoProcessor.from_pretrained("{target}")',
        ]
    return "\n".join(lines)


def _config_of(experiment: Experiment) -> tuple[Path, bool]:
    """The file of the model's config, and whether it lies in SAM 2's package."""
    config = resolve_config(experiment.model.config_path)
    return config, "sam2" in config.parts and "configs" in config.parts


def model_card(experiment: Experiment, loaded: Loaded, source: Path, name: str) -> str:
    """The README.md of an exported folder: what the weights are, and what is known of them."""
    model = experiment.model
    base = Path(model.checkpoint_path).name if model.checkpoint_path else None
    header = ["license: apache-2.0", "library_name: transformers", "pipeline_tag: mask-generation"]
    header += ["tags: [sam2, video-object-segmentation]"]
    if base in PUBLISHED:
        size = base.removeprefix("sam2.1_hiera_").removesuffix(".pt").replace("_", "-")
        header += [f"base_model: facebook/sam2.1-hiera-{size}"]
    lines = ["---", *header, "---", "", f"# {name}", ""]
    lines += [f"SAM 2 fine-tuned with sam2train, from {base or 'random weights'}.", ""]
    lines += ["```python", how_to_load(experiment, Path(name)), "```", ""]
    if loaded.step is None:
        return "\n".join([*lines, "The file that it was made of says nothing of its training.", ""])
    content = load(source)
    settings = to_yaml(Experiment.model_validate(read_yaml(content["config"], str(source))))
    prints = [f"- {split}: `{value}`" for split, value in content.get("data", {}).items()]
    lines += [f"Trained for {loaded.step} steps; the run's id is {content['run_id']}.", ""]
    lines += ["## Scores", "", *_score_lines(RunFolder.of_checkpoint(source), loaded.step), ""]
    lines += ["## Data", "", "Fingerprints of masks and frames: equal where the data are.", ""]
    lines += [*prints, "", "## Settings", "", "```yaml", settings.rstrip(), "```", ""]
    lines += ["## Licence", "", "SAM 2's code and weights are under Apache-2.0, and so are these."]
    lines += ["The licence of the data that they were trained on may ask for more.", ""]
    lines += [f"sha256 of the checkpoint: `{file_hash(source)}`", ""]
    return "\n".join(lines)


def _score_lines(run: RunFolder, step: int) -> list[str]:
    """A table of J&F by split: the checkpoint's, the base's and the copied mask's, with intervals
    over videos."""
    if not run.scores.is_file():
        return ["The run's scores do not lie beside the checkpoint."]
    _, rows = read_table(run.scores, SCORE_COLUMNS, lambda line: None)
    lines = ["| split | videos | J&F | untouched base | copied first mask | against the base |"]
    lines += ["|---|---|---|---|---|---|"]
    for split in ("val", "test"):
        steps = {(r["model"], int(r["step"])) for r in rows if r["split"] == split}
        base = (BASE, 0) if (BASE, 0) in steps else (TRAINED, 0)
        if not {(TRAINED, step), base} <= steps:
            continue
        found = [
            read_scores(rows, split, *which, which[0])
            for which in ((TRAINED, step), base, (COPY, 0))
            if which in steps
        ]
        values = [f"{scores.means['J_and_F']:.3f}" for scores in found] + [""] * (3 - len(found))
        videos = len({row["video_id"] for row in found[0].objects})
        gain = difference(found[1], found[0]).text(sign=True)
        lines.append(f"| {split} | {videos} | {' | '.join(values)} | {gain} |")
    return [
        *lines,
        "",
        "J&F as DAVIS counts it; the intervals (95 %) are paired bootstraps over videos.",
        "Validation chose the checkpoint, so its numbers are too high.",
    ]


def compare_masks(one: SAM2Model, other: SAM2Model) -> tuple[float, int]:
    """How far apart two models are on a small generated clip.

    Returns:
        The share of pixels that are in the mask of one of them only, and the pixels in the masks of
        the first. NaN logits count as apart.
    """
    clip, prompt = _test_clip(one.image_size)
    logits = []
    for model in (one, other):
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits.append(model(clip.to(model.device), None, [[prompt]])["pred_masks"].cpu())
        model.train(was_training)
    apart = ((logits[0] > 0) != (logits[1] > 0)) | logits[0].isnan() | logits[1].isnan()
    return float(apart.float().mean()), int((logits[0] > 0).sum())


def _test_clip(side: int) -> tuple[torch.Tensor, Prompt]:
    """(1, T, 3, H, W) of a bright square that moves over noise, and its box on frame 0."""
    rng = np.random.default_rng(0)
    clip = rng.normal(size=(1, 4, 3, side, side)).astype(np.float32)
    edge = side // 4
    for t in range(4):
        clip[0, t, :, edge : 2 * edge, edge + 2 * t : 2 * edge + 2 * t] += 2
    box = np.array([edge, edge, 2 * edge - 1, 2 * edge - 1], np.float32)
    return torch.from_numpy(clip), {**empty_prompt(1, 0), **box_fields(box)}


def _changed(experiment: Experiment, **of_model: Any) -> Experiment:
    """The experiment with other settings of the model."""
    model = experiment.model.model_copy(update=of_model)
    return experiment.model_copy(update={"model": model})


def _compare_weights(model: SAM2Model, weights: Mapping[str, torch.Tensor]) -> None:
    for name, value in model.sam2.state_dict().items():
        assert torch.equal(value.cpu(), weights[name].to(value.dtype)), name
