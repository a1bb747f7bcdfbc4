"""Who watches costs one look a second for all together; who is slow, or leaves, is nobody's burden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest

from consumer import viewers
from consumer.viewers import NOTHING, Viewers

WAIT_SECONDS = 10
"""Bound of every wait in these tests; none of them is a measure of anything."""


class Looks:
    """Makes numbered frames, and knows how often it was asked."""

    def __init__(self) -> None:
        self.number = 0
        self.fails = False
        self.hangs = False

    async def look(self) -> bytes:
        self.number += 1
        if self.fails:
            raise RuntimeError("cannot look")
        if self.hangs:
            await asyncio.Event().wait()
        return b"%d" % self.number


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Something to look at, as fast as the loop turns."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.0)
    return Looks()


async def newest(frames: AsyncGenerator[bytes, None]) -> bytes:
    """The next frame a viewer is given."""
    async with asyncio.timeout(WAIT_SECONDS):
        return await anext(frames)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until *condition* holds."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


async def test_nobody_watches_and_nobody_looks(looks: Looks) -> None:
    """The page costs nothing while it is closed, before the first viewer and after the last."""
    watched = Viewers(looks.look)
    await asyncio.sleep(0.01)
    before = looks.number
    frames = watched.frames()
    await newest(frames)
    await frames.aclose()
    left = looks.number
    await asyncio.sleep(0.01)

    assert (before, left) == (0, looks.number)


async def test_all_viewers_share_one_look(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten open pages cost what one costs."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 3600.0)
    watched = Viewers(looks.look)
    all_of_them = [watched.frames() for _ in range(10)]

    seen = {await newest(frames) for frames in all_of_them}

    assert seen == {b"1"}
    assert looks.number == 1
    for frames in all_of_them:
        await frames.aclose()


async def test_who_comes_back_late_is_given_the_newest_frame(looks: Looks) -> None:
    """Nothing is kept for a slow viewer: it misses what was, and the others wait for nobody."""
    watched = Viewers(looks.look)
    slow, quick = watched.frames(), watched.frames()
    await newest(slow)
    for _ in range(50):
        await newest(quick)

    assert int(await newest(slow)) >= 50
    await slow.aclose()
    await quick.aclose()


async def test_who_comes_after_a_pause_is_not_shown_what_was_then(looks: Looks) -> None:
    """The last frame of an hour ago is not what is true now."""
    watched = Viewers(looks.look)
    first = watched.frames()
    await newest(first)
    await first.aclose()
    before = looks.number

    again = watched.frames()

    assert int(await newest(again)) > before
    await again.aclose()


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
async def test_a_look_that_fails_is_said_and_tried_again(
    looks: Looks, trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame that says nothing still finds out who has left; the next one may say something."""
    monkeypatch.setattr(viewers, "LOOK_SECONDS", 0.01)
    setattr(looks, trouble, True)
    watched = Viewers(looks.look)
    frames = watched.frames()

    nothing = await newest(frames)
    setattr(looks, trouble, False)
    async with asyncio.timeout(WAIT_SECONDS):
        while (something := await newest(frames)) == NOTHING:
            pass

    assert nothing == NOTHING
    assert int(something) >= 2
    assert caplog.records[0].getMessage() == "the status page cannot be made"
    await frames.aclose()


async def test_at_the_end_everybody_is_shown_the_end(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more look, then no more frames; who comes later sees none."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 3600.0)
    watched = Viewers(looks.look)
    frames = watched.frames()
    await newest(frames)
    waiting = asyncio.create_task(newest(frames))
    await asyncio.sleep(0)

    await watched.close()

    async with asyncio.timeout(WAIT_SECONDS):
        assert await waiting == b"2"
        assert [frame async for frame in frames] == []
        assert [frame async for frame in watched.frames()] == []


async def test_the_end_does_not_wait_for_a_look_that_hangs(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop of the service waits for the port, so the port does not wait for what is gone."""
    monkeypatch.setattr(viewers, "LAST_LOOK_SECONDS", 0.01)
    watched = Viewers(looks.look)
    frames = watched.frames()
    await newest(frames)
    looks.hangs = True

    async with asyncio.timeout(WAIT_SECONDS):
        await watched.close()
        rest = [frame async for frame in frames]

    assert rest[-1] == NOTHING


async def test_a_viewer_that_is_cancelled_has_left(looks: Looks) -> None:
    """Nobody looks for it any more, and no task stays behind."""
    watched = Viewers(looks.look)
    before = asyncio.all_tasks()

    async def watch() -> None:
        async for _ in watched.frames():
            pass

    watching = asyncio.create_task(watch())
    await until(lambda: looks.number > 2)
    watching.cancel()
    await asyncio.wait([watching])

    await until(lambda: asyncio.all_tasks() == before)
