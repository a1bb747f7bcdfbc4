"""The offset map: what is written is read back, fits, and is not believed where it may mean other records."""

from __future__ import annotations

import base64
import random
import string
import zlib

import pytest

from consumer import offset_map
from consumer.offset_map import CHARACTERS_MAX, SPAN_MAX, OffsetMap, SizeLimit, count, decode, encode
from consumer.offsets import DISTANCE_MAX

CLUSTER = "dGllcnN0cmVhbS10ZXN0cw"

EVERY_SECOND = [(offset, offset) for offset in range(1, SPAN_MAX, 2)]


def read(text: str, committed_offset: int = 100, cluster_id: str = CLUSTER, end: int | None = None) -> OffsetMap:
    """Decode with the circumstances of most tests here."""
    return decode(text, committed_offset=committed_offset, cluster_id=cluster_id, end=end)


def assembled(body: bytes, *, form: int = 0, base: int = 100, cluster: bytes = CLUSTER.encode()) -> str:
    """A text with a right checksum around anything, as the module's docstring describes it."""
    content = bytes([form]) + base.to_bytes(8, "big") + bytes([len(cluster)]) + cluster + body
    return "ts1:" + base64.b64encode(content + zlib.crc32(content).to_bytes(4, "big")).decode()


@pytest.mark.parametrize(
    "runs",
    [
        [(100, 100)],
        [(101, 101)],
        [(100, 100 + SPAN_MAX - 1)],
        [(101, 150), (152, 152), (154, 3000)],
        [(100 + SPAN_MAX - 1, 100 + SPAN_MAX - 1)],
        [(100 + offset, 100 + offset) for offset in range(0, SPAN_MAX, 2)],
        [(offset, offset + 1) for offset in range(101, 400, 3)],
    ],
    ids=["base", "one", "all", "runs", "last", "alternating", "pairs"],
)
def test_what_is_written_is_read_back(runs: list[tuple[int, int]]) -> None:
    """Contract 3: the map is what the next owner knows of finished work above the commit."""
    text = encode(100, runs, CLUSTER)

    assert text.startswith("ts1:")
    assert text.isascii()
    assert read(text, end=100 + SPAN_MAX) == OffsetMap(100, tuple(runs), None)


def test_offsets_may_be_as_large_as_kafka_s() -> None:
    """63 bits."""
    base = 2**63 - 10
    text = encode(base, [(base + 1, base + 8)], CLUSTER)

    assert read(text, base, end=2**63 - 1).finished == ((base + 1, base + 8),)


def test_nothing_finished_is_no_text() -> None:
    """A commit without a map is as short as any other client's, and a cleared map leaves nothing."""
    assert encode(100, [], CLUSTER) == ""
    assert read("") == OffsetMap(None, (), "absent")


def test_the_form_is_as_documented() -> None:
    """Upgrades read what older releases wrote: the bytes of version 1 are frozen."""
    assert encode(100, [(101, 105), (300, 300)], "c") == assembled(
        bytes([1, 5, 0xC2, 0x01, 1]), base=100, cluster=b"c"
    ) == "ts1:AAAAAAAAAABkAWMBBcIBAWaECS8="
    assert encode(100, [(101, 101), (103, 103), (105, 106), (108, 108)], "c") == assembled(
        bytes([0b01010110, 0b10000000]), form=1, base=100, cluster=b"c"
    )


def test_the_distance_reading_keeps_is_the_span_a_map_holds() -> None:
    """Contract 3: reading stops a bounded distance above the lowest unfinished record so that the map fits."""
    assert DISTANCE_MAX <= SPAN_MAX


@pytest.mark.parametrize("cluster", [CLUSTER, "c" * 255, "c" * 1000, "ü" * 300, ""], ids=len)
def test_the_worst_case_fits_a_commit(cluster: str) -> None:
    """The arithmetic of the module's docstring, from a pattern that no run lengths make shorter."""
    text = encode(0, EVERY_SECOND, cluster)

    assert len(text) <= 3_696 <= CHARACTERS_MAX
    assert decode(text, committed_offset=0, cluster_id=cluster, end=None).finished == tuple(EVERY_SECOND)


def test_the_shorter_form_is_taken() -> None:
    """A single slow record among thousands costs some bytes, not some thousands."""
    assert len(encode(0, [(1, SPAN_MAX - 1)], CLUSTER)) <= 60
    random_half = [(offset, offset) for offset in range(1, 4000, 2) if random.Random(offset).random() < 0.5]
    assert len(encode(0, random_half, CLUSTER)) <= (4000 // 8 + 1 + 8 + 1 + len(CLUSTER) + 4 + 3) * 4 / 3 + 4


@pytest.mark.parametrize(
    "runs",
    [
        [(99, 101)],
        [(102, 101)],
        [(101, 105), (105, 107)],
        [(101, 105), (106, 107)],
        [(110, 111), (101, 102)],
        [(101, 100 + SPAN_MAX)],
    ],
    ids=["below", "reversed", "overlapping", "adjacent", "descending", "too far"],
)
def test_runs_that_are_none_are_refused(runs: list[tuple[int, int]]) -> None:
    """Written, they would be read as something else by the next owner."""
    with pytest.raises(ValueError, match=r"run \d+|offset \d+"):
        encode(100, runs, CLUSTER)


class TestNotBelieved:
    """Whatever may mean other records has no effect: a repeated response is better than a lost record."""

    TEXT = encode(100, [(101, 150), (170, 180)], CLUSTER)

    def test_beside_another_offset(self) -> None:
        """A mirroring tool translates offsets and copies metadata; `reset-offsets` of other tools may keep it."""
        assert read(self.TEXT, committed_offset=101) == OffsetMap(100, ((101, 150), (170, 180)), "other_base")

    def test_from_another_cluster(self) -> None:
        """The same offset may be another record there."""
        assert read(self.TEXT, cluster_id="another").reason == "other_cluster"
        assert not read(self.TEXT, cluster_id="another").valid

    @pytest.mark.parametrize(("end", "reason"), [(181, None), (180, "beyond_log_end"), (0, "beyond_log_end")])
    def test_beyond_the_end_of_the_log(self, end: int, reason: str | None) -> None:
        """The log was cut or created anew: the offsets will be given to other records."""
        assert read(self.TEXT, end=end).reason == reason

    def test_too_far_above_the_base(self) -> None:
        """No release of this program reads that far."""
        far = assembled(bytes([0xFF, 0xFF, 0x7F, 1]))

        assert read(far) == OffsetMap(100, ((100 + 2**21 - 1, 100 + 2**21 - 1),), "too_distant")
        assert read(assembled(bytes([0xA0, 0x9C, 0x01, 1]))).reason == "too_distant"
        assert read(assembled(bytes([0x9F, 0x9C, 0x01, 1]))).valid

    @pytest.mark.parametrize("text", ["hello", "ts", "TS1:", " ts1:", "{}", "\x00", "ä", "tsx:", "ts:"])
    def test_not_ours(self, text: str) -> None:
        """Other programs use the metadata for their own notes."""
        assert read(text) == OffsetMap(None, (), "foreign")

    @pytest.mark.parametrize("text", ["ts2:", "ts2:abcd", "ts10:x"])
    def test_from_a_newer_release(self, text: str) -> None:
        """Contract 11: an older release refuses newer forms; to do so it has to know them."""
        assert read(text) == OffsetMap(None, (), "newer_version")

    @pytest.mark.parametrize(
        "text",
        [
            "ts1:",
            "ts1:AAAA",
            "ts1:ä",
            "ts1:!!!!",
            TEXT[:-1],
            TEXT[:-4],
            TEXT + "\x00",
            TEXT + "\n",
            TEXT + "AAAA",
            TEXT[:10] + TEXT[11:],
            TEXT.replace(TEXT[12], "+", 1),
            assembled(bytes([1, 0])),
            assembled(bytes([1])),
            assembled(bytes([1, 0x80])),
            assembled(bytes([1, 1, 0x80])),
            assembled(bytes([1, 5, 0, 5])),
            assembled(bytes([0x80] * 10 + [1, 1])),
            assembled(b"", form=2),
            assembled(b"\x01\x01", base=2**63),
            "ts1:" + base64.b64encode(bytes(13) + zlib.crc32(bytes(13)).to_bytes(4, "big")).decode()[:-4],
            assembled(b"\xff" * 3_060, form=1),
        ],
    )
    def test_a_damaged_map_is_absent(self, text: str) -> None:
        """Cut, changed, or longer than a broker takes."""
        assert read(text) == OffsetMap(None, (), "damaged")

    def test_a_cluster_that_claims_more_bytes_than_there_are(self) -> None:
        """The length is inside the checksum, so it may still be wrong."""
        content = bytes(9) + b"\x05abc"
        text = "ts1:" + base64.b64encode(content + zlib.crc32(content).to_bytes(4, "big")).decode()

        assert read(text).reason == "damaged"

    def test_every_single_character_matters(self) -> None:
        """The checksum sees any one changed character, or the text is no base 64 any more."""
        for index in range(len("ts1:"), len(self.TEXT.rstrip("="))):
            for character in string.ascii_letters + string.digits + "+/":
                changed = self.TEXT[:index] + character + self.TEXT[index + 1 :]
                found = read(changed)
                assert (found.finished, found.reason) in {((), "damaged"), (((101, 150), (170, 180)), None)}
                assert found.valid == (changed == self.TEXT) or index == len(self.TEXT.rstrip("=")) - 1


def test_a_map_may_be_empty() -> None:
    """Not written by this release, but whole: it says that nothing is finished."""
    assert read(assembled(b"")) == read(assembled(b"", form=1)) == OffsetMap(100, (), None)


def test_runs_are_counted() -> None:
    """For `lag`."""
    assert count([(101, 105), (300, 300)]) == 6
    assert count([]) == 0


def test_the_prefix_says_the_version() -> None:
    """Contract 3."""
    assert offset_map.PREFIX == "ts1:"


class TestSizeLimit:
    """What a broker takes as metadata is learnt from its refusals (contract 3)."""

    def test_what_brokers_take_by_default_is_committed(self) -> None:
        """No refusal, no limit of ours beside the default."""
        limit = SizeLimit()

        assert limit.fitting("m" * CHARACTERS_MAX) == "m" * CHARACTERS_MAX
        assert limit.fitting("m" * (CHARACTERS_MAX + 1)) == ""

    def test_a_refusal_halves_what_is_tried_next(self) -> None:
        """A map half as long may fit; one longer than that is not tried again."""
        limit = SizeLimit()

        assert limit.refused(100) is True
        assert limit.fitting("m" * 50) == "m" * 50
        assert limit.fitting("m" * 51) == ""
        assert limit.refused(50) is False, "the first refusal is the one to be said aloud"
        assert limit.fitting("m" * 26) == ""

    def test_a_refusal_that_comes_late_does_not_widen_the_limit(self) -> None:
        """Transactions of several partitions are on their way at once."""
        limit = SizeLimit()

        limit.refused(100)
        limit.refused(1000)
        assert limit.fitting("m" * 51) == ""
