"""Questions to a cluster: an error is never taken for an answer, what passes is asked again, nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError, NodeNotReadyError
from aiokafka.protocol.admin import (
    CreateTopicsResponse_v3,
    DescribeConfigsResponse_v2,
    DescribeGroupsResponse_v3,
)
from aiokafka.protocol.commit import OffsetFetchResponse_v3
from aiokafka.protocol.coordination import FindCoordinatorRequest, FindCoordinatorResponse_v1
from aiokafka.protocol.metadata import MetadataRequest, MetadataResponse_v5
from aiokafka.protocol.offset import OffsetResponse_v3

from consumer.config import Config
from consumer.errors import ConfigError
from consumer.kafka import topics
from consumer.kafka.diagnosis import Reason
from consumer.kafka.topic_ids import TopicIdsRequest
from consumer.kafka.topics import (
    LATEST,
    Cluster,
    ClusterRefusal,
    ClusterUnavailable,
    Committed,
    GroupState,
    NewTopic,
    Topic,
    inspect_topics,
    is_compacted,
    needed_topics,
)
from consumer.kafka.transaction_states import TransactionState, TransactionStateRequest

NO_ERROR, UNKNOWN_TOPIC, LOADING, NOT_COORDINATOR, TOPIC_DENIED, GROUP_DENIED = 0, 3, 14, 16, 29, 30
UNEXPECTED, EXISTS, BAD_REPLICATION, CONFIG_DENIED = -1, 36, 38, 29
NOT_AVAILABLE, UNSUPPORTED, ID_DENIED, ID_UNKNOWN = 15, 35, 53, 105


def metadata(*named: tuple[str, int, list[int]]) -> MetadataResponse_v5:
    """An answer of one broker: topics as (name, error, leaders)."""
    return MetadataResponse_v5(
        0,
        [(1, "127.0.0.1", 9092, None)],
        "cluster-1",
        1,
        [
            (error, name, False, [(0, number, leader, [1], [1], []) for number, leader in enumerate(leaders)])
            for name, error, leaders in named
        ],
    )


def commits(error: int, *entries: tuple[str, int, int, str, int]) -> OffsetFetchResponse_v3:
    """An answer to OffsetFetch: the error of all of it, entries as (topic, partition, offset, metadata, error)."""
    return OffsetFetchResponse_v3(0, [(topic, [tuple(rest)]) for topic, *rest in entries], error)


COORDINATOR = FindCoordinatorResponse_v1(0, NO_ERROR, None, 1, "127.0.0.1", 9092)


def transaction(error: int, state: str) -> Any:
    """An answer to DescribeTransactions."""
    return TransactionStateRequest._CLASSES[0].RESPONSE_TYPE(0, [(error, "id", state, 0, 0, 7, 0, [], {})], {})


def led(*named: tuple[str, int, list[tuple[int, int]]]) -> Any:
    """An answer of the metadata request that tells leader epochs: topics as (name, error, [(leader, epoch)])."""
    described: list[tuple[Any, ...]] = [
        (error, name, None, False, [(0, at, *leader, [], [], [], {}) for at, leader in enumerate(leaders)], 0, {})
        for name, error, leaders in named
    ]
    return TopicIdsRequest._CLASSES[0].RESPONSE_TYPE(0, [], "", 1, described, {})


class ScriptedClient:
    """Stands in for aiokafka's client: answers each kind of request from its list, the last answer for ever.

    An exception in a list is raised; None never answers.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[Any]] = {
            "MetadataRequest": [metadata()],
            "FindCoordinatorRequest": [COORDINATOR],
        }
        self.sent: list[tuple[Any, Any]] = []
        self.bootstraps: list[Any] = [None]
        self.cluster = self
        self.hosts = [("127.0.0.1", 9092, 0)]
        self._request_timeout_ms = 30_000
        self.closed = 0
        self.asked = asyncio.Event()
        """Set with the first request."""

    def __call__(self, **_settings: object) -> ScriptedClient:
        return self

    async def bootstrap(self) -> None:
        outcome = self.bootstraps.pop(0) if len(self.bootstraps) > 1 else self.bootstraps[0]
        if outcome is not None:
            raise outcome

    def brokers(self) -> list[int]:
        return [1]

    async def close(self) -> None:
        self.closed += 1

    def get_random_node(self) -> int:
        return 1

    def update_metadata(self, _answer: object) -> None:
        pass

    async def send(self, node: object, request: object) -> Any:
        self.sent.append((node, request))
        self.asked.set()
        script = self.answers[type(request).__name__]
        # Refreshing the list of brokers between attempts must not use up what a test says of topics.
        if isinstance(request, MetadataRequest) and not request._topics:
            return metadata()
        answer = script.pop(0) if len(script) > 1 else script[0]
        if answer is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def count(self, kind: str) -> int:
        """How many requests of this kind were sent."""
        return sum(type(request).__name__ == kind for _, request in self.sent)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ScriptedClient:
    """The client of every Cluster; attempts follow each other at once."""
    scripted = ScriptedClient()
    monkeypatch.setattr(topics, "AIOKafkaClient", scripted)

    async def unknown(given: Mapping[str, Any]) -> Reason:
        return Reason(f"no broker answers at {given['bootstrap_servers'][0]}", "look", reached=False)

    monkeypatch.setattr(topics, "why_unreachable", unknown)  # it would ask whoever is at that address
    monkeypatch.setattr(topics, "RETRY_BACKOFF_MS", 1)
    monkeypatch.setattr(topics, "CONNECT_BACKOFF_SECONDS", (0.0,))
    return scripted


def configured(**sections: dict[str, object]) -> Config:
    """A configuration with these sections."""
    return Config.model_validate(sections)


async def ask(question: Callable[[Cluster], Any], seconds: float = 5.0) -> Any:
    """Ask one question of the scripted cluster."""
    async with Cluster(configured(), seconds=seconds) as cluster:
        return await question(cluster)


class TestCommitted:
    """What a group has committed: the question on which starting at the right place depends."""

    async def test_a_loading_coordinator_is_not_an_empty_group(self, client: ScriptedClient) -> None:
        """An error for the whole answer leaves the list of topics empty; believed, everything would run again."""
        found = commits(NO_ERROR, ("t", 0, 5, "ts1:x", NO_ERROR))
        client.answers["OffsetFetchRequest"] = [commits(LOADING), commits(NOT_COORDINATOR), found]

        assert await ask(lambda cluster: cluster.committed("g")) == {("t", 0): Committed(5, "ts1:x")}
        assert client.count("FindCoordinatorRequest") == 3

    async def test_an_error_of_one_partition_is_not_a_missing_commit(self, client: ScriptedClient) -> None:
        """As above, for one partition."""
        bad = commits(NO_ERROR, ("t", 0, 5, "", NO_ERROR), ("t", 1, -1, "", LOADING))
        good = commits(NO_ERROR, ("t", 0, 5, "", NO_ERROR), ("t", 1, 7, None, NO_ERROR))  # type: ignore[arg-type]
        client.answers["OffsetFetchRequest"] = [bad, good]

        found = await ask(lambda cluster: cluster.committed("g", [("t", 1), ("t", 0)]))

        assert found == {("t", 0): Committed(5, ""), ("t", 1): Committed(7, "")}

    async def test_partitions_without_a_commit_are_left_out(self, client: ScriptedClient) -> None:
        """Kafka's -1 is no offset."""
        client.answers["OffsetFetchRequest"] = [commits(NO_ERROR, ("t", 0, -1, "", NO_ERROR))]

        assert await ask(lambda cluster: cluster.committed("g")) == {}

    async def test_what_is_forbidden_is_refused_at_once(self, client: ScriptedClient) -> None:
        """Asking again changes nothing."""
        client.answers["OffsetFetchRequest"] = [commits(GROUP_DENIED)]

        with pytest.raises(ClusterRefusal, match="commits of group g"):
            await ask(lambda cluster: cluster.committed("g"))

        assert client.count("OffsetFetchRequest") == 1


class TestAsking:
    """Deadlines and repetitions."""

    async def test_passing_failures_are_asked_again(self, client: ScriptedClient) -> None:
        """A broker that restarts is back in a moment."""
        good = metadata(("t", NO_ERROR, [1, 1]))
        client.answers["MetadataRequest"] = [NodeNotReadyError(), KafkaConnectionError(), OSError("reset"), good]

        assert await ask(lambda cluster: cluster.topics(["t"])) == {"t": Topic("t", {0: 1, 1: 1})}

    @pytest.mark.parametrize("answer", [None, NodeNotReadyError()], ids=["silent", "failing"])
    async def test_no_answer_ends_at_the_deadline(self, client: ScriptedClient, answer: Exception | None) -> None:
        """Rule 5: every await into the client has a deadline of ours."""
        client.answers["MetadataRequest"] = [answer]

        with pytest.raises(ClusterUnavailable, match=r"topics: no answer within 0\.05 s"):
            await ask(lambda cluster: cluster.topics(["t"]), seconds=0.05)

        assert client.closed == 1

    async def test_an_unreachable_cluster_is_named(self, client: ScriptedClient) -> None:
        """With the addresses that were tried."""
        client.bootstraps = [KafkaConnectionError()]

        with pytest.raises(ClusterUnavailable, match=r"no broker answers at 127\.0\.0\.1:9092") as caught:
            await ask(lambda cluster: cluster.brokers())

        assert (client.closed, caught.value.hint) == (1, "look")

    async def test_a_cluster_without_brokers_is_none(
        self, client: ScriptedClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H33: that is what a refused token looks like, to a client that believes itself let in."""
        monkeypatch.setattr(client, "brokers", list)

        with pytest.raises(ClusterUnavailable, match="no broker answers"):
            await ask(lambda cluster: cluster.brokers())

        assert client.closed == 1

    async def test_missing_topics_are_none_and_are_not_created(self, client: ScriptedClient) -> None:
        """Looking for a topic must not create it."""
        client.answers["MetadataRequest"] = [metadata(("a", UNKNOWN_TOPIC, []), ("b", NO_ERROR, [1]))]

        assert await ask(lambda cluster: cluster.topics(["b", "a"])) == {"a": None, "b": Topic("b", {0: 1})}

        asked = [request for _, request in client.sent if isinstance(request, MetadataRequest)]
        assert all(request._allow_auto_topic_creation is False for request in asked)

    async def test_a_topic_that_may_not_be_described_is_a_refusal(self, client: ScriptedClient) -> None:
        """Not the same as one that is missing."""
        client.answers["MetadataRequest"] = [metadata(("t", TOPIC_DENIED, []))]

        with pytest.raises(ClusterRefusal, match="topic t"):
            await ask(lambda cluster: cluster.topics(["t"]))

    async def test_after_the_last_record_of_a_time_comes_the_end(self, client: ScriptedClient) -> None:
        """A time in the future answers -1; what is meant is the end."""
        client.answers["MetadataRequest"] = [metadata(("t", NO_ERROR, [1, 1]))]
        client.answers["OffsetRequest"] = [
            OffsetResponse_v3(0, [("t", [(0, NO_ERROR, 5, 40), (1, NO_ERROR, -1, -1)])]),
            OffsetResponse_v3(0, [("t", [(1, NO_ERROR, -1, 99)])]),
        ]

        found = await ask(lambda cluster: cluster.offsets([("t", 0), ("t", 1)], 1_700_000_000_000))

        assert found == {("t", 0): 40, ("t", 1): 99}

    async def test_a_partition_without_leader_is_waited_for(self, client: ScriptedClient) -> None:
        """Leaders move."""
        client.answers["MetadataRequest"] = [metadata(("t", NO_ERROR, [-1])), metadata(("t", NO_ERROR, [1]))]
        client.answers["OffsetRequest"] = [OffsetResponse_v3(0, [("t", [(0, NO_ERROR, -1, 3)])])]

        assert await ask(lambda cluster: cluster.offsets([("t", 0)], LATEST)) == {("t", 0): 3}

    async def test_a_transaction_is_described_by_its_coordinator(self, client: ScriptedClient) -> None:
        """Exactly-once: how it was decided; a coordinator that loads or has moved has not said anything."""
        client.answers["FindCoordinatorRequest"] = [FindCoordinatorResponse_v1(0, NO_ERROR, None, 4, "127.0.0.1", 9092)]
        client.answers["TransactionStateRequest"] = [
            transaction(LOADING, ""),
            transaction(NOT_COORDINATOR, ""),
            transaction(NO_ERROR, "CompleteCommit"),
        ]

        found = await ask(lambda cluster: cluster.transaction("id"))

        assert found == TransactionState("CompleteCommit")
        assert (found.committed, found.complete) == (True, True)
        assert {node for node, request in client.sent if isinstance(request, TransactionStateRequest)} == {4}
        asked = [request for _, request in client.sent if isinstance(request, FindCoordinatorRequest)]
        assert {(request._coordinator_key, request._coordinator_type) for request in asked} == {("id", 1)}

    async def test_an_id_that_nobody_has_used_has_no_transaction(self, client: ScriptedClient) -> None:
        """Nor is there anything to be completed."""
        client.answers["TransactionStateRequest"] = [transaction(ID_UNKNOWN, "")]

        found = await ask(lambda cluster: cluster.transaction("id"))

        assert (found.committed, found.complete) == (None, True)

    @pytest.mark.parametrize(
        "answer",
        [transaction(ID_DENIED, ""), transaction(UNSUPPORTED, ""), IncompatibleBrokerVersion(), NotImplementedError()],
        ids=["denied", "unsupported", "unknown request", "unknown version"],
    )
    async def test_a_broker_that_does_not_tell_of_transactions_is_worked_with(
        self, client: ScriptedClient, answer: Any
    ) -> None:
        """Those before 3.0; they do not forget either."""
        client.answers["TransactionStateRequest"] = [answer]

        assert await ask(lambda cluster: cluster.transaction("id")) is None

    async def test_the_coordinator_itself_says_who_leads_what_it_writes_markers_to(
        self, client: ScriptedClient
    ) -> None:
        """Another broker may know more, or less; what does not exist is left out, what is not led is waited for."""
        at_four = FindCoordinatorResponse_v1(0, NO_ERROR, None, 4, "127.0.0.1", 9092)
        lost = FindCoordinatorResponse_v1(0, NOT_AVAILABLE, None, -1, "", 0)
        client.answers["FindCoordinatorRequest"] = [at_four, at_four, lost, at_four]
        client.answers["TopicIdsRequest"] = [
            led(("r", NO_ERROR, [(1, 3), (-1, 4)]), ("dlq", UNKNOWN_TOPIC, [])),
            led(("r", NO_ERROR, [(1, 3), (1, 5)]), ("dlq", UNKNOWN_TOPIC, [])),
        ]

        found = await ask(lambda cluster: cluster.marker_leaders("id", "g", [("r", 1), ("dlq", 0)]))

        assert found == {("r", 1): (1, 5)}
        asked = [(node, request) for node, request in client.sent if isinstance(request, FindCoordinatorRequest)]
        assert [(node, request._coordinator_key) for node, request in asked] == [
            (1, "id"),  # r/1 is not led
            (1, "id"),
            (4, "g"),  # the offsets are not
            (1, "id"),
            (4, "g"),
        ]
        assert {node for node, request in client.sent if isinstance(request, TopicIdsRequest)} == {4}

    async def test_a_broker_that_does_not_tell_leader_epochs_is_worked_with(self, client: ScriptedClient) -> None:
        """As above."""
        client.answers["TopicIdsRequest"] = [NotImplementedError()]

        assert await ask(lambda cluster: cluster.marker_leaders("id", "g", [("r", 0)])) is None

    async def test_a_group_is_described_by_its_coordinator(self, client: ScriptedClient) -> None:
        """State and members; no group at all is Dead."""
        members = [("m", "c", "h", b"", b"")]
        client.answers["DescribeGroupsRequest"] = [
            DescribeGroupsResponse_v3(0, [(NO_ERROR, "g", "Stable", "consumer", "sticky", members, 0)])
        ]

        assert await ask(lambda cluster: cluster.group("g")) == GroupState("Stable", 1)

    async def test_creating_what_exists_is_fine_and_a_refusal_says_why(self, client: ScriptedClient) -> None:
        """Several processes start at once; too few brokers is a matter of configuration."""
        client.answers["MetadataRequest"] = [metadata(("t", NO_ERROR, [1]))]
        client.answers["CreateTopicsRequest"] = [
            CreateTopicsResponse_v3(0, [("t", EXISTS, None)]),
            CreateTopicsResponse_v3(0, [("t", BAD_REPLICATION, "only 1 broker")]),
        ]
        topic = [NewTopic("t", 1, 3, {})]

        await ask(lambda cluster: cluster.create(topic))
        with pytest.raises(ClusterRefusal, match="creating topic t: only 1 broker"):
            await ask(lambda cluster: cluster.create(topic))


def settings_of(topic: str, error: int = NO_ERROR, **values: str) -> DescribeConfigsResponse_v2:
    """An answer to DescribeConfigs; names with underscores."""
    entries: list[Any] = [(name.replace("_", "."), value, False, 5, False, []) for name, value in values.items()]
    return DescribeConfigsResponse_v2(0, [(error, None, 2, topic, entries)])


ALL = metadata(("operations", NO_ERROR, [1, 1, 1]), ("responses", NO_ERROR, [1, 1]), ("operations.dlq", NO_ERROR, [1]))


class TestStart:
    """The check at start."""

    async def test_it_waits_for_a_cluster_that_comes_late(self, client: ScriptedClient) -> None:
        """Contract 6: an unreachable broker is no exit."""
        client.bootstraps = [KafkaConnectionError(), OSError(), None]
        client.answers["MetadataRequest"] = [ALL]
        client.answers["DescribeConfigsRequest"] = [settings_of("responses", cleanup_policy="delete")]

        plan = await inspect_topics(configured())

        assert (plan.input_partitions, plan.output_partitions) == ({"operations": 3}, 2)
        assert (plan.dead_letter_partitions, plan.output_compacted) == (1, False)

    async def test_missing_topics_are_all_named(self, client: ScriptedClient) -> None:
        """Contract 6: exit 2, naming them."""
        client.answers["MetadataRequest"] = [
            metadata(
                ("operations", UNKNOWN_TOPIC, []), ("responses", NO_ERROR, [1]), ("operations.dlq", UNKNOWN_TOPIC, [])
            )
        ]

        with pytest.raises(ConfigError, match=r"missing topics: operations, operations\.dlq; create them"):
            await inspect_topics(configured())

    @pytest.mark.parametrize("policy", ["compact", "compact,delete"])
    async def test_a_compacted_output_topic_needs_leave(self, client: ScriptedClient, policy: str) -> None:
        """Contract 2.3: refused with exit 2 unless `output.allow_compacted`."""
        client.answers["MetadataRequest"] = [ALL]
        client.answers["DescribeConfigsRequest"] = [settings_of("responses", cleanup_policy=policy)]

        with pytest.raises(ConfigError, match=r"output\.topic responses is compacted"):
            await inspect_topics(configured())

        assert (await inspect_topics(configured(output={"allow_compacted": True}))).output_compacted

    async def test_a_policy_that_may_not_be_read_is_no_reason_not_to_start(self, client: ScriptedClient) -> None:
        """Reading topic settings is a permission the service needs for nothing else."""
        client.answers["MetadataRequest"] = [ALL]
        client.answers["DescribeConfigsRequest"] = [settings_of("responses", CONFIG_DENIED)]

        assert not (await inspect_topics(configured())).output_compacted

    async def test_what_the_cluster_refuses_is_a_matter_of_configuration(self, client: ScriptedClient) -> None:
        """Contract 11: exit 2."""
        client.answers["MetadataRequest"] = [metadata(("operations", TOPIC_DENIED, []))]

        with pytest.raises(ConfigError, match="topic operations"):
            await inspect_topics(configured())

    async def test_what_brokers_say_of_their_own_defects_is_asked_again(self, client: ScriptedClient) -> None:
        """UNKNOWN_SERVER_ERROR is often over in a moment; an exit 2 would need somebody to look."""
        client.answers["MetadataRequest"] = [metadata(("operations", UNEXPECTED, [])), ALL]
        client.answers["DescribeConfigsRequest"] = [settings_of("responses")]

        assert (await inspect_topics(configured())).output_partitions == 2

    async def test_cancelled_while_it_waits_it_leaves_nothing_open(self, client: ScriptedClient) -> None:
        """A signal while the cluster is away."""
        client.answers["MetadataRequest"] = [None]
        waiting = asyncio.create_task(inspect_topics(configured()))
        await client.asked.wait()

        waiting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert client.closed == 1

    def test_topics_are_made_with_room_for_the_largest_record(self) -> None:
        """Contract 6: created with suitable max.message.bytes."""
        config = configured(limits={"record_bytes": "32MiB"}, topics={"partitions": 5, "replication_factor": 2})
        made = needed_topics(config)
        limits = {name: int(topic.settings["max.message.bytes"]) for name, topic in made.items()}

        assert limits["operations"] > 32 * 2**20
        assert limits["operations.dlq"] > 32 * 2**20
        assert limits["responses"] > 3 * 2**20
        assert {(topic.partitions, topic.replication_factor) for topic in made.values()} == {(5, 2)}

    def test_without_a_dead_letter_topic_none_is_asked_for(self) -> None:
        """Contract 6: `dead_letter.topic: null`."""
        assert set(needed_topics(configured(dead_letter={"topic": None}))) == {"operations", "responses"}

    def test_compaction_is_found_in_a_list_of_policies(self) -> None:
        """`cleanup.policy` is a list."""
        assert is_compacted({"cleanup.policy": "delete,compact"})
        assert not is_compacted({"cleanup.policy": "delete"})
        assert not is_compacted({})
