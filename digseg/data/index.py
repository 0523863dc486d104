"""A shard's index in memory: where every sample lies, in a few arrays instead of an object a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from digseg.data.format import IndexEntry

_ABSENT = -1


class ShardIndex:
    """The entries of one idx file in about 30 bytes and 16 more a member and sample, and the keys.

    Numbered as the samples lie in the tar.
    """

    def __init__(self, entries: Sequence[IndexEntry]) -> None:
        self._members = tuple(dict.fromkeys(member for entry in entries for member in entry.members))
        keys = [entry.key.encode() for entry in entries]
        self._keys = b"".join(keys)
        self._key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self._spans = np.array([(entry.start, entry.end) for entry in entries], dtype=np.int64)
        self._checksums = np.array([entry.crc32 for entry in entries], dtype=np.uint32)
        absent = (_ABSENT, _ABSENT)
        places = [entry.members.get(member, absent) for entry in entries for member in self._members]
        self._places: npt.NDArray[np.int64] = np.array(places, dtype=np.int64).reshape(
            len(entries), len(self._members), 2
        )

    def __len__(self) -> int:
        return len(self._checksums)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays and keys."""
        arrays = (self._key_ends, self._spans, self._checksums, self._places)
        return len(self._keys) + sum(array.nbytes for array in arrays)

    def key(self, number: int) -> str:
        """The key of a sample."""
        begin = int(self._key_ends[number - 1]) if number else 0
        return self._keys[begin : int(self._key_ends[number])].decode()

    def entry(self, number: int) -> IndexEntry:
        """The entry of a sample, as it was given."""
        start, end = self._spans[number].tolist()
        places = zip(self._members, self._places[number].tolist(), strict=True)
        return IndexEntry(
            self.key(number),
            {member: (offset, size) for member, (offset, size) in places if offset != _ABSENT},
            start,
            end,
            int(self._checksums[number]),
        )
