"""The folder of the long-term tier: names that lead nowhere else, no half a revision, and nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from consumer.errors import BackendError, BackendUnavailable, ConfigError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata, StoredObject
from consumer.references import References
from consumer.storage import filesystem
from consumer.storage.backend import Revision
from consumer.storage.filesystem import FilesystemBackend, revision_path
from consumer.storage.revision import new_revision


def a_revision(key: str = "k") -> Revision:
    """Return a revision nobody has named before."""
    return new_revision(ObjectId(ObjectContext("u"), key))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return where the folder will be."""
    return tmp_path / "CANARY" / "objects"


@pytest.fixture
async def backend(root: Path) -> AsyncIterator[FilesystemBackend]:
    """Lend a backend over an empty folder."""
    made = FilesystemBackend(root)
    yield made
    await made.close()


def files(root: Path) -> list[Path]:
    """List what was stored, and temporary files."""
    # Unlike `rglob`, this takes it that folders go while it looks.
    found = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in found if path.name not in {".lock", "FORMAT"})


def only(root: Path, suffix: str) -> Path:
    """Return the one file with *suffix*."""
    (found,) = root.rglob(f"*.{suffix}")
    return found


def write(path: Path, content: bytes) -> None:
    """Make a file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


async def in_thread(step: Any, *arguments: Any) -> Any:
    """Do what would block, aside."""
    return await asyncio.to_thread(step, *arguments)


class TestNames:
    """A name is never used as a path."""

    @pytest.mark.parametrize("name", ["..", ".", "/", "a/../b", "~", "", "x.json", "é\N{SNOWMAN}", "a" * 1000])
    def test_parts_have_no_dot_no_slash_and_a_bounded_length(self, name: str) -> None:
        for part in revision_path(name):
            assert 0 <= len(part) <= 200
            assert not set(part) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-%")

    @pytest.mark.parametrize("name", ["..", "a/b~c.d", "é\N{SNOWMAN}" * 99, "%2F", "x" * 200, "x" * 201])
    def test_a_path_says_which_name_it_is(self, name: str) -> None:
        """For whoever looks at the disk, and so that two names never meet."""
        _, *parts = revision_path(name)

        assert unquote("".join(parts)) == name

    def test_names_are_spread_over_the_folders(self) -> None:
        """One folder with all of them would be slow to list and to sweep."""
        first = {revision_path(f"u/objects/{number}")[0] for number in range(4096)}

        assert len(first) > 2000
        assert all(len(folder) == 3 for folder in first)


class TestFiles:
    """What lies on the disk."""

    async def test_a_payload_file_holds_the_payload_and_nothing_else(
        self, backend: FilesystemBackend, root: Path
    ) -> None:
        """A reference to it can be given to others."""
        await backend.put(a_revision(), Metadata(), b"payload")

        assert await in_thread(only(root, "payload").read_bytes) == b"payload"

    async def test_nobody_else_may_read_them(self, backend: FilesystemBackend, root: Path) -> None:
        before = os.umask(0)
        try:
            await backend.put(a_revision(), Metadata(), b"payload")
        finally:
            os.umask(before)

        for path in await in_thread(lambda: [root, *root.rglob("*")]):
            mode = (await in_thread(path.stat)).st_mode
            assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600)

    async def test_deleting_everything_leaves_an_empty_tree(self, backend: FilesystemBackend, root: Path) -> None:
        """Folders that long names need go with them."""
        revisions = [a_revision("x" * 800), a_revision("x" * 800), a_revision("y")]
        for revision in revisions:
            await backend.put(revision, Metadata(), b"x")
        for revision in revisions:
            await backend.delete(revision)

        assert {path.name for path in await in_thread(lambda: list(root.rglob("*")))} == {".lock", "FORMAT", "incoming"}

    async def test_making_one_touches_nothing(self, root: Path) -> None:
        await FilesystemBackend(root).close()

        assert not await in_thread(root.parent.exists)

    async def test_a_link_is_never_followed(self, backend: FilesystemBackend, root: Path, tmp_path: Path) -> None:
        """Whoever can make links in the folder must not lead us out of it."""
        outside = tmp_path / "outside"
        outside.mkdir()
        revision = a_revision()
        await backend.open()
        (root / revision_path(revision.name)[0]).symlink_to(outside)

        for attempt in (
            backend.put(revision, Metadata(), b"x"),
            backend.get(revision),
            backend.head(revision),
            backend.delete(revision),
        ):
            with pytest.raises(BackendError) as raised:
                await attempt
            assert "CANARY" not in str(raised.value)
        assert list(await in_thread(os.listdir, outside)) == []

    async def test_a_link_in_place_of_a_payload_is_not_read(
        self, backend: FilesystemBackend, root: Path, tmp_path: Path
    ) -> None:
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        payload = only(root, "payload")
        secret = tmp_path / "secret"
        await in_thread(secret.write_bytes, b"payload")
        payload.unlink()
        payload.symlink_to(secret)

        with pytest.raises(BackendError):
            await backend.get(revision)


class TestDamage:
    """A disk that gives back something else is an error, never wrong bytes."""

    @pytest.mark.parametrize("content", [b"pAyload", b"payloa", b"payloadd", b""])
    async def test_a_changed_payload_is_noticed(self, backend: FilesystemBackend, root: Path, content: bytes) -> None:
        """Checked by CRC-32C and size at every read."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        await in_thread(only(root, "payload").write_bytes, content)

        with pytest.raises(BackendError, match="checksum"):
            await backend.get(revision)
        assert await backend.head(revision) == Metadata(size=7)

    @pytest.mark.parametrize("content", [b"", b"{}\n{}", b'{"name":1', b"\xff\n\xff", b"[]\n"])
    async def test_a_damaged_description_is_noticed(
        self, backend: FilesystemBackend, root: Path, content: bytes
    ) -> None:
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        await in_thread(only(root, "json").write_bytes, content)

        with pytest.raises(BackendError, match="unreadable"):
            await backend.get(revision)
        await backend.delete(revision)
        assert await backend.get(revision) is None

    async def test_a_description_of_another_revision_is_noticed(self, backend: FilesystemBackend, root: Path) -> None:
        """A file moved by hand, or a filesystem that takes two names for one."""
        one, other = a_revision(), a_revision()
        await backend.put(one, Metadata(), b"payload")
        moved = await in_thread(only(root, "json").read_bytes)
        await backend.delete(one)
        await backend.put(other, Metadata(), b"payload")
        await in_thread(only(root, "json").write_bytes, moved)

        with pytest.raises(BackendError, match="another"):
            await backend.get(other)

    async def test_a_payload_without_its_description_is_not_there(
        self, backend: FilesystemBackend, root: Path
    ) -> None:
        """A crash between the two renames: never acknowledged, and a delete removes it."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        only(root, "json").unlink()

        assert await backend.get(revision) is None
        assert await backend.head(revision) is None
        await backend.delete(revision)
        assert await in_thread(files, root) == []

    async def test_a_description_without_its_payload_is_not_there(
        self, backend: FilesystemBackend, root: Path
    ) -> None:
        """A crash of the host may keep the second rename without the first."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        only(root, "payload").unlink()

        assert await backend.get(revision) is None


class TestFaults:
    """What the disk refuses."""

    @pytest.mark.parametrize(
        ("number", "expected"),
        [
            (errno.ENOSPC, BackendUnavailable),
            (errno.EDQUOT, BackendUnavailable),
            (errno.EIO, BackendUnavailable),
            (errno.EMFILE, BackendUnavailable),
            (errno.EACCES, BackendError),
            (errno.EROFS, BackendError),
        ],
    )
    @pytest.mark.parametrize("call", ["write", "fsync", "rename"])
    async def test_a_put_that_fails_leaves_nothing_and_may_be_repeated(
        self,
        backend: FilesystemBackend,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        number: int,
        expected: type[Exception],
    ) -> None:
        """Retriable where it may pass; the text names the fault and no path."""
        revision = a_revision()
        await backend.open()

        def fails(*_arguments: Any, **_named: Any) -> Any:
            raise OSError(number, "CANARY")

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            with pytest.raises(expected) as raised:
                await backend.put(revision, Metadata(), b"payload")

        assert str(raised.value) == f"filesystem: {errno.errorcode[number]}"
        assert await backend.get(revision) is None
        assert await in_thread(files, root) == []
        assert await backend.put(revision, Metadata(), b"payload") == 7
        assert await backend.get(revision) == StoredObject(Metadata(size=7), b"payload")

    async def test_nothing_is_acknowledged_before_all_is_on_the_disk(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The order of the module: both files, renames, then the folders from the inside out."""
        await backend.open()
        steps: list[str] = []
        fsync, rename = os.fsync, os.rename

        def named_fsync(fd: int) -> None:
            steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
            fsync(fd)

        def named_rename(source: str, target: str, **folders: int) -> None:
            steps.append(target.rpartition(".")[2])
            rename(source, target, **folders)

        monkeypatch.setattr(os, "fsync", named_fsync)
        monkeypatch.setattr(os, "rename", named_rename)
        await backend.put(Revision("short"), Metadata(), b"payload")

        assert steps == ["file", "file", "payload", "json", "folder", "folder"]
        assert len(await in_thread(files, root)) == 2

    async def test_a_delete_is_durable_too(
        self, backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a power cut brings back a revision whose change-log entry is gone."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)

        await backend.delete(revision)

        assert len(synced) == 1

    async def test_an_extension_in_the_middle_of_a_delete_leaves_nothing(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has seen the payload, and writes the description again while the payload goes."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        description = only(root, "json")
        content = await in_thread(description.read_bytes)
        unlink = os.unlink

        def interrupted(name: str, **folder: int) -> None:
            unlink(name, **folder)
            if name.endswith(".payload"):
                write(description, content)

        monkeypatch.setattr(os, "unlink", interrupted)
        await backend.delete(revision)

        assert await in_thread(files, root) == []

    async def test_a_delete_in_the_middle_of_an_extension_leaves_nothing(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other way round: the payload is gone when the description is written."""
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")
        payload = only(root, "payload")
        rename = os.rename

        def interrupted(*arguments: Any, **folders: Any) -> None:
            payload.unlink()
            rename(*arguments, **folders)

        monkeypatch.setattr(os, "rename", interrupted)
        await backend.extend(revision, Metadata(filename="late"))

        assert await in_thread(files, root) == []

    async def test_a_full_queue_is_refused(self, backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every queue is bounded."""
        monkeypatch.setattr(filesystem, "STEPS_MAX", 2)
        opened = threading.Event()
        waiting = [backend._submit(lambda _tree: opened.wait(30)) for _ in range(2)]

        with pytest.raises(BackendUnavailable, match="too many"):
            await backend.head(a_revision())
        opened.set()
        await asyncio.gather(*map(asyncio.wrap_future, waiting))

        assert await backend.head(a_revision()) is None

    async def test_a_closed_backend_says_so(self, backend: FilesystemBackend) -> None:
        await backend.close()

        with pytest.raises(BackendUnavailable, match="closed"):
            await backend.get(a_revision())
        with pytest.raises(BackendUnavailable, match="closed"):
            await backend.put(a_revision(), Metadata(), b"x")


class TestCancellation:
    """Cut off at any moment, a put leaves no temporary file."""

    async def test_a_put_cancelled_between_chunks_is_removed(self, backend: FilesystemBackend, root: Path) -> None:
        reached = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield b"x" * 1_100_000
            reached.set()
            await asyncio.Event().wait()

        putting = asyncio.create_task(backend.put(a_revision(), Metadata(), endless()))
        await reached.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        await backend.close()

        assert await in_thread(files, root) == []
        assert not backend._unfinished

    async def test_a_running_step_is_waited_for(
        self, backend: FilesystemBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a delete could come before the rename it has to undo."""
        reached, opened = threading.Event(), threading.Event()
        rename = os.rename

        def slow(*arguments: Any, **named: Any) -> None:
            reached.set()
            assert opened.wait(30)
            rename(*arguments, **named)

        monkeypatch.setattr(os, "rename", slow)
        revision = a_revision()
        putting = asyncio.create_task(backend.put(revision, Metadata(), b"payload"))
        assert await in_thread(reached.wait, 30)
        putting.cancel()
        await asyncio.sleep(0)
        assert not putting.done()
        opened.set()
        with pytest.raises(asyncio.CancelledError):
            await putting

        await backend.delete(revision)
        assert await backend.get(revision) is None

    async def test_a_delete_calls_off_a_put_that_was_given_up(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk hung for longer than anybody waited; what is still under way must not appear afterwards."""
        monkeypatch.setattr(filesystem, "SETTLE_SECONDS", 0.01)
        reached, opened = threading.Event(), threading.Event()
        fsync = os.fsync

        def hangs(fd: int) -> None:
            reached.set()
            assert opened.wait(30)
            fsync(fd)

        await backend.open()
        monkeypatch.setattr(os, "fsync", hangs)
        revision = a_revision()
        putting = asyncio.create_task(backend.put(revision, Metadata(), b"payload"))
        assert await in_thread(reached.wait, 30)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        deleting = asyncio.create_task(backend.delete(revision))
        await asyncio.sleep(0)
        opened.set()
        await deleting
        await backend.close()

        assert await in_thread(files, root) == []


class TestStart:
    """One folder, for one host, of one version."""

    async def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(
        self, backend: FilesystemBackend, root: Path
    ) -> None:
        await backend.open()
        (root / "incoming" / "dead").write_bytes(b"half")
        living = os.open(root / "incoming" / "living", os.O_WRONLY | os.O_CREAT)
        fcntl.flock(living, fcntl.LOCK_EX)

        other = FilesystemBackend(root)
        await other.open()

        assert await in_thread(os.listdir, root / "incoming") == ["living"]
        os.close(living)
        await other.close()

    async def test_a_put_swept_away_while_it_began_begins_again(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A starting process found the file before it was locked."""
        await backend.open()
        flock = fcntl.flock
        swept: list[str] = []

        def late(fd: int, operation: int) -> None:
            if not swept:
                swept.extend(path.name for path in (root / "incoming").iterdir())
                (root / "incoming" / swept[0]).unlink()
            flock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        revision = a_revision()
        await backend.put(revision, Metadata(), b"payload")

        assert swept
        assert await backend.get(revision) is not None

    async def test_a_folder_pruned_under_a_put_is_made_again(
        self, backend: FilesystemBackend, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A delete of the last neighbour removes the folder between its opening and the rename."""
        await backend.open()
        rename = os.rename
        pruned: list[str] = []

        def late(source: str, target: str, **folders: int) -> None:
            if len(pruned) < 3:
                pruned.append(revision_path("short")[0])
                shutil.rmtree(root / pruned[0])
            rename(source, target, **folders)

        monkeypatch.setattr(os, "rename", late)
        await backend.put(Revision("short"), Metadata(), b"payload")

        assert len(pruned) == 3
        assert await backend.get(Revision("short")) is not None

    async def test_a_newer_folder_is_refused(self, backend: FilesystemBackend, root: Path) -> None:
        """Contract 11."""
        await backend.open()
        (root / "FORMAT").write_bytes(b"2\n")
        older = FilesystemBackend(root)

        with pytest.raises(ConfigError, match="newer version"):
            await older.open()
        await older.close()

    async def test_another_host_is_refused_where_it_is_noticed(self, root: Path) -> None:
        """Contract 5."""
        write(root / ".lock", b"another host")
        held = os.open(root / ".lock", os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)
        backend = FilesystemBackend(root)
        with pytest.raises(ConfigError, match="another host"):
            await backend.open()
        os.close(held)

        await backend.open()
        await backend.close()

    async def test_a_file_in_its_place_is_an_error_and_mended_later(self, root: Path) -> None:
        """Opening is tried again with every use."""
        write(root, b"")
        backend = FilesystemBackend(root)
        with pytest.raises((BackendError, BackendUnavailable)) as raised:
            await backend.head(a_revision())
        assert "CANARY" not in str(raised.value)
        await in_thread(root.unlink)

        assert await backend.head(a_revision()) is None
        await backend.close()


class TestReferences:
    """Others read the payload's own file."""

    @pytest.mark.parametrize("key", ["k", "ключ/../% ?#", "x" * 700])
    async def test_a_reference_can_be_followed_as_a_claim_check(
        self, backend: FilesystemBackend, root: Path, key: str
    ) -> None:
        revision, payload = a_revision(key), bytes(range(256)) * 5_000
        await backend.put(revision, Metadata(), payload)
        reference = await backend.reference(revision)
        assert reference is not None

        references = References([(await in_thread(root.absolute)).as_uri()], len(payload))
        opened = await references.open(reference)

        assert b"".join([chunk async for chunk in opened]) == payload
        await references.close()

    async def test_a_relative_folder_is_referred_to_by_its_absolute_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        backend = FilesystemBackend("data/my objects")
        revision = a_revision()
        await backend.put(revision, Metadata(), b"x")

        reference = await backend.reference(revision)

        assert reference is not None
        assert reference.uri.startswith(f"{tmp_path.as_uri()}/data/my%20objects/")
        await backend.close()

    @pytest.mark.parametrize("base", ["https://files.example/large", "https://files.example/large/"])
    async def test_another_base_takes_the_place_of_the_folders_own(self, root: Path, base: str) -> None:
        """`references.base_uri`: what follows it is the path below the folder, encoded."""
        backend = FilesystemBackend(root, base_uri=base)
        await backend.put(revision := a_revision("a b"), Metadata(), b"x")

        reference = await backend.reference(revision)

        assert reference is not None
        path = unquote(reference.uri.removeprefix("https://files.example/large/"))
        assert await in_thread((root / path).read_bytes) == b"x"
        await backend.close()


class TestSweep:
    """Expired revisions go in passing."""

    async def test_what_has_expired_goes_by_itself_although_nothing_is_put(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the first use on, also of what an earlier process has left; and what lasts stays."""
        monkeypatch.setattr(filesystem, "FOLDERS", 2)
        now = [datetime(2026, 1, 1, tzinfo=UTC)]
        earlier = FilesystemBackend(root, clock=lambda: now[0])
        for number in range(8):
            await earlier.put(a_revision(f"{number}"), Metadata(time_expires=now[0] + timedelta(seconds=1)), b"x")
        await earlier.put(lasting := a_revision("lasting"), Metadata(), b"x")
        await earlier.close()
        monkeypatch.setattr(filesystem, "SWEEP_SECONDS", 0.001)
        now[0] += timedelta(seconds=1)
        backend = FilesystemBackend(root, clock=lambda: now[0])
        assert await backend.head(lasting) is not None

        async with asyncio.timeout(20):
            while len(await in_thread(files, root)) > 2:  # noqa: ASYNC110 - files in a folder set no event
                await asyncio.sleep(0.001)

        assert await backend.get(lasting) is not None
        await backend.close()

    async def test_a_round_of_puts_removes_all_that_has_expired(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With two folders instead of 4,096, a round is two puts; damaged files do not stop it."""
        monkeypatch.setattr(filesystem, "FOLDERS", 2)
        now = [datetime(2026, 1, 1, tzinfo=UTC)]
        backend = FilesystemBackend(root, clock=lambda: now[0])
        short = Metadata(time_expires=now[0] + timedelta(seconds=1))
        for number in range(8):
            await backend.put(a_revision(f"{number}/" + "x" * 100 * number), short, b"x")
            await backend.join()
        damaged, lasting = a_revision("damaged"), a_revision("lasting")
        await backend.put(damaged, Metadata(), b"x")
        description = next(path for path in await in_thread(files, root) if "damaged" in path.name)
        await in_thread(description.with_suffix(".json").write_bytes, b"{")
        await backend.put(lasting, Metadata(), b"x")
        now[0] += timedelta(seconds=1)
        for _ in range(2):
            await backend.put(a_revision("next"), Metadata(time_expires=now[0] + timedelta(days=1)), b"x")
            await backend.join()

        left = {unquote(path.name) for path in await in_thread(files, root)}
        assert len(left) == 2 * 4
        assert await backend.get(lasting) is not None
        await backend.close()
