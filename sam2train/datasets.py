"""The data sets: the `dataset:` section, the table of data formats, and the guide's classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sam2train import demo
from sam2train.clips import collate_fn as collate_fn  # beside the data sets it batches
from sam2train.config import Section, one_of
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_coco import CocoVideos, Unlabelled
from sam2train.data_coco_objects import Crowds
from sam2train.data_cvat import cvat_file
from sam2train.data_layouts import read_layout
from sam2train.data_mask_values import MaskValues
from sam2train.data_sav import MevisVideos, read_sav
from sam2train.data_source import (
    NOTHING_TO_TRACK,
    DataError,
    Mixture,
    VideoSource,
    files_outside,
    listed,
    only_prompts,
)
from sam2train.data_synthetic import SyntheticConfig
from sam2train.data_videos import MadeUpVideos
from sam2train.data_vos import MotsVideos, VosVideos, find_masks
from sam2train.prompts import (
    DEFAULT_TYPES,
    BoxJitter,
    Clicks,
    TypeName,
    Weight,
    check_prompts,
)
from sam2train.transforms import AugmentConfig

_SHOWN_LINES = 5  # of the notes and of the warnings of a path; --check-data lists all


@dataclass(frozen=True)
class Format:
    """One way of storing videos, with what the `dataset:` section has for it alone."""

    about: str  # what it reads, for the description of `dataset_type`
    read: Callable[[Path, DatasetConfig], VideoSource]
    keys: tuple[str, ...] = ()  # of the section, read by this format; an error with most others
    takes_json: bool = False  # False: a JSON named for validation or test is read as COCO
    num_of_pos_points: int | tuple[int, int] = 1  # where the section has none


def _read_coco(path: Path, config: DatasetConfig, layout: str | None = None) -> CocoVideos:
    keys = ("image_root", "unlabelled_frames", "same_object_twice", "crowds")
    return read_layout(path, layout=layout, **{key: getattr(config, key) for key in keys})


_JSON_KEYS = ("image_root", "unlabelled_frames", "same_object_twice", "crowds")

# Data formats by their name in `dataset_type`. A new one is a module with a child of `VideoSource`
# and a line here.
FORMATS = {
    "coco": Format("masks from a COCO JSON", _read_coco, keys=_JSON_KEYS, takes_json=True),
    "video": Format(
        "folders of frames, made-up objects",
        lambda path, config: MadeUpVideos(path, config.synthetic, config.max_objects),
        keys=("synthetic",),
        num_of_pos_points=(1, 3),
    ),
    "vos": Format(
        "JPEGImages and Annotations as DAVIS has them",
        lambda path, config: read_folders(path, config),
        keys=("mask_values",),
    ),
    "sav": Format(
        "films or frames and SA-V's JSON",
        lambda path, config: read_sav(path, config.annotation_stride, config.mask_values),
        keys=("annotation_stride", "mask_values"),
    ),
    "mots": Format(
        "images and instances, PNGs of ids class * 1000 + number", lambda path, _: MotsVideos(path)
    ),
    "mevis": Format("JPEGImages and MeViS' mask_dict.json", lambda path, _: MevisVideos(path)),
    "youtube_vis": Format(
        "the JSON of YouTube-VIS or OVIS",
        lambda path, config: _read_coco(path, config, "youtube_vis"),
        keys=_JSON_KEYS,
        takes_json=True,
    ),
    "burst": Format(
        "the JSON of BURST",
        lambda path, config: _read_coco(path, config, "burst"),
        keys=_JSON_KEYS,
        takes_json=True,
    ),
    "cvat": Format(
        "CVAT's XML for images or for video",
        lambda path, config: _read_coco(path, config, "cvat"),
        keys=_JSON_KEYS,
    ),
    "label_studio": Format(
        "Label Studio's export JSON",
        lambda path, config: _read_coco(path, config, "label_studio"),
        keys=_JSON_KEYS,
        takes_json=True,
    ),
}


def read_folders(path: Path, config: DatasetConfig) -> VideoSource:
    """Folders of mask pictures; what lies there as MOTS, MeViS or CVAT have it is read as such, and
    a note says so."""
    if find_masks(path) is None:
        others = [("mots", MotsVideos.recognise), ("mevis", MevisVideos.recognise)]
        for name, recognise in [*others, ("cvat", cvat_file)]:
            if recognise(path):
                source = FORMATS[name].read(path, config)
                source.notes.insert(0, f"read as dataset_type: {name}, whose files lie here")
                return source
    return VosVideos(path, config.mask_values)


class DataPart(Section):
    """One of several training data sets."""

    path: str = Field(description="as data_path")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often an epoch visits each of its videos"
    )
    dataset_type: str | None = Field(None, description="null: that of the section")

    @field_validator("dataset_type")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        return name and one_of(name, FORMATS)


class DatasetConfig(Section):
    """The `dataset:` section of an experiment."""

    dataset_type: str = Field(
        "coco", description="; ".join(f"{name}: {known.about}" for name, known in FORMATS.items())
    )
    data_path: str | Annotated[tuple[DataPart, ...], Field(min_length=1)] = Field(
        description="training data: the COCO JSON, the folder of videos, or for vos, sav, mots and "
        "mevis the folder that holds them or a list of some of them (.txt) below it; a mixture is "
        "a list of these, or of {path, weight, dataset_type}"
    )
    val_path: str | None = Field(None, description="videos that choose the best checkpoint")
    test_path: str | None = Field(None, description="videos that a result is reported on")
    image_root: str | None = Field(None, description="coco: what image paths are relative to")
    mask_values: MaskValues = Field(
        "auto",
        description="vos, sav: what pixel values of masks mean; auto decides for each video and "
        "says what; ids: palette index or grey value, 255 is void; colours: each colour is an "
        "object; binary: one object, above half",
    )
    annotation_stride: int | None = Field(
        None,
        ge=1,
        description="sav: frames from one labelled frame to the next; null: what the counts say",
    )
    intensity_range: Literal["auto", "full"] | tuple[float, float] = Field(
        "auto",
        description="pictures of more than 8 bits: the values that become black and white in all "
        "frames of a video; auto takes the 0.5th and 99.5th percentile, full the file's own range",
    )
    unlabelled_frames: Unlabelled = Field(
        "auto",
        description="coco: frames without an annotation. auto: unlabelled where a key such as "
        "is_annotated says so, or every n-th frame is annotated; ignore: unlabelled; absent: "
        "objects are absent there",
    )
    same_object_twice: Literal["unite", "error"] = Field(
        "unite", description="coco: several annotations of one object on one frame"
    )
    crowds: Crowds = Field(
        "auto",
        description="coco: annotations with iscrowd. ignore: regions that no loss and no score "
        "counts; objects: objects; auto: ignore, unless all RLEs of the file have iscrowd",
    )
    image_size: tuple[int, int] = Field((512, 512), description="(H, W) of the model's input")
    video_clip_length: int = Field(5, ge=1, description="T, frames of a clip")
    max_frame_stride: int = Field(1, ge=1, description="largest step between frames of a clip")
    max_objects: int | None = Field(None, ge=1, description="objects of a clip; null takes all")
    batch_size: int = Field(1, ge=1, description="B, clips of a batch, in each process")
    num_workers: int = Field(0, ge=0, description="processes that load data; 0 loads in line")
    shuffle: bool = Field(True, description="clips in a new random order in each epoch")
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="of the order of clips, and of all that is drawn for a clip: frames, objects, "
        "augmentation, prompts, correction clicks; null: trainer.seed",
    )
    prompt_types: tuple[TypeName, ...] = Field(
        DEFAULT_TYPES, min_length=1, description="one of these is drawn for each object"
    )
    prompt_weights: tuple[Weight, ...] | None = Field(
        None, description="how often each of the prompt types is drawn; null draws all alike"
    )
    num_of_pos_points: Clicks | tuple[Clicks, Clicks] = Field(
        default_factory=lambda known: FORMATS[known["dataset_type"]].num_of_pos_points,
        alias="number_of_points",
        description="positive clicks of a point prompt, or their range [low, high]; "
        "where it is not given, 1, and [1, 3] for video",
    )
    include_center: bool = Field(
        False,
        alias="include_center_point",
        description="the first positive click is the pixel deepest inside the object",
    )
    num_of_neg_points: Clicks = Field(
        0, description="clicks of a point prompt beside the object, which say that it is not there"
    )
    box_jitter: BoxJitter = Field(0.0, description="noise of boxes, share of their side")
    max_conditioning_frames: int = Field(
        1, ge=1, description="a clip has 1 to this many; objects get a prompt on each"
    )
    mask_cache_mb: int = Field(
        256, ge=0, description="decoded masks kept in memory, of one data set in all processes"
    )
    restrict_to_root: bool = Field(
        False,
        description="refuse frames and masks that lie outside of the data's folder and image_root, "
        "links included; false tells of them",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error",
        description="a frame or mask that cannot be read while training: error stops and names it; "
        "skip draws another clip, tells and counts. What is scored always stops",
    )
    max_bad_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="skip: the share of clips, of an epoch at least, beyond which training stops",
    )
    synthetic: SyntheticConfig = Field(
        default_factory=SyntheticConfig, description="video: the made-up objects"
    )

    @field_validator("dataset_type", mode="before")
    @classmethod
    def _known_format(cls, name: Any) -> Any:
        return one_of(name, FORMATS)

    @field_validator("data_path", mode="before")
    @classmethod
    def _as_parts(cls, path: Any) -> Any:
        """A list of paths as parts of weight 1."""
        if isinstance(path, list | tuple):
            return [{"path": part} if isinstance(part, str) else part for part in path]
        return path

    @field_validator("intensity_range")
    @classmethod
    def _ascending(cls, wanted: Any) -> Any:
        if isinstance(wanted, tuple) and wanted[0] >= wanted[1]:
            raise ValueError("expected [black, white] with black below white")
        return wanted

    @model_validator(mode="after")
    def _fits_together(self) -> DatasetConfig:
        check_prompts(self, self.prompt_types, self.prompt_weights)
        return self

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> DatasetConfig:
        kinds = {self.dataset_type}
        if not isinstance(self.data_path, str):
            kinds |= {part.dataset_type for part in self.data_path if part.dataset_type}
        for key in sorted({key for known in FORMATS.values() for key in known.keys}):
            readers = [name for name, known in FORMATS.items() if key in known.keys]
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if not kinds & {*readers} and getattr(self, key) != default:
                names = " or ".join(f'"{name}"' for name in readers)
                raise ValueError(f"{key} is for dataset_type {names}; remove it")
        return self


def build_dataset(
    config: DatasetConfig,
    augment: AugmentConfig,
    seed: int,
    path: str | Sequence[DataPart],
    *,
    training: bool,
    say: Callable[[str], None] = print,
    known: dict[tuple[str, str], VideoSource] | None = None,
) -> ClipDataset:
    """The data set at one of the paths of a section; augmented where it is for training.

    Args:
        path: or the parts of a mixture; the demo data is drawn where it belongs if it is missing.
        say: gets a line for what takes a while, for what was concluded from the files, and for what
            looks odd in the data.
        known: sources by path and format, which are not read again; new ones are added.

    Raises:
        UserError: what is wrong with the data, all of it.
    """
    settings = clip_settings(
        config.image_size,
        config.video_clip_length,
        config.prompt_types,
        config.num_of_pos_points,
        config.include_center,
        config.num_of_neg_points,
        box_jitter=config.box_jitter if training else 0.0,
        prompt_weights=config.prompt_weights,
        max_objects=config.max_objects,
        max_frame_stride=config.max_frame_stride,
        max_conditioning_frames=config.max_conditioning_frames,
        augment=augment if training else None,
        seed=seed,
    )
    if isinstance(path, str):
        source = _read_source(config, path, config.dataset_type, training, say, known)
    else:
        kinds = [part.dataset_type or config.dataset_type for part in path]
        parts = [
            _read_source(config, part.path, kind, training, say, known)
            for part, kind in zip(path, kinds, strict=True)
        ]
        source = Mixture(parts, [part.weight for part in path])
    if config.intensity_range != "auto":
        source.scale_levels(config.intensity_range)
    dataset = ClipDataset(source, settings, config.mask_cache_mb)
    for kind, lines in (("notes", dataset.source.notes), ("warnings", dataset.warnings)):
        for line in lines[:_SHOWN_LINES]:
            say(f"{source.path}: {line}")
        if more := len(lines[_SHOWN_LINES:]):
            say(f"{source.path}: and {more} more {kind}; --check-data lists all")
    return dataset


def _read_source(
    config: DatasetConfig,
    path: str,
    kind: str,
    training: bool,
    say: Callable[[str], None],
    known: dict[tuple[str, str], VideoSource] | None,
) -> VideoSource:
    path = demo.resolve_data_path(path, say)
    # A COCO JSON has real masks: what trains on anything else can be validated on them.
    takes = (".json",) if FORMATS[kind].takes_json else (".xml",) if kind == "cvat" else ()
    if path.suffix in {".json", ".xml"} - {*takes} and not training:
        kind = "coco"
    known = {} if known is None else known
    key = str(path.resolve()), kind
    if key not in known:
        source = FORMATS[kind].read(path, config)
        _check_root(source, path, config)
        if not training and only_prompts(source.videos):
            source.notes.append(
                "each object has a mask on one frame only, its prompt, as in a test set: the "
                "objects can be tracked, not scored"
            )
            told = source.warnings
            source.warnings = [warning for warning in told if NOTHING_TO_TRACK not in warning]
        known[key] = source
    return known[key]


def _check_root(source: VideoSource, path: Path, config: DatasetConfig) -> None:
    """Refuse files outside the data's folder, or tell of them, as `restrict_to_root` says.

    The folder is that of the path, or of the file; of a list of videos, the one with the frames and
    masks. dataset.image_root is another.
    """
    above = find_masks(path) if path.suffix == ".txt" else None
    root = above[0].parent if above else path if path.is_dir() else path.parent
    roots = [root, *([Path(config.image_root)] if config.image_root else [])]
    found = files_outside(source.videos, roots, every=config.restrict_to_root)
    where = " and ".join(map(str, roots))
    if found and config.restrict_to_root:
        lies = [f"{file}: lies outside of {where}, at {file.resolve()}" for file in found]
        raise DataError(source, [f"{one}; dataset.restrict_to_root refuses it" for one in lies])
    if found:
        told = f"{listed([str(file) for file in found])}: outside of {where}"
        source.notes.append(f"{told}; dataset.restrict_to_root refuses such files")


def data_paths(path: str | Sequence[DataPart] | None) -> list[str]:
    """The paths that one of the settings names: none, one, or those of a mixture."""
    if path is None or isinstance(path, str):
        return [] if path is None else [path]
    return [part.path for part in path]


class COCODataset(ClipDataset):
    """Clips of COCO video annotations; see `ClipDataset`.

    Args:
        coco_json_path: the annotation file; see `CocoVideos`.
        image_root, unlabelled_frames, same_object_twice: see `CocoVideos`.
        mask_cache_mb: see `ClipDataset`.
        The others: see `clip_settings`.

    Raises:
        UserError: everything that is wrong with the annotations, in one message.
    """

    def __init__(
        self,
        coco_json_path: str | Path,
        image_size: tuple[int, int] = (512, 512),
        video_clip_length: int = 5,
        prompt_types: Sequence[str] | None = None,
        num_of_pos_points: int | tuple[int, int] = 1,
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        image_root: str | Path | None = None,
        unlabelled_frames: Unlabelled = "auto",
        same_object_twice: Literal["unite", "error"] = "unite",
        mask_cache_mb: int = 256,
        **settings: Any,
    ):
        points = (num_of_pos_points, include_center, num_of_neg_points)
        settings = clip_settings(image_size, video_clip_length, prompt_types, *points, **settings)
        source = read_layout(
            Path(coco_json_path),
            image_root,
            unlabelled_frames=unlabelled_frames,
            same_object_twice=same_object_twice,
        )
        super().__init__(source, settings, mask_cache_mb)


class VideoDataset(ClipDataset):
    """Clips of videos without annotations, with made-up objects: cut-outs of other frames.

    Another clip of a video has other objects. Whole videos, for evaluation, have objects of their
    own: `videos` names them, `read_frame` and `read_mask` draw them; see `MadeUpVideos`.

    Args:
        data_path: a folder with one sub-folder of frames for each video, or the frames of one
            video; see `VideoFolders`.
        number_of_points: range of the positive clicks of a point prompt, both ends included.
        synthetic: see `SyntheticConfig`.
        mask_cache_mb: see `ClipDataset`.
        The others: see `clip_settings`.

    Raises:
        UserError: no videos, or everything that is wrong with the pictures, in one message.
    """

    def __init__(
        self,
        data_path: str | Path,
        image_size: tuple[int, int] = (512, 512),
        video_clip_length: int = 5,
        prompt_types: Sequence[str] | None = None,
        number_of_points: tuple[int, int] = (1, 3),
        include_center: bool = False,
        num_of_neg_points: int = 0,
        *,
        synthetic: SyntheticConfig | None = None,
        mask_cache_mb: int = 256,
        **settings: Any,
    ):
        points = (number_of_points, include_center, num_of_neg_points)
        settings = clip_settings(image_size, video_clip_length, prompt_types, *points, **settings)
        source = MadeUpVideos(Path(data_path), synthetic, settings.max_objects)
        super().__init__(source, settings, mask_cache_mb)
