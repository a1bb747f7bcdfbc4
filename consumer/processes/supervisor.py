"""The supervisor: starts the processes, passes signals on, starts again what ends, shows them all at one admin port.

What is to be done, and when, is decided by :mod:`consumer.processes.decisions`; this module does it.

**A process** is ``python -m consumer.processes.member`` with the configuration of all, but for two settings that tell
it from the others (:func:`config_of`). It has a session of its own, so that Ctrl-C in a terminal reaches the supervisor
alone; it writes to the same stderr, a line at a time (a reader that falls behind may find two lines of more than 4 KiB
mixed up); it does not outlive the supervisor. Each has its own permits, byte budget and storage handles: the limits of
the configuration are those of one process.

1. It is started, and sent its configuration over its line.
2. It is asked for a sign of life, again and again, and killed where it hangs.
3. It ends; what it has counted stays counted; the decision about it is carried out.

**The admin port** asks all processes when somebody asks it, each for at most :data:`ANSWER_SECONDS`. One that does not
answer by then is not ready, its partitions and gauges are missing, and nobody waits any longer for it. ``/healthz`` is
the supervisor's own: hung processes are its business, not that of whoever restarts it.

**Error reports**, where there is a place for them, say what a process cannot say of itself: that it hung, that a signal
ended it that nobody here had sent, and that it was given up.

**The stop** is bounded by ``rebalance.drain_timeout`` + 15 s for all processes together, as they drain side by side.

It holds about 60 MB, most of it the admin port: no Kafka client and no storage is imported here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import consumer
from consumer.admin import AdminServer
from consumer.config import Config
from consumer.exits import CLEAN, FATAL, STOP_MARGIN_SECONDS, USAGE
from consumer.log import LastErrors, get_logger
from consumer.metrics import Collected, Counts, PlainFamily, families_of, new_registry, plain, register_process
from consumer.processes.channel import METRICS, PULSE, READINESS, STATE, Asking, NoAnswer
from consumer.processes.decisions import Action, AskToStop, Decisions, End, Kill, Start
from consumer.processes.merge import Run, Tally, combined, merged_state
from consumer.telemetry import REPORTS_STOP_SECONDS, start_error_reports

ANSWER_SECONDS: Final = 2.0
"""How long the admin port waits for a process: longer than the stalls of a healthy event loop, below the 4 s of the
status page, the 5 s of ``tierstream health`` and the 8 s of a scrape."""
PULSE_SECONDS: Final = 5.0
"""How long a process may take for a sign of life before it counts as one silence."""
PULSE_INTERVAL_SECONDS: Final = 1.0
"""Between a sign of life and the next question: how exact the totals of a process are that was killed."""

_OWN: Final[Run] = sys.maxsize, 0
"""The supervisor itself, behind the runs of its processes."""

log = get_logger(__name__)


class ProcessFailed(Exception):
    """A process ended, hung or was given up; nothing of it is left that could say why."""


def main(config: Config) -> int:
    """Run ``runtime.processes`` processes until a signal or a failure ends them; return the exit code."""
    with asyncio.Runner() as runner:
        return runner.run(Supervisor(config).run())


def config_of(config: Config, number: int) -> Config:
    """Return the configuration of process *number*: its own client id, and its own owner in the change log.

    A change log owner that was given is used by one running process at a time (contract 5), so each has one of its own,
    and keeps it over restarts: what the run before has left is recovered at once. Without one each run makes itself a
    new name, and recovers what others left when their lease is over.
    """
    kafka = config.kafka.model_copy(update={"client_id": f"{config.kafka.client_id}-{number}"})
    change_log = config.storage.change_log
    if change_log.owner is not None:
        change_log = change_log.model_copy(update={"owner": f"{change_log.owner}-{number}"})
    storage = config.storage.model_copy(update={"change_log": change_log})
    return config.model_copy(update={"kafka": kafka, "storage": storage})


class _Child:
    """One run of one process."""

    def __init__(self, run: Run, process: asyncio.subprocess.Process, asking: Asking) -> None:
        self.run = run
        self.process = process
        self.asking = asking
        self.totals: Mapping[str, Any] = {}
        """As it last told; empty as long as it has told nothing."""
        self.killed = False
        """Whether it was killed from here."""

    def kill(self) -> None:
        """Kill it, if it has not ended yet."""
        self.killed = True
        with suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """Owns the processes, their lines, and the admin port."""

    def __init__(self, config: Config) -> None:
        self._config = config
        stop_seconds = config.rebalance.drain_timeout + STOP_MARGIN_SECONDS
        self._decisions = Decisions(config.runtime.processes, stop_seconds)
        self._children: dict[int, _Child] = {}
        """By number, those that live."""
        self._runs = 0
        self._lives: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[int] | None = None
        self._tally = Tally()
        self._past_totals: Mapping[str, Any] = Counts().totals()
        """Totals of runs that are over, summed."""
        self._last_errors = LastErrors()
        self._registry = new_registry()
        register_process(self._registry)

    async def run(self) -> int:
        """Start, wait, stop; return the exit code."""
        logging.getLogger().addHandler(self._last_errors)
        reports = start_error_reports(os.environ)
        try:
            return await self._run()
        finally:
            logging.getLogger().removeHandler(self._last_errors)
            if reports is not None:
                await asyncio.to_thread(reports.stop, REPORTS_STOP_SECONDS)

    async def _run(self) -> int:
        config, loop = self._config, asyncio.get_running_loop()
        self._ended = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        admin = AdminServer(
            config.admin.host, config.admin.port, snapshot=self.snapshot, readiness=self.readiness, registry=self
        )
        try:
            port = await admin.start()
        except OSError as error:
            where = f"{config.admin.host}:{config.admin.port}"
            log.error("admin port cannot be opened", address=where, error=str(error))  # noqa: TRY400 - no trace: it is the user's
            return USAGE
        log.info(
            "started",
            admin_host=config.admin.host,
            admin_port=port,
            pid=os.getpid(),
            processes=config.runtime.processes,
        )
        self._do(self._decisions.begin())
        code = await self._ended
        if self._timer is not None:
            self._timer.cancel()
        if self._lives:
            await asyncio.wait(self._lives)
        await admin.stop()
        log.info("stopped", exit_code=code)
        return code

    # ------------------------------------------------------------------------------------------ doing

    def _do(self, actions: list[Action]) -> None:
        """Carry *actions* out; then be called when the next ones are due."""
        for action in actions:
            match action:
                case Start(number):
                    life = asyncio.create_task(self._live(number), name=f"process {number}")
                    self._lives.add(life)
                    life.add_done_callback(self._task_ended)
                case AskToStop(number):
                    if (child := self._children.get(number)) is not None:
                        child.asking.stop()
                case Kill(number):
                    if (child := self._children.get(number)) is not None:
                        hangs = None if self._decisions.stopping() else ProcessFailed(f"process {number} hangs")
                        log.error("killing a process", process=number, pid=child.process.pid, exc_info=hangs)
                        child.kill()
                case End(code, at_once):
                    if at_once:
                        log.error("ending at once", exit_code=code)
                        sys.stderr.flush()
                        os._exit(code)
                    if self._ended is not None and not self._ended.done():
                        self._ended.set_result(code)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._decisions.next_due()
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(loop.time() + max(0.0, due - time.monotonic()), self._tick)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A task that does something about a process is over; one that failed would leave its process to itself."""
        self._lives.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("fatal: a restart is right", exc_info=error)
            self._do([End(FATAL, at_once=True)])

    def _tick(self) -> None:
        self._do(self._decisions.tick(time.monotonic()))

    def _signalled(self, number: signal.Signals) -> None:
        log.info("signal received", signal=number.name)
        self._do(self._decisions.signalled(number, time.monotonic()))

    async def _live(self, number: int) -> None:
        """One run of a process, from its start to what follows from its end."""
        if self._decisions.stopping():  # since its start was decided
            self._do(self._decisions.ended(number, CLEAN, time.monotonic()))
            return
        self._runs += 1
        run = number, self._runs
        try:
            child = await self._start(run)
        except OSError as error:
            log.error("a process cannot be started", process=number, error=str(error))  # noqa: TRY400 - it is the system's
            self._process_ended(number, os.EX_OSERR)
            return
        self._children[number] = child
        log.info("process started", process=number, pid=child.process.pid)
        if self._decisions.stopping():  # while it was being started
            child.asking.stop()
        pulse = asyncio.create_task(self._feel_pulse(child), name=f"pulse of process {number}")
        pulse.add_done_callback(self._task_ended)
        code = await child.process.wait()
        pulse.cancel()
        await asyncio.wait([pulse])
        await child.asking.close()
        del self._children[number]
        self._tally.ended(run)
        self._past_totals = combined([self._past_totals, child.totals])
        self._process_ended(number, code, by_itself=not child.killed)

    async def _start(self, run: Run) -> _Child:
        ours, theirs = socket.socketpair()
        asking = Asking(ours)
        try:
            await asking.open(config_of(self._config, run[0]))
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the working directory is no place to import from
                "-m",
                "consumer.processes.member",
                str(run[0]),
                str(os.getpid()),
                stdin=theirs.fileno(),
                env=_environment(),
                start_new_session=True,
            )
        except BaseException:
            await asking.close()
            raise
        finally:
            theirs.close()
        return _Child(run, process, asking)

    def _process_ended(self, number: int, code: int, *, by_itself: bool = True) -> None:
        decisions = self._decisions
        now, before = time.monotonic(), decisions.stopping()
        actions = decisions.ended(number, code, now)
        if before:
            log.info("process ended", process=number, exit_code=code)
        else:
            outcome = decisions.words(number, now)
            crash = ProcessFailed(f"process {number} {outcome}") if code < 0 and by_itself else None
            log.error("process ended", process=number, exit_code=code, outcome=outcome, exc_info=crash)
        if decisions.stopping() and not before:
            given_up = ProcessFailed(decisions.cause) if decisions.gave_up() else None
            log.critical("stopping all processes", cause=decisions.cause, exc_info=given_up)
        self._do(actions)

    async def _feel_pulse(self, child: _Child) -> None:
        number = child.run[0]
        while True:
            try:
                told = await child.asking.ask(PULSE, PULSE_SECONDS)
            except NoAnswer:
                self._do(self._decisions.silent(number))
            else:
                state, child.totals = (told["state"], told["totals"]) if told is not None else ("", child.totals)
                self._decisions.heard(number, time.monotonic(), running=state in {"running", "rebalancing"})
            await asyncio.sleep(PULSE_INTERVAL_SECONDS)

    # ------------------------------------------------------------------------------------------ what can be seen

    async def _ask_all(self, what: str) -> dict[Run, Any]:
        """Ask every living process, all at a time; those that do not answer in time are left out.

        Nor is one asked that has never answered: it is still starting, and would only be waited for.
        """

        async def ask(child: _Child) -> Any:
            try:
                return await child.asking.ask(what, ANSWER_SECONDS)
            except NoAnswer:
                return None

        children = [(number, child) for number, child in self._children.items() if child.totals]
        told = await asyncio.gather(*(ask(child) for _, child in children))
        return {  # what a run has counted that ended meanwhile is counted among the past ones already
            child.run: answer
            for (number, child), answer in zip(children, told, strict=True)
            if answer is not None and self._children.get(number) is child
        }

    async def snapshot(self) -> Mapping[str, Any]:
        """Describe all processes as one service (contract 8)."""
        told = {run[0]: state for run, state in (await self._ask_all(STATE)).items()}
        for number, state in told.items():  # what has been told is not taken back, should it end now
            self._children[number].totals = state["totals"]
        if self._decisions.stopping():
            least = "draining"
        else:
            least = "running" if len(told) == self._config.runtime.processes else "starting"
        storage = self._config.storage
        empty = {
            "limiter": {"limit": 0, "in_use": 0, "available": 0, "queued": 0},
            "totals": combined(
                [
                    self._past_totals,
                    *(child.totals for number, child in self._children.items() if number not in told),
                ]
            ),
            "storage": {part: getattr(storage, part).type for part in ("high_volume", "long_term", "change_log")},
            "last_errors": self._last_errors.newest(),
        }
        return merged_state(told, least, empty)

    async def readiness(self) -> tuple[bool, list[str]]:
        """Whether all processes are ready, and the reasons where one is not, each with its process."""
        if self._decisions.stopping():
            return False, ["draining"]
        told = {run[0]: answer for run, answer in (await self._ask_all(READINESS)).items()}
        now = time.monotonic()
        reasons = []
        for number in range(1, self._config.runtime.processes + 1):
            if number in told:
                reasons += [f"process {number}: {reason}" for reason in told[number][1]]
            elif (child := self._children.get(number)) is not None:
                reasons.append(f"process {number}: {'does not answer' if child.totals else 'starting'}")
            else:
                reasons.append(f"process {number}: {self._decisions.words(number, now)}")
        return not reasons, reasons

    async def collect(self) -> Collected:
        """Return the metrics of all processes together, the supervisor's own memory and CPU included."""
        told = {
            run: [PlainFamily(**family) for family in families]
            for run, families in (await self._ask_all(METRICS)).items()
        }
        told[_OWN] = plain(self._registry.collect())
        return families_of(self._tally.merged(told))


def _environment() -> dict[str, str]:
    """Return an environment in which a child finds this very package, also where it was run from a checkout."""
    environment = dict(os.environ)
    root = str(Path(consumer.__file__).parents[1])
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"
    return environment
