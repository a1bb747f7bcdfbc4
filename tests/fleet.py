"""Members of one consumer group under load, to which a plan is done; and everything that can be held against them.

Three parts, each of which can be believed for its own reason:

* *What is done* comes from `chaos_plan`, drawn from a seed beforehand; here it is only carried out.
* *What happened* is told by the broker: input and output with their times, and every commit (`group_history`). The
  service's own word is taken for two things only: for what kind of trouble it has met (to know whether a run was worth
  anything), and against itself.
* *What is wrong* is found by `invariants`, by the ledger, and by the search for texts that no log may hold.

A thread feeds the load and reads what comes out while the plan is played; at the end a fresh reader reads it all again.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

from brokers import Broker, wait_until
from chaos_plan import Action, Plan
from consumer.config import parse_duration
from consumer.exits import STOP_MARGIN_SECONDS
from group_history import bury, read_history
from invariants import (
    NOTED_MS,
    Arrival,
    Fault,
    Interval,
    Repeat,
    Reply,
    beyond_windows,
    busy_moments,
    commits_gone_back,
    commits_past_unanswered,
    longest_silence,
    permits_astray,
    permits_out_of_bounds,
    repeats_below_commit,
    repeats_of,
    unexplained,
)
from leadership import Leadership
from ledger import Answer, Reader
from load import CANARY, Load, ends, read_back
from proxy import PRODUCE, REQUESTS, Proxy
from service_process import ServiceProcess, command_line
from stages import Stage, set_up
from storage_scan import Scan, scan

SECRET = "secret-71d0be"
"""A password in the configuration of every fleet; never in a log (I13)."""

WINDOW = 50
"""Operations in flight of one partition: a tenth of the 500 permits of a process."""

COMMIT_SECONDS = 10.0
"""I6: what is answered is committed one interval and this much later at the latest, as an attempt to commit may go
unanswered for 5 s, and the next one is made at once and takes no longer."""

COMMITS_BACK_SECONDS = 20.0
"""And for so long nobody may be able to commit after a broker has gone or come, though others are there: a node is
given up after its session of 3 s, its successor loads what the group has committed, and is found by the members, whose
attempts before that go unanswered for 5 s each."""

DRAIN_SECONDS = 10.0
EXIT_SECONDS = DRAIN_SECONDS + 5.0
"""I10: from SIGTERM to the end: the drain's deadline and 5 s."""

NOTED_LATE_MS = int((DRAIN_SECONDS + COMMIT_SECONDS / 2) * 1000)
"""A member that has lost a partition without a word tells so when its drain is over and its commit refused, and a
broker has come back when it answers: others have long begun to repeat then."""

EXIT_IN_OUTAGE_SECONDS = DRAIN_SECONDS + STOP_MARGIN_SECONDS
"""Contract 11: where a broker or storage is away, or output is slow, each step of the stop takes what it may."""

SLOW_BYTES_PER_SECOND = 10_000
"""Of all members together, where output is slow: a fraction of what they else write, compressed."""

MEMORY_BYTES_MAX = (64 + 256) * 1024 * 1024
"""I11: the byte budget of a fleet's configuration, and 256 MiB for the interpreter, the code and the clients (about
90 MiB), SQLite's caches (96 MiB at most), and what the runtime keeps of freed memory."""

SAMPLE_SECONDS = 5.0
"""How often memory and permits of every member are looked at."""

STATE_SECONDS = 2.0
"""For a member to tell its state; one that cannot now is looked at another time, so that the plan goes on."""

MEMORY_SAMPLES_MIN = 24
"""A member has a tendency after two minutes; before, it is still warming up."""

MEMORY_GROWTH_BYTES_MAX = 48 * 1024 * 1024
"""I11: from the second quarter of a member's life to the last: half of what its caches may still fill."""

STEP_SECONDS = 90.0
"""An action of a plan that waits for responses waits no longer: three times the longest silence allowed."""

FORBIDDEN = ("was destroyed but it is pending", "never retrieved", "was never awaited", CANARY, SECRET)
"""I12, I13: texts that no log may hold."""


def fleet_stage(
    broker: Broker, folder: Path, *, partitions: int, delivery: str = "at-least-once", **more: Any
) -> Stage:
    """Topics that the broker stamps, and the settings of a fleet: a low threshold between the tiers, a small budget."""
    more["limits"] = {"response_bytes": 600_000, "in_flight_bytes": "64MiB", **more.get("limits", {})}
    # Never asked, as no value of the load is framed; but its password is there to be told.
    registry = {"url": "http://127.0.0.1:9", "username": "tests", "password": SECRET}
    stage = set_up(broker, folder, partitions, partitions, delivery=delivery, schema_registry=registry, **more)
    stage.config["storage"] |= {"threshold": "1KiB"}
    if stage.config["storage"]["change_log"]["type"] != "memory":
        stage.config["storage"]["change_log"] |= {"lease": "5s"}
    for topic in (stage.ledger.input, stage.ledger.output, stage.ledger.dead_letter):
        broker.alter_topic(topic, message_timestamp_type="LogAppendTime")
    return stage


@dataclass
class Member:
    """One process of the fleet, in one place of it."""

    place: int
    service: ServiceProcess
    client_id: str
    stopped_at: float = 0.0
    """When it was asked to end; 0 while it was not."""
    frozen: bool = False
    doomed: bool = False
    """It will end itself by SIGKILL."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes, every `SAMPLE_SECONDS`."""

    @property
    def name(self) -> str:
        """For reports."""
        return f"member {self.place} ({self.client_id})"


@dataclass
class Findings:
    """What a run has shown."""

    wrong: list[str]
    """Every violation, in words."""
    happened: Counter[str]
    """What really took place."""
    figures: dict[str, float]
    """Measured, and bounded by no more than stands in `wrong`."""

    def report(self) -> str:
        """For people."""
        lines = [f"  {name}: {count}" for name, count in sorted(self.happened.items())]
        lines += [f"  {name} = {value:g}" for name, value in self.figures.items()]
        return "\n".join([*lines, *(f"  WRONG: {text}" for text in self.wrong[:40])])


class Feeder(threading.Thread):
    """Puts load in at a steady rate, as long as the backlog is not too long, and reads what comes out."""

    BACKLOG_MAX = 6_000
    POLL_SECONDS = 0.02

    def __init__(self, load: Load, rate: float) -> None:
        super().__init__(name="feeder", daemon=True)
        self.error: BaseException | None = None
        self.feeding = True
        """Set to False to only read on."""
        self.burst = 0
        """Records to put in at once; the feeder sets it back when they are."""
        self.rate = rate
        """Records a second."""
        self._load = load
        self._ended = threading.Event()

    def run(self) -> None:
        """Feed until ended; what goes wrong is kept for whoever looks after the fleet."""
        ledger, load = self._load.ledger, self._load
        due = time.monotonic()
        try:
            while not self._ended.is_set():
                now = time.monotonic()
                if self.burst:
                    load.put(self.burst)
                    self.burst = 0
                elif self.feeding and now >= due and load.sent - len(ledger.answers) < self.BACKLOG_MAX:
                    load.put(load.batch)
                    due = max(due + load.batch / self.rate, now - 1)  # what was missed is not made up for
                ledger.poll(self.POLL_SECONDS)
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised by `Fleet` in its own thread
            self.error = error

    def end(self) -> None:
        """End the thread; the ledger then belongs to the caller again."""
        self._ended.set()
        self.join(30)
        assert not self.is_alive(), "the feeder does not end"


class Fleet:
    """Carries out plans, and keeps count."""

    def __init__(
        self,
        stage: Stage,
        *,
        load: Load | None = None,
        rate: float = 600,
        proxy: Proxy | None = None,
        say: Callable[[str], object] = print,
    ) -> None:
        """Start nothing; *proxy* is what the stage's configuration has its members go through."""
        self.stage = stage
        self.say = say
        self.load = load or Load(stage.ledger, 4 * stage.ledger.partition_count, poison_every=60)
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.faults: list[Fault] = []
        self.members: dict[int, Member] = {}
        self.leaving: list[Member] = []
        self._dead: dict[int, Member] = {}
        """Killed, and perhaps still believed to be alive by the broker."""
        self._all: list[Member] = []
        self.feeder = Feeder(self.load, rate)
        self.leadership: Leadership | None = None
        """Who leads what in a cluster; where nobody watches that, no plan may be about it."""
        self.beside: list[Fleet] = []
        """Fleets that are looked after while this one's plan is played, as it is done to them, too."""
        self._proxy = proxy
        self._lost_before = Counter(proxy.lost) if proxy is not None else Counter()
        self._began = time.monotonic()
        self._outages: list[Interval] = []
        self._no_commits: list[Interval] = []
        """Beside the outages: when it may be that nobody could commit."""
        self._broker_down_at = self._storage_held_at = 0
        self._slow: list[Interval] = []
        """When output was slow. No outage: something has to come out all the time; only to stop may take longer."""
        self._slow_since = self._answered_before = 0
        self._alone_at = now_ms()
        """Since when no member could work; 0 while one can."""
        self._holder: sqlite3.Connection | None = None
        self._memory_peak = 0
        self._sampled_at = 0.0
        self._slowest_stop = 0.0

    # ------------------------------------------------------------------------------------------ a plan is played

    def play(self, plan: Plan) -> None:
        """Carry out every action of *plan*, each when it is due.

        Raises:
            TimeoutError: the responses that an action waits for did not come; tells where every member stands.
        """
        self.feed()
        for action in plan:
            self._await(action)
            self.say(f"{time.monotonic() - self._began:8.2f} s  {len(self.stage.ledger.answers):7} answered  {action}")
            self._carry_out(action)

    def feed(self) -> None:
        """Begin to put load in."""
        if not self.feeder.is_alive():
            self.feeder.start()

    def _await(self, action: Action) -> None:
        begun, goal = time.monotonic(), len(self.stage.ledger.answers) + action.answers
        self.until(
            lambda: time.monotonic() >= begun + action.wait and len(self.stage.ledger.answers) >= goal,
            f"{action.answers} responses before: {action}",
        )
        self.burst(action.burst)

    def burst(self, records: int) -> None:
        """Put in *records* at once."""
        self.feeder.burst = records
        while self.feeder.burst:
            self.look_after()
            time.sleep(0.001)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Look after the fleet until *condition* holds.

        Raises:
            TimeoutError: it did not; tells where every member stands.
        """
        deadline = time.monotonic() + STEP_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {STEP_SECONDS:g} s for {what}\n{self.account()}")
            self.look_after()
            time.sleep(0.01)

    def look_after(self) -> None:
        """See that nobody has ended who was not asked to, and that who was asked ends in time."""
        if self.feeder.error is not None:
            raise self.feeder.error
        for place, member in list(self.members.items()):
            code = member.service.process.poll()
            if code == -signal.SIGKILL and member.doomed:
                self._fell(place)
            elif code is not None:
                self.wrong.append(f"I12: {member.name} ended unasked: {member.service.obituary()}")
                del self.members[place]
                self._count_the_able()
        for member in list(self.leaving):
            self._see_off(member)
        if time.monotonic() >= self._sampled_at + SAMPLE_SECONDS:
            self._sampled_at = time.monotonic()
            for member in self.members.values():
                member.memory.append(member.service.memory())
                self._look_at_permits(member)
        for other in self.beside:
            other.look_after()

    def _look_at_permits(self, member: Member) -> dict[str, Any]:
        """I9: hold what a member says of its permits against itself; return its state, empty where it tells none."""
        if member.frozen or not has_started(member):
            return {}
        status, body = member.service.get("/debug/state", STATE_SECONDS)
        state: dict[str, Any] = json.loads(body) if status == 200 else {}
        if state:
            self.happened["looks at permits"] += 1
            if wrong := permits_out_of_bounds(state):
                self.wrong.append(f"I9: {member.name}: {wrong}")
        return state

    def _permits_are_whole(self) -> bool:
        """I9: whether every permit of every member that is in use belongs to the window of a partition."""
        states = [self._look_at_permits(member) for member in self.members.values()]
        return all(state and permits_astray(state) == 0 for state in states)

    def _see_off(self, member: Member) -> None:
        code = member.service.process.poll()
        took = time.monotonic() - member.stopped_at
        slow = [*self._slow, *([(self._slow_since, now_ms())] if self._slow_since else [])]
        excused = any(end >= now_ms() - took * 1000 for _, end in [*self._current_outages(), *slow])
        if code is None:
            if took > (EXIT_IN_OUTAGE_SECONDS if excused else EXIT_SECONDS) and not member.frozen:
                self.wrong.append(f"I10: {member.name} has not ended {took:.1f} s after SIGTERM\n{account(member)}")
                member.service.kill()
                self.leaving.remove(member)
            return
        self.leaving.remove(member)
        self._slowest_stop = max(self._slowest_stop, took)
        if code == -signal.SIGTERM and not has_started(member):
            self.happened["stops before anything had begun"] += 1  # Python itself had hardly started
            return
        self.happened["clean stops"] += code == 0
        if code == 1 and excused:
            self.happened["stops cut short by an outage"] += 1
            self._fault(2, noted=NOTED_LATE_MS)
        elif code != 0:
            self.wrong.append(f"I12: {member.name} was asked to stop: {member.service.obituary()}")

    def _carry_out(self, action: Action) -> None:
        do: dict[str, Callable[[int], object]] = {
            "start": self.start,
            "open": lambda place: self.until(lambda: reads(self.members[place]), f"{place} to read"),
            "kill": self.kill,
            "bury": self.bury,
            "stop": self.stop,
            "freeze": self.freeze,
            "thaw": self.thaw,
        }
        if action.kind in do:
            if action.kind not in {"start", "bury"} and action.member not in self.members:
                self.happened["actions upon who had ended unasked"] += 1  # which is wrong, and told as such
                return
            do[action.kind](action.member)
        elif action.kind == "sync brokers":
            assert self.leadership is not None
            self.until(self.leadership.look, "all nodes to be in sync")
        elif action.kind.endswith(" broker"):
            self._to_the_broker(action)
        elif action.kind == "lose answer":
            self._through.lose_answers(REQUESTS[action.request], 1)
        else:
            {
                "hold storage": self._hold_storage,
                "release storage": self._release_storage,
                "slow output": self._slow_output,
                "quick output": self._quick_output,
            }[action.kind]()

    # ------------------------------------------------------------------------------------------ members

    def start(self, place: int, doom: Mapping[str, str] | None = None) -> Member:
        """Start a member; it is not waited for. With the environment *doom* it will end itself by SIGKILL."""
        config = copy.deepcopy(self.stage.config)
        client_id = config["kafka"]["client_id"] = f"m{place}-{len(self._all)}"
        service = ServiceProcess(self.stage.folder, config, name=client_id, **(doom or {}))
        self.stage.processes.append(service)
        member = self.members[place] = Member(place, service, client_id, doomed=doom is not None)
        self._all.append(member)
        self._count_the_able()
        return member

    def kill(self, place: int) -> None:
        """SIGKILL."""
        member = self._dead[place] = self.members.pop(place)
        self._remember_memory(member)
        left = self.load.sent - len(self.stage.ledger.answers)
        at = "at work" if reads(member) else "joining" if has_started(member) else "starting"
        # Where output is slow, what it has written may still be on its way, and come after what its successor writes.
        self._fault(2 if self._slow_since else 1)
        member.service.kill()
        self.happened["kills"] += 1
        self.happened[f"kills of a member {at}"] += 1
        self.happened["kills with work left"] += left > 0
        self._count_the_able()

    def _fell(self, place: int) -> None:
        """Note that a doomed member has ended itself."""
        self._dead[place] = self.members.pop(place)
        self._fault()
        self.happened["kills at a step"] += 1
        self.happened["kills with work left"] += self.load.sent > len(self.stage.ledger.answers)
        self._count_the_able()

    def _fault(self, windows: int = 1, *, at: int = 0, noted: int = NOTED_MS) -> None:
        """Note that now, or *at* another time, something happened after which what is not committed is repeated."""
        fresh = parse_duration(self.stage.config["commit"]["interval"]) + COMMIT_SECONDS
        self.faults.append(Fault(at or now_ms(), int(fresh * 1000), windows, noted))

    def bury(self, place: int) -> None:
        """End the session of who was killed in this place."""
        with suppress(OSError):  # the broker is away: then time will tell it
            buried = bury(self.stage.broker, self.stage.group, self._dead[place].client_id)
            self.happened["sessions ended by hand"] += buried

    def stop(self, place: int) -> None:
        """SIGTERM; who is to be seen off later."""
        member = self.members.pop(place)
        self._remember_memory(member)
        self.happened["stops with work left"] += self.load.sent > len(self.stage.ledger.answers)
        member.stopped_at = time.monotonic()
        member.service.terminate()
        self.leaving.append(member)
        self._count_the_able()

    def freeze(self, place: int) -> None:
        """SIGSTOP."""
        member = self.members[place]
        self._fault(2)
        os.kill(member.service.process.pid, signal.SIGSTOP)
        member.frozen = True
        self.happened["members frozen"] += 1
        self._count_the_able()

    def thaw(self, place: int) -> None:
        """SIGCONT."""
        member = self.members[place]
        os.kill(member.service.process.pid, signal.SIGCONT)
        member.frozen = False
        self._fault(2)
        self._count_the_able()

    def _remember_memory(self, member: Member) -> None:
        self._memory_peak = max(self._memory_peak, member.service.memory_peak())

    def _count_the_able(self) -> None:
        """Note when nobody is there to work, and for how long: no silence then is the service's."""
        able = any(not member.frozen for member in self.members.values())
        if not able and not self._alone_at:
            self._alone_at = now_ms()
        elif able and self._alone_at:
            self._outages.append((self._alone_at, now_ms()))
            self._alone_at = 0

    # ------------------------------------------------------------------------------------------ what they need

    def _to_the_broker(self, action: Action) -> None:
        nodes, kind = self.stage.broker.nodes, action.kind
        node = nodes[max(0, action.member)]
        alone = len(nodes) == 1  # else no silence is excused: the others go on without it
        if self.leadership is not None:
            self.leadership.cause = kind
        match kind:
            case "start broker" | "thaw broker":
                node.start() if kind == "start broker" else node.thaw()
                if alone:
                    self._outages.append((self._broker_down_at, now_ms()))
                    self._broker_down_at = 0
                # A frozen broker handles at its thaw what was sent to it long before, also by members it then expels.
                self._fault(2 if kind == "thaw broker" else 1, noted=NOTED_LATE_MS)
            case _:
                self._fault()
                self._broker_down_at = now_ms() if alone else 0
                {"stop broker": node.stop, "kill broker": node.kill, "freeze broker": node.freeze}[kind]()
                self.happened[f"broker: {kind.removesuffix(' broker')}"] += 1
        self._no_commits.append((now_ms(), now_ms() + int(COMMITS_BACK_SECONDS * 1000)))

    def _hold_storage(self) -> None:
        """Take the write lock of the storage's file, as a program of somebody else might."""
        path = self.stage.config["storage"]["high_volume"]["path"]
        holder = sqlite3.connect(path, isolation_level=None, timeout=5)
        try:
            holder.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:  # a member was frozen while it held the lock: it is held all the same
            self.happened["storage held by a frozen member"] += 1
        self._holder = holder
        self._storage_held_at = now_ms()
        self.happened["storage held"] += 1

    def _release_storage(self) -> None:
        assert self._holder is not None
        self._holder.rollback()
        self._holder.close()
        self._holder = None
        self._outages.append((self._storage_held_at, now_ms()))
        self._storage_held_at = 0

    @property
    def _through(self) -> Proxy:
        assert self._proxy is not None, "the members do not go through a proxy"
        return self._proxy

    def _slow_output(self) -> None:
        """Let what members write go slowly, of all of them together."""
        self._slow_since, self._answered_before = now_ms(), len(self.stage.ledger.answers)
        self._through.slow(PRODUCE, SLOW_BYTES_PER_SECOND)

    def _quick_output(self) -> None:
        """Let it go at once again, and note whether it was that which has held work back."""
        self._through.quick()
        seconds, answered = (now_ms() - self._slow_since) / 1000, len(self.stage.ledger.answers) - self._answered_before
        alone = all(end < self._slow_since for _, end in self._current_outages())
        held_back = 0 < answered < self.feeder.rate * seconds and not self.all_answered
        self.say(f"{answered} answered in the {seconds:.0f} s in which output was slow")
        self.happened["output made slow"] += 1
        self.happened["output slow and work held back by nothing else"] += alone and held_back
        self._slow.append((self._slow_since, now_ms()))
        self._slow_since = 0

    def _current_outages(self) -> list[Interval]:
        begun = [at for at in (self._broker_down_at, self._storage_held_at, self._alone_at) if at]
        return [*self._outages, *((at, now_ms()) for at in begun)]

    # ------------------------------------------------------------------------------------------ the end

    def settle(self) -> None:
        """Let everything be answered and committed, read some of it back, and stop everybody as an operator would.

        Raises:
            TimeoutError: it was not answered; tells where every member stands.
        """
        ledger = self.stage.ledger
        self.feeder.feeding = False
        self.until(lambda: self.all_answered and not self.leaving, "everything to be answered at the end")
        self.feeder.end()
        if self._proxy is not None:
            for name, kind in REQUESTS.items():
                if lost := self._proxy.lost[kind] - self._lost_before[kind]:
                    self.happened[f"answers lost: {name}"] += lost
        ledger.flush()
        read_back(self.load, 100)
        self.until(self._permits_are_whole, "I9: every permit in use to be a window's")
        self.happened["members with whole permits at the end"] += len(self.members)
        for place in list(self.members):
            self.stop(place)
        wait_until(self._all_seen_off, EXIT_SECONDS + 5, "the last members to end")
        self._alone_at = 0
        ledger.read_all()

    @property
    def all_answered(self) -> bool:
        """Whether there is a response to every record by now."""
        return len(self.stage.ledger.answers) >= self.load.sent

    def share_outages(self, other: Fleet) -> None:
        """Of another fleet on the same broker, which has done something to it."""
        self._outages += other._current_outages()
        self._no_commits += other._no_commits
        self.faults += other.faults

    def _all_seen_off(self) -> bool:
        self.look_after()
        return not self.leaving

    def account(self) -> str:
        """Where every member stands, for a failing wait."""
        return "\n".join(account(member) for member in [*self.members.values(), *self.leaving])

    def judge(self, *, silence_max: float = 30.0, stagnation_max: float = 60.0) -> Findings:
        """Hold everything against the fleet that is known after `settle`.

        Args:
            silence_max: I10: seconds without any response, though there was something to answer and somebody to do it.
            stagnation_max: The same for each partition alone.
        """
        stage, ledger = self.stage, self.stage.ledger
        history = read_history(stage.broker, stage.group, ledger.input)
        commits = history.commits
        arrivals = [Arrival(entry.partition, entry.offset, entry.timestamp) for entry in ledger.entries.values()]
        replies = self._replies(ledger.answers)
        letters = self._replies(ledger.dead_letters)
        to_be_kept = [
            Arrival(entry.partition, entry.offset, entry.timestamp)
            for entry in ledger.entries.values()
            if ledger.deserves_a_letter(entry)
        ]
        self._read_logs()
        verdict = ledger.verdict()
        exactly_once = stage.config.get("delivery") == "exactly-once"
        # In every partition, as nobody here believes what the service says of whose it was.
        window = 0 if exactly_once else WINDOW * ledger.partition_count
        # While output is slow, what was written may have arrived long before its sender hears of it and can commit.
        no_commits = [*self._current_outages(), *self._slow, *self._no_commits]
        repeats, letter_repeats = (
            unexplained(repeats_of(found), commits, self.faults, window=window, no_commits=no_commits)
            for found in (replies, letters)
        )
        of_zombies = [fault for fault in self.faults if fault.windows > 1]
        late = repeats_below_commit(replies, commits)
        too_late = beyond_windows(late, of_zombies, window)
        too_late += beyond_windows(repeats_below_commit(letters, commits), of_zombies, window)
        until = max((reply.at for reply in replies), default=0)
        excused = self._current_outages()
        silence = longest_silence(arrivals, replies, until=until, excused=excused)
        stagnation = max(
            longest_silence(
                [arrival for arrival in arrivals if arrival.partition == partition],
                [reply for reply in replies if reply.partition == partition],
                until=until,
                excused=excused,
            )
            for partition in range(ledger.partition_count)
        )
        growth = max((growth_of(member.memory) for member in self._all), default=0)
        self.happened["members with a tendency of memory"] += sum(map(has_tendency, (one.memory for one in self._all)))
        self.happened["records to be dead-lettered"] += len(to_be_kept)
        self.happened["rebalances"] += len(history.generations)
        self.happened["rebalances with work in flight"] += busy_moments(arrivals, replies, history.generations)
        wrong = [
            *(f"I1: {name} was never answered" for name in verdict.missing),
            *(f"I1: {name} was never dead-lettered" for name in verdict.letters_missing),
            *(f"I3: {text}" for text in [*verdict.mismatched, *verdict.letters_mismatched]),
            *(f"I4: {text}" for text in commits_past_unanswered(arrivals, replies, commits)),
            *(f"I4: {text}" for text in commits_past_unanswered(to_be_kept, letters, commits, "dead-lettered")),
            *(f"I5: {text}" for text in commits_gone_back(commits)),
            *self._wrong_if(bool(too_late), f"I5: {len(too_late)} repeats below a commit, such as {too_late[:3]}"),
            *(
                f"I6: {len(wrong)} {what} repeated that no fault explains, such as {self._account_of(wrong[:3])}"
                for what, wrong in (("responses", repeats.wrong), ("dead letters", letter_repeats.wrong))
                if wrong
            ),
            *self._wrong_if(
                exactly_once and verdict.surplus > 0,
                f"I2: {verdict.surplus} responses repeated, such as {self._repeats(verdict.duplicated)}",
            ),
            *self._wrong_if(
                exactly_once and bool(verdict.letters_repeated),
                f"I2: dead letters repeated: {list(verdict.letters_repeated)[:3]}",
            ),
            *self._wrong_if(ledger.committed(stage.group) != ends(ledger), "I1: the last commits are not at the ends"),
            *self._wrong_if(silence > silence_max, f"I10: no response for {silence:.1f} s though records waited"),
            *self._wrong_if(stagnation > stagnation_max, f"I10: a partition stood still for {stagnation:.1f} s"),
            *self._wrong_if(
                self._memory_peak > MEMORY_BYTES_MAX, f"I11: {self._memory_peak / 2**20:.0f} MiB resident at the peak"
            ),
            *self._wrong_if(
                growth > MEMORY_GROWTH_BYTES_MAX, f"I11: a member grew by {growth / 2**20:.0f} MiB while it lived on"
            ),
            *self._readers_disagree(),
            *self._left_over_in_storage(),
        ]
        figures = {
            "records": len(ledger.entries),
            "responses": verdict.responses,
            "repeated": verdict.surplus,
            "dead letters": len(letters),
            "dead letters repeated": sum(verdict.letters_repeated.values()),
            "repeats of what was in flight": repeats.in_flight + letter_repeats.in_flight,
            "responses below a commit": len(late),
            "responses brought again to the reader": ledger.brought_again,
            "commits": len(commits),
            "commits with an offset map": sum(bool(commit.metadata) for commit in commits),
            "longest silence, s": round(silence, 2),
            "longest stagnation of a partition, s": round(stagnation, 2),
            "slowest stop, s": round(self._slowest_stop, 2),
            "memory at the peak, MiB": round(self._memory_peak / 2**20, 1),
            "most growth of a member, MiB": round(growth / 2**20, 1),
        }
        return Findings(self.wrong + wrong, self.happened, figures)

    def _replies(self, found: Mapping[str, Iterable[Answer]]) -> list[Reply]:
        """What stands on a topic for each input record."""
        return [
            Reply(entry.partition, entry.offset, one.timestamp)
            for name, entry in self.stage.ledger.entries.items()
            for one in found.get(name, ())
        ]

    @staticmethod
    def _wrong_if(condition: bool, text: str) -> Iterator[str]:
        if condition:
            yield text

    def _repeats(self, duplicated: Iterable[str]) -> list[str]:
        """When the first few of these were answered, for whoever looks for it in the logs."""
        return [
            f"{name} at {[f'{time_of(one.timestamp)} as {one.partition}/{one.offset}' for one in answers]}"
            for name, answers in ((name, self.stage.ledger.answers[name]) for name in islice(duplicated, 3))
        ]

    def _account_of(self, wrong: Iterable[Repeat]) -> list[str]:
        """Repeats, each with the last fault before it, for whoever looks for it in the logs."""
        accounts = []
        for one in wrong:
            earlier = [fault for fault in self.faults if fault.at <= one.again]
            last = max(earlier, key=attrgetter("at"), default=None)
            times = f"at {time_of(one.before)} and again at {time_of(one.again)}"
            accounts.append(f"{one.partition}/{one.offset} {times}, last fault {last and (time_of(last.at), last)}")
        return accounts

    def _read_logs(self) -> None:
        """Search every log for what may not stand there, and for the trouble the members have met."""
        for member in self._all:
            service = member.service
            for path in (service.log, service.output):
                for said in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    found = [text for text in FORBIDDEN if text in said]
                    self.wrong += [f"I12/I13: {path.name} holds {text!r}: {said[:1_000]}" for text in found]
            for line in service.log_lines():
                self._take_note_of(line)

    def _take_note_of(self, line: dict[str, Any]) -> None:
        match line.get("event"):
            case "commit refused":
                self.happened["commits refused"] += 1
            case "commit without answer":
                self.happened["commits without an answer"] += 1
            case "transaction failed":
                self.happened["transactions given up"] += 1
            case "partition lost: no longer a member of the group":
                self.happened["partitions lost by a zombie"] += 1
            case "storage unavailable: operations wait and are tried again":
                self.happened["storage found unavailable"] += 1
            case "partitions released":
                outcomes = line["outcomes"]
                if set(outcomes) - {"drained"}:
                    self._fault(2, at=timestamp_ms(line), noted=NOTED_LATE_MS)
                for outcome in outcomes:
                    self.happened[f"releases: {outcome}"] += 1

    def second_opinion(self) -> None:
        """Hold what ``tierstream verify`` finds against what the ledger has found; after `settle`."""
        config = self.stage.processes[-1].log.with_suffix(".yaml")
        done = command_line("verify", "--json", "--config", str(config), cwd=self.stage.folder)
        found, verdict = json.loads(done.stdout or "{}"), self.stage.ledger.verdict()
        expected = {
            "records": verdict.records,
            "responses": verdict.responses,
            "missing": verdict.missing,
            "duplicated": sorted(verdict.duplicated),
            "mismatched": [],
        }
        found["duplicated"] = sorted(found.get("duplicated", ()))
        different = [name for name, value in expected.items() if found.get(name) != value]
        if different:
            self.wrong.append(f"verify disagrees with the ledger in {different}: {done.stderr[-500:]}")
        self.happened["repeats that verify has found too"] += len(found["duplicated"])

    def _readers_disagree(self) -> Iterator[str]:
        """The reader during the faults and one after them have to agree; tell what transactions have hidden."""
        ledger = self.stage.ledger
        during = {(answer.partition, answer.offset) for copies in ledger.answers.values() for answer in copies}
        after = places(self.stage.broker, ledger.output, ledger.isolation)
        if during != after:
            yield f"the reader during the faults saw {len(during)} responses, one after them {len(after)}"
        if ledger.isolation == "read_committed":
            every = places(self.stage.broker, ledger.output, "read_uncommitted")
            self.happened["responses hidden in aborted transactions"] += len(every) - len(after)

    def _left_over_in_storage(self) -> Iterator[str]:
        """I8: after recovery no revision without a row, no row without its revision, nothing in the change log."""
        config = self.stage.processes[-1].log.with_suffix(".yaml")
        if self.stage.config["storage"]["high_volume"]["type"] == "memory":
            return
        last: dict[str, Any] = {}

        def recovered() -> bool:  # a killed member's lease has to run out first
            asked = ("--json", "--config", str(config))
            command_line("storage", "recover", "--yes", *asked, cwd=self.stage.folder)
            done = command_line("storage", "verify", "--min-age", "0s", *asked, cwd=self.stage.folder)
            last.clear()
            last.update(json.loads(done.stdout) if done.stdout.strip() else {"stderr": done.stderr})
            return not last.get("changes", 1)

        with suppress(TimeoutError):
            wait_until(recovered, 20, "recovery", every=1)
        if last.get("changes", 1) or last["orphans"] or last["dangling"]:
            yield f"I8: left in storage: {last}"
        found = self._scan_of_storage()
        self.happened["tombstones in storage"] += found.redirects
        yield from (f"I8: {text}" for text in found.wrong[:20])
        if found.redirects != last.get("tombstones"):
            yield f"I8: {found.redirects} redirects in the table, {last.get('tombstones')} counted by `storage verify`"

    def _scan_of_storage(self) -> Scan:
        """Look at the tiers' files, as recovery has left them."""
        storage = self.stage.config["storage"]
        return scan(storage["high_volume"]["path"], storage["long_term"]["path"])


def places(broker: Broker, topic: str, isolation: str) -> set[tuple[int, int]]:
    """Every place of a topic that holds a record, as a reader sees it that starts now."""
    reader = Reader(broker, topic, isolation=isolation)
    try:
        return {(record.partition, record.offset) for record in reader.read_to_end()}
    finally:
        reader.close()


def has_tendency(samples: list[int]) -> bool:
    """Whether a member has lived long enough to tell whether it grows."""
    return len(samples) >= MEMORY_SAMPLES_MIN


def growth_of(samples: list[int]) -> int:
    """How much more the last quarter holds than the second one; 0 for a life too short to tell."""
    quarter = len(samples) // 4
    if not has_tendency(samples):
        return 0
    return int(median(samples[-quarter:]) - median(samples[quarter : 2 * quarter]))


def has_started(member: Member) -> bool:
    """Whether it has said so."""
    return '"event":"started"' in member.service.log.read_text(encoding="utf-8", errors="replace")


def reads(member: Member) -> bool:
    """Whether it has ever begun to read a partition."""
    return '"event":"partition open"' in member.service.log.read_text(encoding="utf-8", errors="replace")


def account(member: Member) -> str:
    """Where a member stands."""
    return f"{member.name}\n{member.service.account()}"


def now_ms() -> int:
    """Milliseconds since the epoch; the broker's clock is this machine's."""
    return int(time.time() * 1000)


def time_of(timestamp: int) -> str:
    """Milliseconds since the epoch as logs have them."""
    return datetime.fromtimestamp(timestamp / 1000, UTC).isoformat()


def timestamp_ms(line: dict[str, Any]) -> int:
    """When a log line was written."""
    return int(datetime.fromisoformat(line["timestamp"]).timestamp() * 1000)
