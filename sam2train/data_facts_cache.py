"""What mask pictures hold, kept under cache/ by the content of their files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from sam2train.data_index import INDEX_FOLDER
from sam2train.data_mask_facts import MaskFacts, read_facts
from sam2train.files import check_regular, write_bytes

# To change where `read_facts` counts other things: facts of before are not read then.
_FACTS_VERSION = b"sam2train mask facts 1 "
_COUNT_FIELDS = ("areas", "border", "interior", "alone", "touching", "palette")
# New masks from which facts are written; those of fewer are found again in less than a second.
WRITTEN_FROM = 200


class FactsCache:
    """Facts of the masks of one data set. A picture is read once: its bytes give the name of its
    facts, and are decoded only where no facts have this name.

    Args:
        path: of the data set; each has a file of its own.
    """

    def __init__(self, path: Path):
        name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()
        self.file = INDEX_FOLDER / f"{name[:32]}.masks"
        self._kept: dict[str, list] = {}
        self._palettes: list[str] = []
        self._used: dict[str, MaskFacts] = {}
        self._num_new: list[None] = []  # of threads: to append is one step, to count is not
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            head, body = self.file.read_bytes().split(b"\n", 1)
            if head == _FACTS_VERSION + str(zlib.crc32(body)).encode():
                content = json.loads(body)
                self._kept, self._palettes = content["facts"], content["palettes"]

    def read(self, path: Path) -> MaskFacts:
        """What a mask picture holds. Raises UserError as `read_facts` does."""
        check_regular(path)
        try:
            raw = path.read_bytes()
        except OSError:
            return read_facts(path)  # says why it cannot be read
        name = hashlib.blake2b(raw, digest_size=16).hexdigest()
        kept = self._kept.get(name)
        if kept is not None:
            facts = self._unpack(path, kept)
        else:
            facts = read_facts(path, raw)
            self._num_new.append(None)
        self._used[name] = facts
        return facts

    def write(self) -> None:
        """Keep the facts that were used, if enough of them are new; a folder that takes no file is
        no error."""
        if len(self._num_new) < WRITTEN_FROM:
            return
        palettes: dict[bytes, int] = {}
        packed = {}
        for name, facts in self._used.items():
            number = palettes.setdefault(facts.whole_palette, len(palettes))
            counts = [list(getattr(facts, field).items()) for field in _COUNT_FIELDS]
            packed[name] = [list(facts.size), facts.kind, counts, number]
        content = {"facts": packed, "palettes": [palette.hex() for palette in palettes]}
        body = json.dumps(content, separators=(",", ":")).encode()
        with contextlib.suppress(OSError):
            write_bytes(self.file, _FACTS_VERSION + str(zlib.crc32(body)).encode() + b"\n" + body)

    def _unpack(self, path: Path, kept: list[Any]) -> MaskFacts:
        size, kind, counts, palette = kept
        *counters, colours = map(dict, counts)
        return MaskFacts(
            path,
            tuple(size),
            kind,
            *map(Counter, counters),
            palette=colours,
            whole_palette=bytes.fromhex(self._palettes[palette]),
        )
