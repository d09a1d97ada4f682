"""WebDataset shards: tars that hold of each row ID.png, ID.json and ID.txt. Their bytes follow from these.

    shards/000007.tar       number 7 of the plan, whose rows follow from the table and --shards alone

A shard is written to a file of this machine, and gets its name when it is whole.
"""

from __future__ import annotations

import io
import tarfile


def shard_name(number: int) -> str:
    return f"shards/{number:06}.tar"


def add_row(tar: tarfile.TarFile, row_id: str, members: dict[str, bytes]) -> dict[str, int]:
    """Add a row's members by their suffixes; gives the offsets of their bytes in the file."""
    offsets = {}
    for suffix, data in members.items():
        member = tarfile.TarInfo(f"{row_id}{suffix}")  # of time 0 and of nobody
        member.size = len(data)
        offsets[suffix] = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(member, io.BytesIO(data))
    return offsets


class OldShard:
    """A tar that is there already, to take rows from."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in self._tar:
            stem, dot, suffix = member.name.partition(".")
            self._members.setdefault(stem, {})[f"{dot}{suffix}"] = member

    def members(self, row_id: str) -> dict[str, bytes]:
        """A row's members by their suffixes, in their order."""
        found = self._members[row_id].items()
        return {suffix: self._tar.extractfile(member).read() for suffix, member in found}  # type: ignore[union-attr]
