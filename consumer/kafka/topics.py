"""Questions to a cluster (topics, commits of a group, ends of partitions), and creating topics.

:class:`Cluster` asks over aiokafka's plain client and protocol classes, not over its administration client, because
that one

* lets a broker with automatic topic creation create every topic that is asked about;
* does not look at the error of a whole ``OffsetFetch`` answer: while a coordinator loads, every group looks as if it
  had never committed anything, and who believes that starts from the beginning, or skips to the end;
* has no deadline and does not try again what is about to be right in a moment.

Every method answers within the deadline of its Cluster or raises. In between it tries again what may pass: brokers
starting or restarting, leaders and coordinators moving.

:func:`inspect_topics` is the check of the service's start (contract 6): it waits for the cluster without limit, creates
what is missing where that is asked for, and refuses what cannot work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar
from uuid import UUID

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    GroupIdNotFound,
    IllegalGenerationError,
    IncompatibleBrokerVersion,
    KafkaError,
    NoError,
    TopicAlreadyExistsError,
    UnknownError,
    UnknownMemberIdError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest, DescribeGroupsRequest
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from consumer.config import MIB, Config
from consumer.errors import ConfigError, TierstreamError
from consumer.kafka.bootstrap import ask_the_next_address
from consumer.kafka.connection import RETRY_BACKOFF_MS, admin_settings
from consumer.kafka.diagnosis import why_unreachable
from consumer.kafka.topic_ids import TopicIdsRequest, leaders, topic_ids
from consumer.kafka.transaction_states import TransactionState, TransactionStateRequest, described
from consumer.log import get_logger

ANSWER_SECONDS: Final = 15.0
"""Longest wait for an answer, repetitions included; a coordinator that moves takes a few seconds."""
CLOSE_SECONDS: Final = 2.0
CREATED_SECONDS: Final = 30.0
"""Longest wait for a created topic's partitions to be led."""
CONNECT_BACKOFF_SECONDS: Final = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Waits between attempts to reach a cluster; the last one repeats."""

TOPIC_OVERHEAD_BYTES: Final = MIB
"""Room for key, headers and batch in ``max.message.bytes`` of topics that are created."""

EARLIEST: Final = -2
LATEST: Final = -1
"""What :meth:`Cluster.offsets` may be asked for instead of a time."""

_TOPIC: Final = 2  # resource type of DescribeConfigs
_GROUP: Final = 0  # key type of FindCoordinator
_TRANSACTIONAL_ID: Final = 1  # another one

Partition: TypeAlias = tuple[str, int]
"""Topic and partition number."""

_Answer = TypeVar("_Answer")

log = get_logger(__name__)


class ClusterUnavailable(TierstreamError):
    """The brokers cannot be reached, or did not answer in time; trying later may help."""

    code = "backend_unavailable"
    retriable = True


class ClusterRefusal(TierstreamError):
    """The brokers answered with no: not authorised, not possible."""


@dataclass(frozen=True, slots=True)
class Topic:
    """What the cluster knows of a topic."""

    name: str
    leaders: Mapping[int, int]
    """Partition to the broker that leads it; -1 where none does."""

    @property
    def partitions(self) -> int:
        """How many partitions it has."""
        return len(self.leaders)


@dataclass(frozen=True, slots=True)
class NewTopic:
    """A topic to be created."""

    name: str
    partitions: int
    replication_factor: int
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Committed:
    """What a group has committed for a partition."""

    offset: int
    metadata: str


@dataclass(frozen=True, slots=True)
class GroupState:
    """What the coordinator says of a group."""

    state: str
    """``Stable``, ``Empty``, ``PreparingRebalance``, … ; ``Dead`` where there is no such group."""
    members: int
    member_ids: frozenset[str] = field(default=frozenset(), compare=False)


class Cluster:
    """A client for questions: ``async with Cluster(config) as cluster``. Used by one task at a time.

    Args:
        config: How to reach it.
        seconds: Longest wait for each answer.
    """

    def __init__(self, config: Config, *, seconds: float = ANSWER_SECONDS) -> None:
        settings = admin_settings(config)
        settings["request_timeout_ms"] = min(settings["request_timeout_ms"], round(seconds * 1000))
        self._settings = settings
        self._seconds = seconds
        self._client: AIOKafkaClient | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect to the first broker that answers.

        Raises:
            ClusterUnavailable: none did; the text says why, as far as one more attempt can tell.

        Cancellation: nothing stays open.
        """
        client = self._client = AIOKafkaClient(**self._settings)
        ask_the_next_address(client)
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._seconds):
                await client.bootstrap()
        except (KafkaError, OSError, TimeoutError) as error:
            failure = error
        except BaseException:
            await self.close()
            raise
        # One that knows of no broker, not even of the one that answers, was refused without noticing (H33).
        if failure is not None or not client.cluster.brokers():
            await self.close()
            reason = await why_unreachable(self._settings)
            raise ClusterUnavailable(reason.text, reason.hint) from failure

    async def close(self) -> None:
        """Close all connections, waiting :data:`CLOSE_SECONDS` at most. May be called at any time, and twice."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await client.close()

    # ------------------------------------------------------------------------------------------ questions

    async def cluster_id(self) -> str | None:
        """Return the cluster's id; None from brokers that have none."""
        found = await self._persistently("the cluster's id", lambda: self._metadata([]))
        identity = found.get("cluster_id")
        return str(identity) if identity else None

    async def brokers(self) -> int:
        """Return how many brokers are up."""
        return len((await self._persistently("the list of brokers", lambda: self._metadata([])))["brokers"])

    async def topics(self, names: Iterable[str]) -> dict[str, Topic | None]:
        """Look up topics, creating none: name to what it is, None where there is no such topic.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised to describe one of them.
        """
        asked = sorted(set(names))
        return await self._persistently("topics", lambda: self._topics(asked))

    async def topic_ids(self, names: Iterable[str]) -> dict[str, UUID]:
        """Return the ids of topics; one that does not exist is left out, and all are where the brokers tell no ids.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised to describe one of them.
        """
        asked = sorted(set(names))
        return await self._if_spoken("topic ids", lambda: self._topic_ids(asked)) or {}

    async def settings(self, topics: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Return the effective values of the settings *names* of *topics*; what does not exist is left out.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised, or not supported.
        """
        asked = [(_TOPIC, topic, list(names)) for topic in topics]
        return await self._persistently("topic settings", lambda: self._topic_settings(asked))

    async def create(self, topics: Sequence[NewTopic]) -> None:
        """Create *topics* and wait until all their partitions are led; one that exists already is fine.

        Raises:
            ClusterUnavailable: no answer in time; some may have been created.
            ClusterRefusal: the cluster does not want to; the text names the topic and the reason.
        """
        asked: list[tuple[Any, ...]] = [
            (topic.name, topic.partitions, topic.replication_factor, [], list(topic.settings.items()))
            for topic in topics
        ]
        await self._persistently("creating topics", lambda: self._create(asked))
        names = [topic.name for topic in topics]
        try:
            async with asyncio.timeout(CREATED_SECONDS):
                while True:
                    found = (await self.topics(names)).values()
                    if all(topic and topic.leaders and -1 not in topic.leaders.values() for topic in found):
                        return
                    await asyncio.sleep(RETRY_BACKOFF_MS / 1000)
        except TimeoutError:
            raise ClusterUnavailable(f"created topics have no leader: {', '.join(names)}") from None

    async def committed(self, group: str, partitions: Iterable[Partition] | None = None) -> dict[Partition, Committed]:
        """Return what *group* has committed, for *partitions* or for all it ever committed; others are left out.

        An empty answer means that there is no commit: an error of any kind is raised or tried again.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised.
        """
        asked: list[tuple[str, list[int]]] | None = None
        if partitions is not None:
            by_topic: dict[str, list[int]] = {}
            for topic, partition in sorted(set(partitions)):
                by_topic.setdefault(topic, []).append(partition)
            asked = list(by_topic.items())
        return await self._persistently(f"commits of group {group}", lambda: self._committed(group, asked))

    async def commit(self, group: str, commits: Mapping[Partition, Committed]) -> None:
        """Commit for *group* from outside; only a group without members takes that.

        Raises:
            ClusterUnavailable: no answer in time; may have been done.
            ClusterRefusal: the group has members, or not authorised; some partitions may have been committed.
        """
        by_topic: dict[str, list[tuple[int, int, str]]] = {}
        for (topic, partition), commit in sorted(commits.items(), key=itemgetter(0)):
            by_topic.setdefault(topic, []).append((partition, commit.offset, commit.metadata))
        await self._persistently(f"commit of group {group}", lambda: self._commit(group, list(by_topic.items())))

    async def group(self, group: str) -> GroupState:
        """Return state and number of members of *group*.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised.
        """
        return await self._persistently(f"group {group}", lambda: self._group(group))

    async def offsets(
        self, partitions: Iterable[Partition], at: int, *, committed_only: bool = False
    ) -> dict[Partition, int]:
        """Return an offset of each partition, in their order.

        Args:
            partitions: Existing partitions.
            at: :data:`EARLIEST`, :data:`LATEST` (the high watermark: where the next record will be), or milliseconds
                since the epoch: the first record of that time or later, the end where there is none.
            committed_only: The end is where the oldest open transaction begins: up to there ``read_committed`` reads.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised.
        """
        asked = sorted(set(partitions))
        isolation = int(committed_only)
        found = await self._persistently("offsets", lambda: self._offsets(asked, at, isolation))
        late = [partition for partition, offset in found.items() if offset < 0]
        if late:
            found |= await self._persistently("offsets", lambda: self._offsets(late, LATEST, isolation))
        return {partition: found[partition] for partition in asked}

    async def transaction(self, transactional_id: str) -> TransactionState | None:
        """Return the state of the last transaction of *transactional_id*; None from brokers that will not tell.

        Raises:
            ClusterUnavailable: no answer in time.
            ClusterRefusal: not authorised to know who coordinates it.
        """
        return await self._if_spoken(
            f"transactional id {transactional_id}", lambda: self._transaction(transactional_id)
        )

    async def marker_leaders(
        self, transactional_id: str, group: str, partitions: Iterable[Partition]
    ) -> dict[Partition, tuple[int, int]] | None:
        """Wait until the coordinator of *transactional_id* itself knows where to write the markers of a transaction.

        Returns:
            The leader of each of *partitions* and its epoch, as far as such a partition exists and may be described;
            None from brokers that do not tell.

        Raises:
            ClusterUnavailable: one of them is not led by the deadline, or the offsets of *group* are not.
            ClusterRefusal: not authorised to know the coordinators.
        """
        asked = sorted(set(partitions))
        return await self._if_spoken("leaders", lambda: self._marker_leaders(transactional_id, group, asked))

    # ------------------------------------------------------------------------------------------ single attempts

    async def _metadata(self, topics: list[str]) -> dict[str, Any]:
        assert self._client is not None, "open first"
        answer = await self._send(MetadataRequest(topics, allow_auto_topic_creation=False))
        if not topics:  # brokers alone: aiokafka would log every topic that is missing
            self._client.cluster.update_metadata(answer)
        return dict(answer.to_object())

    async def _topics(self, names: list[str]) -> dict[str, Topic | None]:
        found: dict[str, Topic | None] = dict.fromkeys(names)
        # An empty list would be answered with every topic by brokers of the oldest protocol.
        for topic in (await self._metadata(names))["topics"] if names else ():
            error = for_code(topic["error_code"])
            if error is UnknownTopicOrPartitionError:
                continue
            # A topic just created may have no leader for a moment: it exists.
            if topic["error_code"] != NoError.errno and not topic["partitions"]:
                _raise_for(topic["error_code"], f"topic {topic['topic']}")
            leaders = {int(entry["partition"]): int(entry["leader"]) for entry in topic["partitions"]}
            found[topic["topic"]] = Topic(topic["topic"], leaders)
        return found

    async def _topic_ids(self, names: list[str]) -> dict[str, UUID]:
        return topic_ids(await self._send(TopicIdsRequest(names)))

    async def _topic_settings(self, asked: list[tuple[int, str, list[str]]]) -> dict[str, dict[str, str]]:
        answer = await self._ask(DescribeConfigsRequest(asked, include_synonyms=False))
        found: dict[str, dict[str, str]] = {}
        for resource in answer["resources"]:
            if for_code(resource["error_code"]) is UnknownTopicOrPartitionError:
                continue
            _raise_for(resource["error_code"], f"settings of topic {resource['resource_name']}")
            entries = resource["config_entries"]
            found[resource["resource_name"]] = {entry["config_names"]: entry["config_value"] for entry in entries}
        return found

    async def _create(self, asked: list[tuple[Any, ...]]) -> None:
        controller = (await self._metadata([])).get("controller_id", -1)
        request = CreateTopicsRequest(asked, round(self._seconds * 1000), validate_only=False)
        answer = await self._ask(request, node=controller if controller >= 0 else None)
        for outcome in answer["topic_errors"]:
            if for_code(outcome["error_code"]) is not TopicAlreadyExistsError:
                _raise_for(outcome["error_code"], f"creating topic {outcome['topic']}", outcome.get("error_message"))

    async def _coordinator(self, key: str, kind: int = _GROUP) -> int:
        answer = await self._ask(FindCoordinatorRequest(key, kind))
        _raise_for(answer["error_code"], f"the coordinator of {key}")
        await self._metadata([])  # it may be a broker that has come up since
        return int(answer["coordinator_id"])

    async def _committed(self, group: str, asked: list[tuple[str, list[int]]] | None) -> dict[Partition, Committed]:
        answer = await self._ask(OffsetFetchRequest(group, asked), node=await self._coordinator(group))
        _raise_for(answer.get("error_code", 0), f"commits of group {group}")
        found: dict[Partition, Committed] = {}
        for topic in answer["topics"]:
            for entry in topic["partitions"]:
                if for_code(entry["error_code"]) is not UnknownTopicOrPartitionError:
                    _raise_for(entry["error_code"], f"commits of group {group}")
                if entry["offset"] >= 0:
                    place = topic["topic"], int(entry["partition"])
                    found[place] = Committed(int(entry["offset"]), entry["metadata"] or "")
        return found

    async def _commit(self, group: str, asked: list[tuple[str, list[tuple[int, int, str]]]]) -> None:
        request = OffsetCommitRequest(
            group,
            OffsetCommitRequest.DEFAULT_GENERATION_ID,
            "",
            OffsetCommitRequest.DEFAULT_RETENTION_TIME,
            asked,
        )
        answer = await self._ask(request, node=await self._coordinator(group))
        for topic in answer["topics"]:
            for entry in topic["partitions"]:
                if for_code(entry["error_code"]) in {UnknownMemberIdError, IllegalGenerationError}:
                    raise ClusterRefusal(f"group {group} has members")
                _raise_for(entry["error_code"], f"commit of {topic['topic']}/{entry['partition']}")

    async def _group(self, group: str) -> GroupState:
        request = DescribeGroupsRequest([group], include_authorized_operations=False)
        (described,) = (await self._ask(request, node=await self._coordinator(group)))["groups"]
        if for_code(described["error_code"]) is GroupIdNotFound:
            return GroupState("Dead", 0)
        _raise_for(described["error_code"], f"group {group}")
        members = frozenset(str(member["member_id"]) for member in described["members"])
        return GroupState(described["state"], len(members), members)

    async def _transaction(self, transactional_id: str) -> TransactionState | None:
        coordinator = await self._coordinator(transactional_id, _TRANSACTIONAL_ID)
        try:
            error, state = described(await self._send(TransactionStateRequest(transactional_id), coordinator))
            _raise_for(error, f"the transaction of {transactional_id}")
        except (IncompatibleBrokerVersion, ClusterRefusal):
            return None
        return state

    async def _marker_leaders(
        self, transactional_id: str, group: str, asked: list[Partition]
    ) -> dict[Partition, tuple[int, int]]:
        coordinator = await self._coordinator(transactional_id, _TRANSACTIONAL_ID)
        known = leaders(await self._send(TopicIdsRequest(sorted({topic for topic, _ in asked})), coordinator))
        found = {place: known[place] for place in asked if place in known}
        for (topic, partition), (leader, _) in found.items():
            if leader < 0:
                raise ClusterUnavailable(f"partition {partition} of topic {topic} is not led by any broker")
        offsets = await self._ask(FindCoordinatorRequest(group, _GROUP), coordinator)
        _raise_for(offsets["error_code"], f"the coordinator of group {group}")
        return found

    async def _offsets(self, asked: list[Partition], at: int, isolation: int) -> dict[Partition, int]:
        topics = await self._topics(sorted({topic for topic, _ in asked}))
        by_leader: dict[int, dict[str, list[tuple[int, int]]]] = {}
        for name, partition in asked:
            topic = topics[name]
            leader = -1 if topic is None else topic.leaders.get(partition, -1)
            if leader < 0:
                raise ClusterUnavailable(f"partition {partition} of topic {name} is not led by any broker")
            by_leader.setdefault(leader, {}).setdefault(name, []).append((partition, at))
        found: dict[Partition, int] = {}
        for leader, wanted in by_leader.items():
            answer = await self._ask(OffsetRequest(-1, isolation, list(wanted.items())), node=leader)
            for topic_answer in answer["topics"]:
                for entry in topic_answer["partitions"]:
                    _raise_for(entry["error_code"], f"offsets of topic {topic_answer['topic']}")
                    found[topic_answer["topic"], int(entry["partition"])] = int(entry["offset"])
        return found

    # ------------------------------------------------------------------------------------------ sending

    async def _ask(self, request: Any, node: int | None = None) -> dict[str, Any]:
        return dict((await self._send(request, node)).to_object())

    async def _send(self, request: Any, node: int | None = None) -> Any:
        assert self._client is not None, "open first"
        return await self._client.send(self._client.get_random_node() if node is None else node, request)

    async def _if_spoken(self, what: str, attempt: Callable[[], Awaitable[_Answer]]) -> _Answer | None:
        """As :meth:`_persistently`; None where the broker does not speak what is asked."""
        try:
            return await self._persistently(what, attempt)
        except NotImplementedError:  # what the client raises for a version that the broker does not speak
            return None

    async def _persistently(self, what: str, attempt: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Repeat *attempt* while it fails in passing, until the deadline.

        Cancellation: the request under way is forgotten.
        """
        last: BaseException | None = None
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    try:
                        return await attempt()
                    except (KafkaError, ClusterUnavailable, OSError) as error:
                        if not getattr(error, "retriable", True) and not isinstance(error, UnknownError):
                            raise
                        last = error
                    await asyncio.sleep(RETRY_BACKOFF_MS / 1000)
                    with suppress(KafkaError, OSError):
                        await self._metadata([])
        except TimeoutError:
            reason = f" ({_named(last)})" if last is not None else ""
            raise ClusterUnavailable(f"{what}: no answer within {self._seconds:g} s{reason}") from last
        except KafkaError as error:
            raise ClusterRefusal(f"{what}: {_named(error)}") from error


def _raise_for(code: int, what: str, detail: str | None = None) -> None:
    """Raise the error of a code in an answer; what may pass as it is, to be tried again, the rest in words."""
    if code == NoError.errno:
        return
    error = for_code(code)
    if error.retriable or error is UnknownError:  # what a broker says of its own defects, often for a moment
        raise error(what)
    raise ClusterRefusal(f"{what}: {detail or _named(error())}")


def _named(error: BaseException) -> str:
    if isinstance(error, TierstreamError):
        return str(error)
    return (getattr(error, "description", None) or "").strip().rstrip(".") or type(error).__name__


# ---------------------------------------------------------------------------------------------- the check at start


@dataclass(frozen=True, slots=True)
class TopicPlan:
    """What the service has to know of the cluster and its topics; read once per start."""

    cluster_id: str | None
    input_partitions: Mapping[str, int]
    """Input topic to its number of partitions at this moment."""
    output_partitions: int
    dead_letter_partitions: int
    """0 where there is no dead letter topic."""
    output_compacted: bool
    output_bytes_max: int | None
    """``max.message.bytes`` of the output topic; None where it may not be read."""
    dead_letter_bytes_max: int | None
    """``max.message.bytes`` of the dead letter topic; None as above, or where there is none."""


def needed_topics(config: Config) -> dict[str, NewTopic]:
    """Return the topics that *config* names, as they would be created."""
    limits = {
        **dict.fromkeys(config.input.topics, config.limits.record_bytes),
        config.output.topic: config.output.max_request_bytes,
    }
    if config.dead_letter.topic is not None:
        limits[config.dead_letter.topic] = config.limits.record_bytes
    return {
        name: NewTopic(
            name,
            config.topics.partitions,
            config.topics.replication_factor,
            {"max.message.bytes": str(limit + TOPIC_OVERHEAD_BYTES)},
        )
        for name, limit in limits.items()
    }


def is_compacted(settings: Mapping[str, str]) -> bool:
    """Whether a topic with these settings loses older records of a key."""
    return "compact" in settings.get("cleanup.policy", "")


async def inspect_topics(config: Config, on_failure: Callable[[str], None] | None = None) -> TopicPlan:
    """Wait for the cluster, check its topics, and create missing ones where ``topics.create`` says so.

    Args:
        config: The configuration.
        on_failure: Told after each attempt why the cluster could not be reached.

    Raises:
        ConfigError: topics are missing, cannot be created, may not be described, or the output topic is compacted
            without leave; the text names them.

    Cancellation: the connection is closed; topics may have been created.
    """
    failures = 0
    while True:
        try:
            async with Cluster(config) as cluster:
                return await _plan(cluster, config)
        except ClusterUnavailable as error:
            hint = {} if error.hint is None else {"hint": error.hint}
            log.warning("cluster cannot be reached", error=str(error), attempt=failures + 1, **hint)
            if on_failure is not None:
                on_failure(str(error))
        except ClusterRefusal as error:
            raise ConfigError(str(error)) from error
        await asyncio.sleep(CONNECT_BACKOFF_SECONDS[min(failures, len(CONNECT_BACKOFF_SECONDS) - 1)])
        failures += 1


async def ensure_topics(cluster: Cluster, config: Config) -> list[str]:
    """Create the topics that *config* names and that are missing; return their names.

    Raises:
        ClusterUnavailable: no answer in time.
        ClusterRefusal: the cluster does not want to.
    """
    needed = needed_topics(config)
    missing = [name for name, topic in (await cluster.topics(needed)).items() if topic is None]
    if missing:
        await cluster.create([needed[name] for name in missing])
    return missing


async def _plan(cluster: Cluster, config: Config) -> TopicPlan:
    if config.topics.create and (created := await ensure_topics(cluster, config)):
        log.info("topics created", topics=created)
    topics = await cluster.topics(needed_topics(config))
    missing = sorted(name for name, topic in topics.items() if topic is None)
    if missing:
        raise ConfigError(f"missing topics: {', '.join(missing)}; create them, or set topics.create to true")
    settings = await _settings(cluster, config)
    compacted = is_compacted(settings.get(config.output.topic, {}))
    if compacted and not config.output.allow_compacted:
        raise ConfigError(
            f"output.topic {config.output.topic} is compacted: it would keep only the last response of each key; "
            "use another, or set output.allow_compacted to true"
        )
    counts = {name: topic.partitions for name, topic in topics.items() if topic is not None}
    return TopicPlan(
        cluster_id=await cluster.cluster_id(),
        input_partitions={name: counts[name] for name in config.input.topics},
        output_partitions=counts[config.output.topic],
        dead_letter_partitions=counts.get(config.dead_letter.topic or "", 0),
        output_compacted=compacted,
        output_bytes_max=_bytes_max(settings, config.output.topic),
        dead_letter_bytes_max=_bytes_max(settings, config.dead_letter.topic),
    )


async def _settings(cluster: Cluster, config: Config) -> dict[str, dict[str, str]]:
    """Return the settings of the topics written to; nothing where they may not be read."""
    topics = [topic for topic in (config.output.topic, config.dead_letter.topic) if topic is not None]
    try:
        return await cluster.settings(topics, ["cleanup.policy", "max.message.bytes"])
    except ClusterRefusal as error:
        # Reading settings is a permission of its own, which the service needs for nothing else.
        log.warning("cleanup policy and limits of the topics written to are unknown", error=str(error))
        return {}


def _bytes_max(settings: Mapping[str, Mapping[str, str]], topic: str | None) -> int | None:
    value = settings.get(topic or "", {}).get("max.message.bytes")
    return None if value is None else int(value)
