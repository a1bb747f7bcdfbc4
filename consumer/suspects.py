"""A record that ends the process while it is decoded is decoded twice, and not a third time.

Decoding is guarded in many ways, but it runs other people's code on other people's bytes. Were one record to end the
process (a crash in compiled code, memory that runs out at once), it would do so again after every restart, for its
offset is never committed. So each partition has a small file, a *note*, mapped into memory:

1. Before a record is decoded its timestamp and offset are noted, after it the offset is taken back: three stores into
   memory, about 0.1 µs a record. What is in a shared mapping outlives the process, without a flush; only the machine's
   own end loses it, and then nothing has to be known.
2. Opening a note that has an offset in it means that the last process ended just there: the record has a *death* more.
3. A record with :data:`DEATHS_MAX` deaths is *condemned*: it is answered as poison, undecoded.

The note is exact, as nothing else is done between the two: a process that is killed while it waits, or works on an
operation, leaves none. One that is killed by chance while it decodes leaves one death, and would have to be killed by
chance at the same record again.

Offset and timestamp together name a record, so that a topic that was deleted and created anew has its own. The file's
name holds cluster, group, topic and partition: all processes of a host may share the folder, and a partition's next
owner there knows what happened to the one before.

Without a folder that can be written to there are no notes: the service runs as well, and says so once.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from consumer.log import get_logger

DEATHS_MAX = 2
"""Once can be chance, and a condemned record is answered with a failure, which would be wrong for a good one."""

ENTRIES_MAX = 128
"""Records of one partition that are remembered, the newest. There can be more than one before the first commit: one
that is condemned is passed by, and the next one kills. 128 fit a page with the rest."""

_MAGIC = 0x7473_6E6F_7465_3031  # "tsnote01"
_FIELDS = struct.Struct("=qqqq")
"""Magic, offset and timestamp of the record being decoded, number of entries."""
_ENTRY = struct.Struct("=qqq")
"""Offset, timestamp, deaths."""
_BYTES = mmap.PAGESIZE
assert _FIELDS.size + ENTRIES_MAX * _ENTRY.size <= 4096

OFFSET, TIMESTAMP = 1, 2
"""Where in :attr:`Note.slots` the record being decoded is noted. The offset is written last and taken back first."""
NOBODY = -1
"""In place of the offset: nothing is being decoded."""

log = get_logger(__name__)


class Note:
    """The note of one partition, open; made by :meth:`Suspects.open_notes`.

    Whoever decodes writes ``slots[TIMESTAMP]`` and ``slots[OFFSET]`` before, and ``slots[OFFSET] = NOBODY`` after: by
    hand, as a call would cost as much as the stores.
    """

    __slots__ = ("_map", "condemned", "slots")

    def __init__(self, mapped: mmap.mmap, name: str) -> None:
        self._map = mapped
        self.slots = memoryview(mapped).cast("q")
        self.condemned: frozenset[tuple[int, int]] = _look_back(mapped, name)
        """Offset and timestamp of the records that must not be decoded."""

    def close(self) -> None:
        """Let go of the file; nothing may be noted any more. A second call does nothing."""
        self.slots.release()
        self._map.close()


class Suspects:
    """Opens the notes of a group's partitions in one folder.

    Args:
        folder: Where the files lie; made when it is first needed, for its owner only.
        cluster_id: The Kafka cluster.
        group_id: The consumer group.
    """

    def __init__(self, folder: Path, *, cluster_id: str, group_id: str) -> None:
        self._folder = folder
        self._names = cluster_id, group_id
        self._told = False

    def open_notes(self, partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Note]:
        """Open the note of each partition; those that cannot be opened are left out. Blocking: reads and writes files.

        What the process before died of, if it did, is added up and logged here.
        """
        notes: dict[tuple[str, int], Note] = {}
        try:
            self._prepare_folder()
            for topic, partition in partitions:
                notes[topic, partition] = Note(self._mapped(topic, partition), f"{topic}/{partition}")
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning(
                    "records that end the process cannot be noted, so one could end it again and again",
                    folder=str(self._folder),
                    error=str(error),
                )
        return notes

    def _prepare_folder(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._folder.lstat()
        # Below the system's temporary folder somebody else could have put it there before us.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{self._folder} is not a folder of ours alone")

    def _mapped(self, topic: str, partition: int) -> mmap.mmap:
        digest = blake2b("\0".join((*self._names, topic, str(partition))).encode(), digest_size=8).hexdigest()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(self._folder / f"{topic[:100]}-{partition}-{digest}.note", flags, 0o600)
        try:
            if os.fstat(file).st_size != _BYTES:
                os.ftruncate(file, 0)
                os.pwrite(file, bytes(_BYTES), 0)  # a full disk is an error here, and not a bus error at a store
            return mmap.mmap(file, _BYTES)
        finally:
            os.close(file)


def _look_back(mapped: mmap.mmap, name: str) -> frozenset[tuple[int, int]]:
    """Add up what the last process died of, if anything; return the condemned records."""
    magic, offset, timestamp, number = _FIELDS.unpack_from(mapped)
    if magic != _MAGIC or not 0 <= number <= ENTRIES_MAX:
        mapped[:] = bytes(_BYTES)
        _FIELDS.pack_into(mapped, 0, _MAGIC, NOBODY, 0, 0)
        return frozenset()
    deaths: dict[tuple[int, int], int] = {}
    for entry in range(number):
        known, at, times = _ENTRY.unpack_from(mapped, _FIELDS.size + entry * _ENTRY.size)
        deaths[known, at] = times
    if offset != NOBODY:
        record = offset, timestamp
        deaths[record] = deaths.pop(record, 0) + 1
        log.error("the process before ended while it decoded", partition=name, offset=offset, times=deaths[record])
        deaths = dict(list(deaths.items())[-ENTRIES_MAX:])
        for entry, ((known, at), times) in enumerate(deaths.items()):
            _ENTRY.pack_into(mapped, _FIELDS.size + entry * _ENTRY.size, known, at, times)
        _FIELDS.pack_into(mapped, 0, _MAGIC, NOBODY, 0, len(deaths))
    return frozenset(record for record, times in deaths.items() if times >= DEATHS_MAX)
