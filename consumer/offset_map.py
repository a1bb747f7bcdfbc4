"""The offset map: which offsets above a committed one are finished, as text in the commit's metadata (pure).

One stuck record holds the commit of its partition back while work above it goes on. The map keeps that work from being
done again: whoever owns the partition next does not run what the map says is finished (contract 3).

**Text**: ``ts1:``, then base 64 of

======== ============ ==================================================================
bytes    field        meaning
======== ============ ==================================================================
1        form         0 = run lengths, 1 = bits: whichever is shorter
8        base         the offset committed beside it, big-endian
1 + n    cluster      length and UTF-8 bytes of the cluster's id, cut at 255 bytes
m        finished     run lengths: pairs of varints (offsets skipped, offsets finished);
                      bits: one for each offset from *base* on, first one highest
4        checksum     CRC-32 of everything before it, big-endian
======== ============ ==================================================================

Base and cluster stand inside because mirroring tools copy metadata beside offsets they translate: there the same text
would mean other records.

**It always fits.** All finished offsets lie below ``base + SPAN_MAX``, since reading stops that far above the lowest
unfinished one. So there are at most ``SPAN_MAX`` bits, and the longer form is never taken:

    1 + 8 + 1 + 255 + 20,000 / 8 + 4 = 2,769 bytes;  4 + ⌈2,769 / 3⌉ · 4 = 3,696 characters, of the 4,096 allowed.

**Reading** never raises. A text that is not to be believed gives a map without effect and the reason: then the records
above the commit run again, which repeats responses and loses nothing; believing a wrong one would lose records.

One wrong one is believed: where the end of the log was lost (unclean leader election) and the log has grown past what
the map speaks of before it is read, other records stand at some of its offsets, and are skipped. Only leader epochs
would tell, which neither the text nor the client has. Where the log is still shorter, the map is ``beyond_log_end``.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

PREFIX: Final = "ts1:"
"""What a map begins with: our name and the version of the form."""

CHARACTERS_MAX: Final = 4096
"""What a Kafka broker takes as metadata of a commit unless told otherwise (``offset.metadata.max.bytes``)."""

SPAN_MAX: Final = 20_000
"""Offsets a map can speak of, the base included."""

CLUSTER_BYTES_MAX: Final = 255
"""Bytes of a cluster's id that are kept; ids are 22 characters with Apache Kafka and below 60 elsewhere."""

Run: TypeAlias = tuple[int, int]
"""First and last of successive offsets, both included."""

Reason: TypeAlias = Literal[
    "absent",
    "foreign",
    "newer_version",
    "damaged",
    "other_cluster",
    "other_base",
    "too_distant",
    "beyond_log_end",
]
"""Why a map has no effect.

``absent``
    There is no metadata.
``foreign``
    The metadata was not written by this program.
``newer_version``
    A newer release wrote it, in a form this one does not know.
``damaged``
    The checksum, the length or the form is wrong.
``other_cluster``, ``other_base``
    Metadata copied from elsewhere, or beside an offset that something else has changed.
``too_distant``
    It speaks of offsets further above the base than reading ever goes.
``beyond_log_end``
    It speaks of offsets that do not exist: the log was cut or created anew.
"""

_RUN_LENGTHS: Final = 0
_BITS: Final = 1
_VERSIONED: Final = re.compile(r"ts(\d{1,9}):")
_ONES: Final = re.compile("1+")
_VARINT_BYTES_MAX: Final = 9


@dataclass(frozen=True, slots=True)
class OffsetMap:
    """What a text says."""

    base: int | None
    """The offset it was committed beside; None where the text cannot be read."""
    finished: tuple[Run, ...]
    """Finished offsets, ascending, never adjacent, none below the base. Not to be used unless :attr:`valid`."""
    reason: Reason | None
    """Why it has no effect; None where it holds."""

    @property
    def valid(self) -> bool:
        """True where the offsets may be skipped."""
        return self.reason is None


class _Damaged(Exception):
    """The bytes are not what :func:`encode` writes."""


class SizeLimit:
    """The longest map that is committed: what brokers take by default, and less once one has refused a map."""

    __slots__ = ("_characters_max",)

    def __init__(self) -> None:
        self._characters_max = CHARACTERS_MAX

    def fitting(self, text: str) -> str:
        """Return *text* where it may be committed, else nothing: the offset alone is committed then."""
        return text if len(text) <= self._characters_max else ""

    def refused(self, characters: int) -> bool:
        """A broker has refused a map of so many characters: from now on they have half as many at most.

        By halves, so that few commits are refused until the limit is kept to.

        Returns:
            True the first time.
        """
        first = self._characters_max == CHARACTERS_MAX
        self._characters_max = min(self._characters_max, characters // 2)
        return first


def encode(base: int, finished: Iterable[Run], cluster_id: str) -> str:
    """Return the text that says that *finished* is finished above *base*; empty where nothing is.

    Args:
        base: The offset committed beside it, 0 to 2⁶³ - 1.
        finished: Runs, ascending, with a gap between them, from *base* up to below ``base + SPAN_MAX``.
        cluster_id: Where the offsets mean something.

    Returns:
        ASCII, at most 3,696 characters.

    Raises:
        ValueError: *finished* is not as described.
    """
    runs = list(finished)
    if not runs:
        return ""
    lowest = base
    for first, last in runs:
        if not lowest <= first <= last:
            raise ValueError(f"run {first}..{last} begins below {lowest} or has no end")
        lowest = last + 2
    distance = runs[-1][1] - base
    if distance >= SPAN_MAX:
        raise ValueError(f"offset {runs[-1][1]} lies {distance} above {base}, the most is {SPAN_MAX - 1}")
    bits_size = distance // 8 + 1
    form, body = _RUN_LENGTHS, _run_lengths(base, runs, bits_size)
    if len(body) > bits_size:
        form, body = _BITS, _bits(base, runs, bits_size)
    cluster = _cut(cluster_id)
    content = b"".join((bytes([form]), base.to_bytes(8, "big"), bytes([len(cluster)]), cluster, body))
    return PREFIX + base64.b64encode(content + zlib.crc32(content).to_bytes(4, "big")).decode("ascii")


def decode(text: str, *, committed_offset: int, cluster_id: str, end: int | None) -> OffsetMap:
    """Return what *text* says, and whether it holds.

    Args:
        text: Metadata of a commit; anything.
        committed_offset: The offset of that commit.
        cluster_id: The cluster that was asked.
        end: The partition's high watermark; None = not known and not compared.
    """
    if not text:
        return OffsetMap(None, (), "absent")
    if not text.startswith(PREFIX):
        return OffsetMap(None, (), "newer_version" if _VERSIONED.match(text) else "foreign")
    try:
        base, cluster, runs = _read(text)
    except _Damaged:
        return OffsetMap(None, (), "damaged")
    reason: Reason | None = None
    if cluster != _cut(cluster_id):
        reason = "other_cluster"
    elif base != committed_offset:
        reason = "other_base"
    elif runs and runs[-1][1] - base >= SPAN_MAX:
        reason = "too_distant"
    elif end is not None and runs and runs[-1][1] >= end:
        reason = "beyond_log_end"
    return OffsetMap(base, tuple(runs), reason)


def count(runs: Iterable[Run]) -> int:
    """Return how many offsets *runs* hold."""
    return sum(last - first + 1 for first, last in runs)


# ------------------------------------------------------------------------------------------------- the two forms


def _run_lengths(base: int, runs: Iterable[Run], size_max: int) -> bytes:
    """Return the run lengths, or their beginning, which is longer than *size_max* bytes."""
    written = bytearray()
    before = base
    for first, last in runs:
        if len(written) > size_max:
            break
        for number in (first - before, last - first + 1):
            rest = number
            while rest > 0x7F:
                written.append(rest & 0x7F | 0x80)
                rest >>= 7
            written.append(rest)
        before = last + 1
    return bytes(written)


def _bits(base: int, runs: Iterable[Run], size: int) -> bytes:
    digits = bytearray(b"0") * (size * 8)
    for first, last in runs:
        digits[first - base : last - base + 1] = b"1" * (last - first + 1)
    return int(digits, 2).to_bytes(size, "big")


def _read(text: str) -> tuple[int, bytes, list[Run]]:
    """Return base, cluster and runs.

    Raises:
        _Damaged: they are not there.
    """
    try:
        content = binascii.a2b_base64(text[len(PREFIX) :].encode("ascii"), strict_mode=True)
    except ValueError:  # not ASCII, or not base 64
        raise _Damaged from None
    if len(text) > CHARACTERS_MAX or len(content) < 1 + 8 + 1 + 4:
        raise _Damaged
    content, checksum = content[:-4], content[-4:]
    form, base, cluster_end = content[0], int.from_bytes(content[1:9], "big"), 10 + content[9]
    if zlib.crc32(content).to_bytes(4, "big") != checksum or cluster_end > len(content) or base >= 2**63:
        raise _Damaged
    cluster, body = content[10:cluster_end], content[cluster_end:]
    if form == _RUN_LENGTHS:
        return base, cluster, _read_run_lengths(base, body)
    if form == _BITS:
        return base, cluster, _read_bits(base, body)
    raise _Damaged


def _read_run_lengths(base: int, body: bytes) -> list[Run]:
    numbers: list[int] = []
    number = shift = 0
    for byte in body:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte <= 0x7F:
            numbers.append(number)
            number = shift = 0
        elif shift >= 7 * _VARINT_BYTES_MAX:
            raise _Damaged
    if shift or len(numbers) % 2:
        raise _Damaged
    runs: list[Run] = []
    position = base
    for skipped, length in zip(numbers[::2], numbers[1::2], strict=True):
        if length == 0 or (runs and skipped == 0):
            raise _Damaged
        first = position + skipped
        position = first + length
        runs.append((first, position - 1))
    return runs


def _read_bits(base: int, body: bytes) -> list[Run]:
    if not body:
        return []
    digits = format(int.from_bytes(body, "big"), f"0{len(body) * 8}b")
    return [(base + found.start(), base + found.end() - 1) for found in _ONES.finditer(digits)]


def _cut(cluster_id: str) -> bytes:
    return cluster_id.encode("utf-8", "surrogatepass")[:CLUSTER_BYTES_MAX]
