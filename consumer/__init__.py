"""tierstream: Avro operations in, tiered storage, exactly one indexed response per record out.

The flow, and who owns what
===========================

::

    bytes              kafka.poller        records of the assigned partitions, with start offsets chosen explicitly
      ▼ decode         codec (prescan)     record ─▶ operation, or poison ─▶ error item
    operation
      ▼ admit          executor, permits   a slot of the window reserved when the partition was assigned
    in flight
      ▼ apply          handler, storage    two tiers, compare-and-swap, change log
    outcome
      ▼ answer         responses, codec, kafka.publisher    indexed response, acknowledged by the broker
      ▼ resolve        offsets             the watermark moves over what is finished
    commit             commits, kafka.poller                the schedule decides when, the poller sends it

* :mod:`consumer.app` owns everything and the order of stopping.
* :mod:`consumer.processes` runs several of it as one service (``runtime.processes``): a supervisor owns the processes
  and the admin port that shows them all. With one process it is not there.
* :mod:`consumer.kafka.poller` owns the Kafka consumer and the set of assignments.
* :mod:`consumer.kafka.publisher` owns the Kafka producer; one lane for each output partition keeps the order.
* An :class:`~consumer.assignment.Assignment` owns its reservation, its running operations and its offset tracker, from
  *assigned* to *drained*.
* :mod:`consumer.tracing` puts spans around all that, and :mod:`consumer.error_reports` hears what the log says of
  defects; ``app`` loads either only where :mod:`consumer.telemetry` finds it wanted.
* :mod:`consumer.watchdog` judges what stands still for no reason; ``app`` shows it the process, and ends it with 3.
* :mod:`consumer.storage.change_log` owns the clean-up that outlives an operation; ``app`` joins it last.

Modules import downwards only: pyproject.toml declares the layers, ``make lint`` holds them. Vendors stay at their edge:
aiokafka in ``kafka/``, fastavro in ``codec`` and ``avro_schemas``, prometheus_client in ``metrics`` and ``admin``,
Google's clients in ``storage/``, OpenTelemetry in ``tracing``, Sentry in ``error_reports``.

Guarantees
==========

1. Exactly one response is published for each input record by each run over it, undecodable records included; its index
   is the record's offset, the same after any replay.
2. An offset is committed only after its response, and its dead letter where there is one, has been acknowledged by the
   broker, and never past an unfinished record.
3. At most *window* operations of a partition run at a time; the window is ``ceil(available permits x fraction)``,
   reserved in one step before the first record is read, and returned whole after the last operation has finished.
4. In ``key`` ordering operations on one object of one partition run in input order.
5. A crash at any point loses nothing: storage effects are idempotent, and what was begun in both tiers stands in the
   change log before it begins.

Words
=====

record
    One Kafka record as received.
operation, response
    A decoded request (insert, get, delete, head), and the answer to it, success or failure.
index
    0-based position of an operation in its input sequence: the record's offset.
outcome
    What running an operation gave: a response or an error, as a value.
poison record
    A record that never became an operation; answered with a failure and resolved.
note, condemned
    Which record of a partition is being decoded, in a file that outlives the process; a record that has ended two
    processes that way, and is poison without being decoded again.
permit, limiter, reservation, window
    The right to run one operation; what issues permits; permits taken at once; how many operations may be in flight.
resolve, watermark, commit
    Mark an offset finished; the lowest unfinished offset; sending watermarks to Kafka, nothing else.
high watermark, lag
    The broker's end of the log; high watermark minus watermark.
tombstone, target, revision, orphan
    A high-volume row that redirects to the long-term tier; what it points to; one immutable long-term write; a revision
    nothing points to.
change log, phase, recovery
    The durable list of unfinished changes to both tiers; the last step a change is known to have passed; the pass at
    start that removes what unfinished changes left behind.
drain, join
    Take nothing new and finish what is in flight; wait for owned background work.

Non-obvious
===========

* ``getmany`` is never cancelled or wrapped in a time-out in normal running: the client would count as polling for ever
  and never leave the group, however stuck (hazard H4).
* After any exception from ``getmany`` every open partition is sought to its own cursor: the client has moved positions
  over records it then dropped (H1).
* The client's position is not to be believed while its next poll has something to tell: it moves past a record that it
  could not fetch before it says so (H2).
* One header whose name is no UTF-8 would have the client deliver nothing of its partition any more; brokers take such
  records (:mod:`consumer.kafka.header_names`).
* Nobody bounds what a compressed batch expands to, and the client expands it at one go: 16 KB are half a gigabyte (H9,
  :mod:`consumer.kafka.expansion`).
* An answer's length is believed, whatever answers: "HTTP" is 1.2 GB (H36, :mod:`consumer.kafka.frames`).
* ``codec`` and ``prescan`` are compiled as well (``hatch_build.py``): their classes can have no subclasses elsewhere,
  no method is replaced, annotations are checked as the code runs, and a coroutine there would not tell where it waits.
* Offsets have gaps. Only delivered offsets are tracked; waiting for ``offset + 1`` stalls at a transaction marker
  (H9b).
* One batch is in flight for each output partition. Concurrent sends to one partition overtake each other when a batch
  fills up, and ``key`` ordering promises responses in order.
* A producer that has failed a batch is thrown away: its sequence numbers have a hole that is never repaired (H18).
* The listener for assigned partitions returns at once: no heartbeat is sent while it runs (H12).
* A revocation first tries to commit. Being refused is how a *lost* partition shows itself; nothing else tells (H16c).
* Fetched records are charged to the byte budget only up to half of it: reads must find room though every buffer is
  full, or the records that wait could keep the reads waiting that would drain them.
* Processes are asked to stop over their line to the supervisor, not by a signal: a service manager signals all
  processes of a unit, and whoever gets a second signal ends at once.
* The counters of several processes keep what processes have counted that are gone, or do not answer: a sum that falls
  would be read as a restart at zero, and the whole rest of it as an increase.
* A swap that loses to an *older* position is neither won nor lost: taken for lost, the older value would stay although
  the later record is answered. It is tried again from what is there.
* Offsets are compared over time only under a topic's id: a topic made anew under the same name counts from 0 again.
* A revision that a row has pointed to may be what a response refers to. So only what no row can have pointed to is
  removed at once; the rest stays in the change log, as nobody's work, until its retention is over.
* A compare-and-swap that "already is as wanted" answers true, so that a retry after a lost answer does not make its own
  success look like a conflict, and then remove its own revision.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consumer.errors import (
        AtCapacity,
        BackendError,
        BackendUnavailable,
        ConfigError,
        DecodeError,
        InvalidMetadata,
        InvalidOperation,
        OperationDropped,
        OperationPanic,
        OperationTimeout,
        ReferenceFailure,
        TierstreamError,
        TooLarge,
        UnexpectedTombstone,
    )
    from consumer.executor import StreamExecutor
    from consumer.ids import ObjectContext, ObjectId, Scope
    from consumer.operations import (
        Delete,
        Deleted,
        Get,
        Got,
        Head,
        Headed,
        Insert,
        Inserted,
        Metadata,
        Operation,
        OpResponse,
        PayloadReference,
        StoredObject,
        TimeToIdle,
        TimeToLive,
    )
    from consumer.permits import ConcurrencyLimiter, Reservation, window_size
    from consumer.service import StorageService
    from consumer.storage.bigtable import BigtableBackend
    from consumer.storage.bigtable_change_log import BigtableChangeLog
    from consumer.storage.filesystem import FilesystemBackend
    from consumer.storage.gcs import GcsBackend
    from consumer.storage.memory import MemoryBackend, MemoryChangeLog
    from consumer.storage.sqlite import SqliteBackend
    from consumer.storage.sqlite_change_log import SqliteChangeLog
    from consumer.storage.tiered import TieredStorage

_HOMES = {
    "AtCapacity": "errors",
    "BackendError": "errors",
    "BackendUnavailable": "errors",
    "BigtableBackend": "storage.bigtable",
    "BigtableChangeLog": "storage.bigtable_change_log",
    "ConcurrencyLimiter": "permits",
    "ConfigError": "errors",
    "DecodeError": "errors",
    "Delete": "operations",
    "Deleted": "operations",
    "FilesystemBackend": "storage.filesystem",
    "GcsBackend": "storage.gcs",
    "Get": "operations",
    "Got": "operations",
    "Head": "operations",
    "Headed": "operations",
    "Insert": "operations",
    "Inserted": "operations",
    "InvalidMetadata": "errors",
    "InvalidOperation": "errors",
    "MemoryBackend": "storage.memory",
    "MemoryChangeLog": "storage.memory",
    "Metadata": "operations",
    "ObjectContext": "ids",
    "ObjectId": "ids",
    "OpResponse": "operations",
    "Operation": "operations",
    "OperationDropped": "errors",
    "OperationPanic": "errors",
    "OperationTimeout": "errors",
    "PayloadReference": "operations",
    "ReferenceFailure": "errors",
    "Reservation": "permits",
    "Scope": "ids",
    "SqliteBackend": "storage.sqlite",
    "SqliteChangeLog": "storage.sqlite_change_log",
    "StorageService": "service",
    "StoredObject": "operations",
    "StreamExecutor": "executor",
    "TierstreamError": "errors",
    "TieredStorage": "storage.tiered",
    "TimeToIdle": "operations",
    "TimeToLive": "operations",
    "TooLarge": "errors",
    "UnexpectedTombstone": "errors",
    "window_size": "permits",
}
"""Where each public name lives. Imported on first use: ``import consumer`` itself costs nothing."""

__all__ = [
    "AtCapacity",
    "BackendError",
    "BackendUnavailable",
    "BigtableBackend",
    "BigtableChangeLog",
    "ConcurrencyLimiter",
    "ConfigError",
    "DecodeError",
    "Delete",
    "Deleted",
    "FilesystemBackend",
    "GcsBackend",
    "Get",
    "Got",
    "Head",
    "Headed",
    "Insert",
    "Inserted",
    "InvalidMetadata",
    "InvalidOperation",
    "MemoryBackend",
    "MemoryChangeLog",
    "Metadata",
    "ObjectContext",
    "ObjectId",
    "OpResponse",
    "Operation",
    "OperationDropped",
    "OperationPanic",
    "OperationTimeout",
    "PayloadReference",
    "ReferenceFailure",
    "Reservation",
    "Scope",
    "SqliteBackend",
    "SqliteChangeLog",
    "StorageService",
    "StoredObject",
    "StreamExecutor",
    "TieredStorage",
    "TierstreamError",
    "TimeToIdle",
    "TimeToLive",
    "TooLarge",
    "UnexpectedTombstone",
    "window_size",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 - reading the installed version costs milliseconds

        return version("tierstream")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
