"""What a frozen image encoder makes of each image, kept on disk: encoded once, then read.

Epochs, validations, runs and the trials of a sweep share the entries. The name of an entry says all
that its values depend on, so that no entry is ever wrong for the one who reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sam2train.config import Section

if TYPE_CHECKING:
    import torch
    from torch import nn

# Whoever changes what an entry holds counts this up: entries from before are then never read.
_FORMAT = 1
_SUFFIX = ".safetensors"
_PARTIAL_AGE = 3600.0  # seconds after which an unfinished file is one of a killed process
# Bytes written between two looks at the whole folder, as a share of the budget: other processes
# write, too.
_LOOK_SHARE = 0.02

Maps = "list[torch.Tensor]"  # (1, C_l, H_l, W_l) each, finest first


class FeaturesConfig(Section):
    """The `features:` section."""

    cache: bool = Field(
        True,
        description="keep what a frozen image encoder makes of each image, so that it is encoded "
        "once for all epochs, validations, runs and trials",
    )
    folder: str = Field("cache/features", description="where; runs on one machine share it")
    max_gb: float = Field(
        20.0,
        gt=0,
        description="size of the folder; images of earlier runs go first, those of running ones "
        "stay, and further images are encoded each time",
    )


class FeatureCache:
    """Entries of one encoder in a folder that any number of processes read and write.

    Entries are written under a temporary name and renamed, so that a reader finds a whole file or
    none. One that is torn or changed all the same fails its checksum and is made again.

    Args:
        encoder: identifies the encoder and all else that its values depend on; see `identify`.
        device: where the maps are wanted.
        say: gets a line where entries can no longer be kept.
    """

    def __init__(
        self,
        config: FeaturesConfig,
        encoder: str,
        device: torch.device,
        say: Callable[[str], None] = print,
    ):
        self.root = Path(config.folder).expanduser()
        self.folder = self.root / encoder
        self.device = device
        self.max_bytes = int(config.max_gb * 1e9)
        self.num_hits = self.num_misses = 0
        self._say = say
        self._began = time.time()
        self._checked: set[str] = set()  # entries whose checksum this process has seen to be right
        self._num_bytes: int | None = None  # of all entries, as far as this process knows
        self._until_look = 0
        self._keeps = True

    def maps(self, images: Sequence[str], encode: Callable[[int], Maps]) -> Maps:
        """Maps of n images, (n, C_l, H_l, W_l) each.

        Every image is encoded alone: a convolution may round otherwise in a batch, and an entry
        must not depend on the images that happened to be encoded beside it.

        Args:
            images: the key of each, from the pixels that the encoder gets.
            encode: place in `images` -> its maps; called for what is not in the cache.
        """
        import torch

        found: dict[str, Maps] = {}
        for place, image in enumerate(images):
            if image in found:
                continue
            maps = self._read(image)
            self.num_hits += maps is not None
            self.num_misses += maps is None
            if maps is None:
                maps = encode(place)
                self._write(image, [of_level.cpu() for of_level in maps])
            elif self.device.type == "cuda":
                maps = [m.pin_memory().to(self.device, non_blocking=True) for m in maps]
            found[image] = maps
        return [torch.cat(level) for level in zip(*(found[i] for i in images), strict=True)]

    def _path(self, image: str) -> Path:
        return self.folder / image[:2] / f"{image}{_SUFFIX}"

    def _read(self, image: str) -> Maps | None:
        """The entry in memory that the file backs, or None where there is no whole one."""
        from safetensors import SafetensorError, safe_open

        path = self._path(image)
        try:
            with safe_open(path, framework="pt") as file:
                maps = [file.get_tensor(name) for name in sorted(file.keys(), key=int)]
                if image not in self._checked:
                    if (file.metadata() or {}).get("crc32") != _checksum(maps):
                        return None
                    self._checked.add(image)
                    with contextlib.suppress(OSError):  # the folder of somebody else: only read
                        os.utime(path)  # used last now
        except (OSError, SafetensorError, ValueError):  # missing, torn or no such file
            return None
        return maps or None

    def _write(self, image: str, maps: Maps) -> None:
        from safetensors.torch import save

        if not self._keeps:
            return
        content = save(
            {str(level): of_level.contiguous() for level, of_level in enumerate(maps)},
            {"crc32": _checksum(maps)},
        )
        path = self._path(image)
        partial = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            if not self._make_room(len(content)):
                self._stop(f"is full: features.max_gb is {self.max_bytes / 1e9:g}; raise it")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(content)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as problem:
            self._stop(f"cannot be written ({problem.strerror or problem}); free some room there")
            return
        self._checked.add(image)
        self._num_bytes += len(content)
        self._until_look -= len(content)

    def _stop(self, why: str) -> None:
        self._keeps = False
        self._say(
            f"the feature cache {self.root} {why}, or name another features.folder. Images that it "
            "has are still read, others are encoded each time"
        )

    def _make_room(self, num_bytes: int) -> bool:
        """Whether an entry of this size fits, after entries that nobody used since this process
        began have made room, the ones first that were not used for longest.

        Entries in use stay: each epoch visits all images in a new order, so dropping one for
        another would drop what is needed next.
        """
        if self._num_bytes is None or self._until_look <= 0:
            self._num_bytes = sum(size for _, size, _ in self._entries())
            self._until_look = int(_LOOK_SHARE * self.max_bytes)
        if self._num_bytes + num_bytes <= self.max_bytes:
            return True
        entries = sorted(self._entries())
        self._num_bytes = sum(size for _, size, _ in entries)
        # A little more than needed: the next entries fit without another look.
        goal = self.max_bytes - max(num_bytes, int(_LOOK_SHARE * self.max_bytes))
        for used, size, path in entries:
            if self._num_bytes <= goal or used >= self._began:
                break
            path.unlink(missing_ok=True)
            self._num_bytes -= size
        return self._num_bytes + num_bytes <= self.max_bytes

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Every file of every encoder: when it was used last, its bytes, its path. Unfinished files
        of killed processes are deleted."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                try:
                    facts = path.stat()
                except FileNotFoundError:  # another process made room
                    continue
                if name.endswith(_SUFFIX):
                    yield facts.st_mtime, facts.st_size, path
                elif name.endswith(".part") and time.time() - facts.st_mtime > _PARTIAL_AGE:
                    path.unlink(missing_ok=True)


class FeatureCaches:
    """The caches that one model uses: one for each precision, and for each state of its weights."""

    def __init__(
        self, config: FeaturesConfig, device: torch.device, say: Callable[[str], None] = print
    ):
        self.config, self.device, self.say = config, device, say
        self._caches: dict[tuple[str, int, int], FeatureCache] = {}
        self._parameters: dict[int, list[nn.Parameter]] = {}  # by the number of modules

    @property
    def counts(self) -> tuple[int, int]:
        """Images that were found, and all that were asked for, so far."""
        hits = sum(cache.num_hits for cache in self._caches.values())
        return hits, hits + sum(cache.num_misses for cache in self._caches.values())

    def of_encoder(self, modules: Sequence[nn.Module], config_file: Path) -> FeatureCache:
        """The cache for the modules as they are now, in the precision that autocast asks for."""
        import torch

        precision, kind = "float32", self.device.type
        if torch.is_autocast_enabled(kind):
            precision = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        # Torch counts the changes of each parameter: other weights are another encoder.
        count = len(modules)
        if count not in self._parameters:  # to find them takes longer than to read a frame
            self._parameters[count] = [p for module in modules for p in module.parameters()]
        key = precision, count, sum(p._version for p in self._parameters[count])
        if key not in self._caches:
            built = config_file.read_bytes() + precision.encode()
            name = identify(modules, built, self.device)
            self._caches[key] = FeatureCache(self.config, name, self.device, self.say)
        return self._caches[key]


def _checksum(maps: Maps) -> str:
    """Over the bytes of all maps; it detects damage, not intent."""
    import torch

    value = 0
    for of_level in maps:
        raw = of_level.detach().contiguous().view(torch.uint8).flatten().numpy()
        value = zlib.crc32(raw, value)
    return f"{value:08x}"


def identify(modules: Sequence[nn.Module], config: bytes, device: torch.device) -> str:
    """Names an encoder with all that its values depend on beside the image: 32 hex digits.

    Args:
        modules: what computes the features; their parameters and buffers are hashed.
        config: the file that the encoder was built from, for what is no parameter.
        device: kind and number of threads decide on the order of sums.
    """
    import torch

    digest = hashlib.sha256(config)
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.numpy())
    on = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name(device)
    precision = torch.get_float32_matmul_precision()
    digest.update(f"{_FORMAT} {torch.__version__} {device.type} {on} {precision}".encode())
    return digest.hexdigest()[:32]
