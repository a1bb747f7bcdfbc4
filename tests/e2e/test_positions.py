"""The position fence from outside: a replay undoes nothing that came later; a topic made anew is not taken for old."""

from __future__ import annotations

import uuid

import pytest
import yaml
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.cimpl import NewTopic

from brokers import Broker, wait_until
from service_process import command_line
from stages import SetStage, Stage

pytestmark = pytest.mark.slow


def stored(stage: Stage, key: str) -> str | None:
    """Read an object without the service; None where there is none."""
    path = stage.folder / "look.yaml"
    path.write_text(yaml.safe_dump(stage.config), encoding="utf-8")
    shown = command_line(
        "storage", "get", "e2e", key, "--scope", "org=1", "--config", str(path), cwd=stage.folder
    )
    return shown.stdout if shown.returncode == 0 else None


def committed(stage: Stage, offset: int) -> None:
    """Wait until the service has committed *offset*, then stop it."""
    service = stage.processes[-1]
    service.wait(
        lambda: service.partitions()[stage.ledger.input, 0]["committed"] == offset, f"{offset} to be committed"
    )
    service.stop()


def test_a_replay_that_ends_early_leaves_the_later_write(apache: Broker, set_stage: SetStage) -> None:
    """Contract 5: a group set back runs an insert again, and not what replaced it, or deleted it, after that.

    Between them lies a poison record, at which the second run stops: one is too many for it.
    """
    stage = set_stage(apache, partitions=1)
    ledger, replaced, deleted = stage.ledger, f"replaced/{uuid.uuid4()}", f"deleted/{uuid.uuid4()}"
    stage.start(partitions=1)
    again = [
        *ledger.operate("insert", replaced, b"first", statuses={201}),
        *ledger.operate("insert", deleted, b"first", statuses={201}),
        *ledger.send(b"\x02", kind="unknown", statuses={400}),
    ]
    ledger.operate("insert", replaced, b"second", statuses={201})
    ledger.operate("delete", deleted, statuses={204})
    committed(stage, 5)
    assert (stored(stage, replaced), stored(stage, deleted)) == ("second", None)
    group = Consumer({"bootstrap.servers": apache.bootstrap, "group.id": stage.group, "enable.auto.commit": False})
    group.commit(offsets=[TopicPartition(ledger.input, 0, 0)], asynchronous=False)
    group.close()

    stage.config["dead_letter"]["max_consecutive"] = 1
    service = stage.start(ready=False)

    def answered_again() -> bool:
        ledger.poll()
        return all(len(ledger.answers[entry.id]) == 2 for entry in again)

    wait_until(answered_again, 60, "the first records to be answered again")
    service.wait(lambda: service.partitions()[ledger.input, 0]["committed"] == 3, "what was answered to be committed")
    ledger.read_all()
    assert (stored(stage, replaced), stored(stage, deleted)) == ("second", None), "a replay has undone what came later"
    assert len(ledger.answers) == 5
    assert not ledger.verdict().mismatched, "a replay is answered like the first time"
    assert ledger.verdict().surplus == 3


def test_a_topic_made_anew_begins_anew(apache: Broker, set_stage: SetStage) -> None:
    """Its offsets are lower than what the objects remember of the old one, and say nothing of it: all is applied."""
    stage = set_stage(apache, partitions=1)
    ledger, key = stage.ledger, f"object/{uuid.uuid4()}"
    stage.start(partitions=1)
    for number in range(5):
        ledger.operate("insert", key, b"old %d" % number, statuses={201})
    committed(stage, 5)
    assert stored(stage, key) == "old 4"
    apache.delete_topic(ledger.input)
    wait_until(lambda: ledger.input not in apache.admin.list_topics(timeout=20).topics, 30, "the topic to be gone")
    apache.admin.create_topics([NewTopic(ledger.input, num_partitions=1)])[ledger.input].result(30)

    stage.start(partitions=1)
    ledger.operate("insert", key, b"new", statuses={201})
    committed(stage, 1)

    assert stored(stage, key) == "new"
