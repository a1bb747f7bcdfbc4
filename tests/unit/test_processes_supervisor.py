"""The supervisor over processes that are none: what it does about ends and silences, and what it shows of them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from consumer.config import Admin, Config, Runtime
from consumer.error_reports import report, unexpected
from consumer.metrics import Collected, Counts, PlainFamily, PlainSample, families_of
from consumer.processes import supervisor as subject
from consumer.processes.channel import METRICS, PULSE, READINESS, STATE, NoAnswer
from consumer.processes.decisions import Action
from consumer.processes.merge import Run
from consumer.processes.supervisor import Supervisor

WAIT_SECONDS = 10.0


@dataclass
class Process:
    """A process and its line: alive until :meth:`end`, answers until it is told to be silent."""

    run: Run
    pid: int = 4711
    records: int = 0
    memory: float | None = None
    silent: bool = False
    told: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    exit: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    while_asked: Callable[[], None] | None = None

    async def wait(self) -> int:
        return await self.exit

    def end(self, code: int) -> None:
        if not self.exit.done():
            self.exit.set_result(code)

    def kill(self) -> None:
        self.told.append("kill")
        self.end(-9)

    def stop(self) -> None:
        self.told.append("stop")
        self.end(0)

    async def close(self) -> None:
        self.told.append("close")

    async def ask(self, what: str, seconds: float) -> Any:
        self.asked.append(what)
        if self.silent:
            await asyncio.sleep(0)
            raise NoAnswer(f"no answer within {seconds:g} s")
        answer = self.answer(what)
        if what != PULSE and self.while_asked is not None:
            self.while_asked()
            for _ in range(10):  # the supervisor hears of what has happened meanwhile
                await asyncio.sleep(0)
        return answer

    def answer(self, what: str) -> Any:
        totals = {**Counts().totals(), "records": self.records}
        sample: PlainSample = ("tierstream_commits_total", {"outcome": "success"}, self.records, None)
        answers = {
            PULSE: {"state": "running", "totals": totals},
            STATE: {
                "state": "running",
                "limiter": {"limit": 500, "in_use": 0, "available": 500, "queued": 0},
                "partitions": [],
                "totals": totals,
                "storage": {},
            },
            READINESS: [False, ["output"]],
            METRICS: [{"name": "tierstream_commits", "kind": "counter", "text": "", "samples": [sample]}],
        }
        if self.memory is not None:
            sample = "process_resident_memory_bytes", {}, self.memory, None
            answers[METRICS] = [
                {"name": "process_resident_memory_bytes", "kind": "gauge", "text": "", "samples": [sample]}
            ]
        return answers[what]


class Supervised(Supervisor):
    """A supervisor whose processes are doubles; ``unstartable`` of them cannot be started."""

    def __init__(self, processes: int = 2, unstartable: int = 0) -> None:
        super().__init__(Config(runtime=Runtime(processes=processes), admin=Admin(port=0)))
        self.started: list[Process] = []
        self.unstartable = unstartable

    async def _start(self, run: Run) -> Any:
        if self.unstartable:
            self.unstartable -= 1
            raise OSError(12, "Cannot allocate memory")
        process = Process(run)
        self.started.append(process)
        child = subject._Child(run, process, process)  # type: ignore[arg-type]  # a double of both
        child.totals = {"records": process.records}
        return child

    def latest(self, number: int) -> Process:
        """The latest run of process *number*."""
        return [process for process in self.started if process.run[0] == number][-1]


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Waits are short, nothing reads ``/proc`` on the event loop, and an exit at once is only noted."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(subject, "PULSE_INTERVAL_SECONDS", 0.001)
    monkeypatch.setattr("consumer.processes.decisions.RESTART_SECONDS", 0.01)
    monkeypatch.setattr(subject, "register_process", lambda _registry: None)
    return codes


@pytest.fixture
async def supervised() -> AsyncIterator[Supervised]:
    """Two processes, started and heard of."""
    running = Supervised()
    task = asyncio.create_task(running.run())
    await until(lambda: len(running.started) == 2)
    yield running
    if not running._decisions.stopping():
        running._signalled(signal.SIGTERM)
    async with asyncio.timeout(WAIT_SECONDS):
        await task


async def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
            await asyncio.sleep(0.001)


async def commits(supervised: Supervised) -> float:
    """The commits of all processes, as ``/metrics`` has them."""
    (family,) = [family for family in await supervised.collect() if family.name == "tierstream_commits"]
    return family.samples[0].value


class TestEnds:
    """What is done when a process ends."""

    async def test_a_process_that_ends_is_started_again_and_its_counts_stay(self, supervised: Supervised) -> None:
        supervised.started[0].records = 5
        await supervised.snapshot()
        await commits(supervised)
        supervised.started[0].end(3)
        await until(lambda: len(supervised.started) == 3)

        assert supervised.started[2].run[0] == supervised.started[0].run[0]
        assert await commits(supervised) == 5
        assert (await supervised.snapshot())["totals"]["records"] == 5
        assert "close" in supervised.started[0].told
        assert supervised.started[0].run not in supervised._tally._living, "a run that is over takes no memory"

    async def test_a_process_that_was_in_the_group_cannot_have_a_wrong_configuration(
        self, supervised: Supervised
    ) -> None:
        process = supervised.started[0]
        known = supervised._decisions._all[process.run[0]]
        await until(lambda: known.running_since is not None)
        process.end(2)

        await until(lambda: len(supervised.started) == 3)

    async def test_a_signal_before_the_first_process_is_started_starts_none(self) -> None:
        class Impatient(Supervised):
            def _do(self, actions: list[Action]) -> None:
                super()._do(actions)
                if not self._decisions.stopping():
                    self._signalled(signal.SIGTERM)

        supervised = Impatient()

        async with asyncio.timeout(WAIT_SECONDS):
            assert await supervised.run() == 0
        assert supervised.started == []

    async def test_a_signal_while_a_process_is_being_started_reaches_it(self) -> None:
        starting, go = asyncio.Event(), asyncio.Event()

        class Slow(Supervised):
            async def _start(self, run: Run) -> Any:
                starting.set()
                await go.wait()
                return await super()._start(run)

        supervised = Slow(processes=1)
        task = asyncio.create_task(supervised.run())
        await starting.wait()
        supervised._signalled(signal.SIGTERM)
        go.set()

        async with asyncio.timeout(WAIT_SECONDS):
            assert await task == 0
        assert supervised.started[0].told == ["stop", "close"]

    @pytest.mark.parametrize("scraped", [False, True])
    async def test_a_process_that_ends_while_it_answers_is_counted_once(
        self, supervised: Supervised, scraped: bool
    ) -> None:
        process = supervised.started[0]
        process.records = 5
        await supervised.snapshot()
        await commits(supervised)
        process.while_asked = lambda: process.end(3)

        if scraped:
            assert await commits(supervised) == 5
        else:
            assert (await supervised.snapshot())["totals"]["records"] == 5
        await until(lambda: len(supervised.started) == 3)
        assert (await commits(supervised), (await supervised.snapshot())["totals"]["records"]) == (5, 5)

    async def test_a_hung_process_is_killed(self, supervised: Supervised) -> None:
        supervised.started[1].silent = True

        await until(lambda: len(supervised.started) == 3)

        assert supervised.started[1].told[0] == "kill"

    async def test_what_no_process_can_say_of_itself_is_reported(
        self, supervised: Supervised, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A crash, a hang, and the end of all patience; not an exit, which the process has reported, nor the stop."""
        monkeypatch.setattr("consumer.processes.decisions.ENDS_MAX", 3)
        first, second = (process.run[0] for process in supervised.started)
        supervised.started[0].end(-signal.SIGSEGV)
        await until(lambda: len(supervised.started) == 3)
        supervised.started[1].silent = True
        await until(lambda: len(supervised.started) == 4)
        supervised.latest(first).end(3)
        await until(lambda: len(supervised.started) == 5)
        supervised.latest(first).end(1)
        await until(supervised._decisions.stopping)

        reported = [(report(record, error), error) for record in caplog.records if (error := unexpected(record))]
        assert [(told["message"], str(error).partition(", starts")[0]) for told, error in reported] == [
            ("process ended", f"process {first} ended by SIGSEGV"),
            ("killing a process", f"process {second} hangs"),
            ("stopping all processes", f"process {first} ended with exit code 1, 3 times in a row"),
        ]

    async def test_one_that_cannot_be_started_is_tried_again(self) -> None:
        supervised = Supervised(processes=1, unstartable=2)
        task = asyncio.create_task(supervised.run())
        await until(lambda: len(supervised.started) == 1)
        supervised._signalled(signal.SIGTERM)

        async with asyncio.timeout(WAIT_SECONDS):
            assert await task == 0

    @pytest.mark.parametrize("where", ["start", "pulse"])
    async def test_a_defect_here_is_an_end_and_no_process_left_to_itself(
        self, exits: list[int], caplog: pytest.LogCaptureFixture, where: str
    ) -> None:
        """Its processes end with it; whoever started it starts it again."""

        class Defective(Supervised):
            async def _start(self, run: Run) -> Any:
                child = await super()._start(run)
                if where == "start":
                    raise ZeroDivisionError
                child.asking.answer = lambda _: "nonsense"
                return child

        supervised = Defective(processes=1)
        task = asyncio.create_task(supervised.run())
        await until(lambda: bool(exits))
        if where == "pulse":
            supervised._signalled(signal.SIGTERM)
            async with asyncio.timeout(WAIT_SECONDS):
                await task
        else:
            task.cancel()
            await asyncio.wait([task])

        assert exits == [3]
        own = [record for record in caplog.records if record.name == subject.__name__]
        reported = [type(error) for record in own if (error := unexpected(record))]
        assert reported == [ZeroDivisionError if where == "start" else TypeError]

    async def test_the_gravest_end_is_the_exit_code(self) -> None:
        supervised = Supervised()
        task = asyncio.create_task(supervised.run())
        await until(lambda: len(supervised.started) == 2)
        supervised.started[1].end(4)

        async with asyncio.timeout(WAIT_SECONDS):
            assert await task == 4
        assert supervised.started[0].told == ["stop", "close"]

    async def test_a_port_that_is_taken_is_a_usage_error_and_starts_nothing(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            supervised = Supervised()
            supervised._config = Config(admin=Admin(port=taken.getsockname()[1]))

            assert await supervised.run() == 2

        assert supervised.started == []

    @pytest.mark.parametrize("ends", [False, True])
    async def test_a_second_signal_kills_and_exits(self, exits: list[int], ends: bool) -> None:
        supervised = Supervised()
        task = asyncio.create_task(supervised.run())
        await until(lambda: len(supervised.started) == 2)
        for process in supervised.started:
            process.stop = lambda: None  # type: ignore[method-assign]  # it drains for ever
        supervised._signalled(signal.SIGTERM)
        if ends:
            supervised.started[0].end(0)
            await until(lambda: "close" in supervised.started[0].told)
        supervised._signalled(signal.SIGINT)

        assert exits == [130]
        assert ["kill" in process.told for process in supervised.started] == [not ends, True]
        async with asyncio.timeout(WAIT_SECONDS):
            await task


class TestShown:
    """What the admin port tells."""

    async def test_reasons_name_their_process(self, supervised: Supervised) -> None:
        supervised.started[1].silent = True

        ready, reasons = await supervised.readiness()

        first, second = (process.run[0] for process in supervised.started)
        assert not ready
        assert sorted(reasons) == [f"process {first}: output", f"process {second}: does not answer"]

    async def test_a_process_that_has_never_answered_is_starting_and_not_waited_for(
        self, supervised: Supervised
    ) -> None:
        process = supervised.started[1]
        process.silent = True
        supervised._children[process.run[0]].totals = {}

        ready, reasons = await supervised.readiness()

        assert not ready
        assert f"process {process.run[0]}: starting" in reasons
        assert READINESS not in process.asked
        assert (await supervised.snapshot())["state"] == "starting"

    async def test_a_process_that_waits_for_its_restart_is_a_reason(
        self, supervised: Supervised, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("consumer.processes.decisions.RESTART_SECONDS", 25.0)
        number = supervised.started[0].run[0]
        supervised.started[0].end(3)
        await until(lambda: number not in supervised._children)

        _, reasons = await supervised.readiness()
        state = await supervised.snapshot()

        said = f"process {number}: ended with exit code 3, starts again in"
        assert any(reason.startswith(said) for reason in reasons)
        assert (state["state"], state["limiter"]["limit"]) == ("starting", 500)

    async def test_a_silent_process_leaves_its_totals(self, supervised: Supervised) -> None:
        supervised.started[0].records = 5
        await supervised.snapshot()
        supervised.started[0].silent = True

        state = await supervised.snapshot()

        assert (state["state"], state["totals"]["records"]) == ("starting", 5)

    async def test_everybody_well_is_ready_and_running(self, supervised: Supervised) -> None:
        def well(what: str) -> Any:
            return [True, []] if what == READINESS else Process.answer(supervised.started[0], what)

        for process in supervised.started:
            process.answer = well  # type: ignore[method-assign]  # a process without reasons

        assert await supervised.readiness() == (True, [])
        assert (await supervised.snapshot())["state"] == "running"

    async def test_the_supervisors_own_memory_is_part_of_the_sum(self, supervised: Supervised) -> None:
        name = "process_resident_memory_bytes"
        gauge = PlainFamily(name, "gauge", "", [(name, {}, 60.0, None)])

        class Own:
            def collect(self) -> Collected:
                return families_of([gauge])

        supervised._registry = Own()  # type: ignore[assignment]  # all it does with a registry is collect
        for process in supervised.started:
            process.memory = 100.0

        (family,) = await supervised.collect()

        assert [sample.value for sample in family.samples] == [260.0]

    async def test_a_stop_is_draining(self, supervised: Supervised) -> None:
        for process in supervised.started:
            process.stop = lambda: None  # type: ignore[method-assign]  # it drains
        supervised._signalled(signal.SIGTERM)

        assert await supervised.readiness() == (False, ["draining"])
        assert (await supervised.snapshot())["state"] == "draining"
        for process in supervised.started:
            process.end(0)
