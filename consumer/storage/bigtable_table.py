"""One Bigtable table over Google's asynchronous client: the edge where its filters, mutations and errors end.

The client is imported when the first table is made (it takes a second or two), and connects at the first request.

**Reads** are the client's. **Writes** are sent by themselves (:class:`_Writes`), as the same requests over the same
transport: what the client wraps around each costs four times what sending it does, and Bigtable has no request that
writes to several rows on conditions. So the writes of a window are that many requests on their way at once, each with
its own answer, and what each costs decides how many there are in a second.

**A request**

1. Sent with a deadline of :data:`ATTEMPT_SECONDS`.
   * OK: answered.
   * A passing fault (:data:`PASSING`, checklist BT-13), or a transport that fails: sent again at once,
     :data:`ATTEMPTS` times in all. The client itself repeats nothing, a conditional write never (it calls that "not
     idempotent"): so every request a caller sends has to be one that may be applied twice.
   * Anything else: an error.
2. The last error is translated here, once: ``BackendUnavailable`` where trying later helps, else ``BackendError``. Its
   text is the status code; what the server said may hold keys.

An attempt that ran into its deadline may still be applied, as its deadline goes with it to the server: within the time
it takes to get there.

**Cancelled**, a write that has been sent is waited for, :data:`SETTLE_SECONDS` at most. So what its caller does next
finds what became of it, and is not overtaken by it.

**Rows asked for at the same time** travel in one request (:class:`RowReader`).

**Close** waits :data:`CLOSE_SECONDS` for each of its steps.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, TypeVar

from consumer.errors import BackendError, BackendUnavailable, ConfigError, TierstreamError
from consumer.log import get_logger
from consumer.storage.backend import repeated

log = get_logger(__name__)

T = TypeVar("T")

ATTEMPT_SECONDS = 6.0
"""Deadline of one attempt: a thousand times what a row takes, and three of them end before an attempt of the service
does (``retry.attempt_timeout``, 20 s)."""

ATTEMPTS = 3
"""The first and two more, without delay (BT-13): what comes after that has a delay, and is the caller's."""

SCAN_SECONDS = 60.0
"""Deadline of one step of a scan, which may pass many rows that yield nothing."""

GROUP_ROWS_MAX = 50
"""Rows of one request: a window's worth. More would make the first of them wait for the last."""

GROUP_SECONDS = 2.0
"""Deadline of a request for several rows. It is not repeated, and with three attempts at each row alone what follows
still ends with the service's own attempt, at 20 s."""

GROUPS_AT_ONCE = 4
"""Such requests on their way at a time: while they are, what is asked for gathers."""

WRITE_CONNECTIONS = 5
"""Connections for writes, used when they are needed: the default permits of a process, 500, on their way at once."""

WRITES_AT_ONCE = 100
"""Writes on one connection before the next one is used: as many as Google's servers take of one connection at a time.
Not spread further than that: what is sent together travels together, for a third less time of both sides."""

SETTLE_SECONDS = 5.0
"""How long a cancelled caller waits for the answer to its write, as with files: most come within milliseconds."""

CONNECT_SECONDS = 15.0
"""How long credentials may take: a metadata server that is not there is asked for about ten."""

CREATE_SECONDS = 60.0
"""Deadline of making a table or a family."""

CLOSE_SECONDS = 2.0
"""How long each step of closing may take: nothing is in flight any more."""

COLLECTED_AFTER = timedelta(seconds=1)
"""Age at which cells of a collected family are removed: the smallest there is (BT-2). The timestamp is the deadline."""

EMULATOR_VARIABLE = "BIGTABLE_EMULATOR_HOST"
"""What makes the client speak to an emulator, without credentials and encryption."""

EXTRA_HINT = "pip install tierstream[bigtable]"

PASSING = frozenset(
    {
        "UNAVAILABLE",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "UNAUTHENTICATED",
        "ABORTED",
        "INTERNAL",
        "FAILED_PRECONDITION",
        "UNKNOWN",
    }
)
"""Status codes after which the same request may succeed at once (BT-13)."""

LATER = PASSING | {"RESOURCE_EXHAUSTED"}
"""Status codes after which it may succeed later: a quota is not helped by asking at once."""


class Cell(NamedTuple):
    """What stands in a column."""

    value: bytes
    micros: int
    """Its timestamp in microseconds, a multiple of 1,000."""


Cells: TypeAlias = Mapping[tuple[str, bytes], Cell]
"""The newest cell of each column of a row, by family and qualifier; empty where there is no row."""


class Check(NamedTuple):
    """The answer to a conditional write."""

    matched: bool
    """Whether the predicate let something pass, as the last attempt found the row."""
    repeated: bool
    """Whether an earlier attempt of the same request may have been applied."""


Filter: TypeAlias = Any
"""A ``RowFilter`` as it is sent."""

Change: TypeAlias = Any
"""A ``Mutation`` as it is sent."""


@cache
def vendor() -> Any:
    """Return the client's package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from google.cloud.bigtable import data  # noqa: PLC0415 - slow, and an extra
    except ImportError:
        raise ConfigError(f"storage type bigtable needs Google's client: {EXTRA_HINT}") from None
    return data


@cache
def wire_kinds() -> Any:
    """Return the kinds of messages that requests are made of: protocol buffers, without the client's own layer.

    The client has to be installed.
    """
    from google.cloud.bigtable_v2 import types  # noqa: PLC0415 - loaded with the client

    filters = types.RowFilter.pb()
    return SimpleNamespace(
        Filter=filters,
        All=filters.Chain,
        Any=filters.Interleave,
        ColumnRange=types.ColumnRange.pb(),
        ValueRange=types.ValueRange.pb(),
        TimestampRange=types.TimestampRange.pb(),
        Mutation=types.Mutation.pb(),
        CheckAndMutate=types.CheckAndMutateRowRequest.pb(),
        Checked=types.CheckAndMutateRowResponse.pb(),
        Mutate=types.MutateRowRequest.pb(),
        Mutated=types.MutateRowResponse.pb(),
    )


@cache
def transport() -> Any:
    """Return what sends them, and what its errors and headers are made with; the client has to be installed."""
    from google.api_core.exceptions import from_grpc_error  # noqa: PLC0415 - loaded with the client
    from google.api_core.gapic_v1.routing_header import to_grpc_metadata  # noqa: PLC0415 - as above
    from google.cloud.bigtable_v2.services.bigtable.transports import (  # noqa: PLC0415 - as above
        BigtableGrpcAsyncIOTransport,
    )
    from grpc import RpcError, aio  # noqa: PLC0415 - as above

    return SimpleNamespace(
        insecure_channel=aio.insecure_channel,
        secure_channel=BigtableGrpcAsyncIOTransport.create_channel,
        Error=RpcError,
        translated=from_grpc_error,
        routing=to_grpc_metadata,
    )


# ------------------------------------------------------------------------------------------------- filters, mutations


def columns(pattern: bytes) -> Filter:
    """Let the newest cell of each column pass whose whole qualifier matches *pattern*, in any family."""
    make = wire_kinds().Filter
    return _all_of(make(column_qualifier_regex_filter=pattern), make(cells_per_column_limit_filter=1))


def cell(
    family: str,
    qualifier: bytes,
    *,
    since: int | None = None,
    value: bytes | None = None,
    above: bytes | None = None,
) -> Filter:
    """Let the cells of one column pass, those not older than *since* (microseconds) and holding *value*, or above."""
    kinds = wire_kinds()
    make = kinds.Filter
    column = kinds.ColumnRange(
        family_name=family, start_qualifier_closed=qualifier, end_qualifier_closed=qualifier
    )
    parts = [make(column_range_filter=column), make(cells_per_column_limit_filter=1)]
    if since is not None:
        parts.append(make(timestamp_range_filter=kinds.TimestampRange(start_timestamp_micros=since)))
    if value is not None:
        parts.append(make(value_range_filter=kinds.ValueRange(start_value_closed=value, end_value_closed=value)))
    if above is not None:
        parts.append(make(value_range_filter=kinds.ValueRange(start_value_open=above)))
    return _all_of(*parts)


def any_of(*parts: Filter) -> Filter:
    """Let pass what one of *parts* does."""
    kinds = wire_kinds()
    return kinds.Filter(interleave=kinds.Any(filters=parts))


def first_is(qualifier: bytes, *parts: Filter) -> Filter:
    """Of all that *parts* of one family let pass, let the first pass, and only if its column is *qualifier*.

    The columns of a family are sorted by qualifier; the order of families is not defined. So this is "and not": the
    column *qualifier* passes, unless one of the other parts lets an earlier column of the same family pass.
    """
    make = wire_kinds().Filter
    return _all_of(
        any_of(*parts), make(cells_per_row_limit_filter=1), make(column_qualifier_regex_filter=qualifier)
    )


def without_value(part: Filter) -> Filter:
    """Let pass what *part* does, with empty values."""
    return _all_of(part, wire_kinds().Filter(strip_value_transformer=True))


def _all_of(*parts: Filter) -> Filter:
    """Let pass what each of *parts* does, one after the other; two at least."""
    kinds = wire_kinds()
    return kinds.Filter(chain=kinds.All(filters=parts))


def set_cell(family: str, qualifier: bytes, value: bytes, micros: int) -> Change:
    """Write a cell; *micros* is a multiple of 1,000."""
    make = wire_kinds().Mutation
    return make(
        set_cell=make.SetCell(family_name=family, column_qualifier=qualifier, timestamp_micros=micros, value=value)
    )


def delete_family(family: str) -> Change:
    """Remove all cells of a family from the row."""
    make = wire_kinds().Mutation
    return make(delete_from_family=make.DeleteFromFamily(family_name=family))


def delete_column(family: str, qualifier: bytes) -> Change:
    """Remove all cells of a column from the row."""
    make = wire_kinds().Mutation
    return make(delete_from_column=make.DeleteFromColumn(family_name=family, column_qualifier=qualifier))


def delete_row() -> Change:
    """Remove all cells of the row."""
    make = wire_kinds().Mutation
    return make(delete_from_row=make.DeleteFromRow())


class _ReadFilter:
    """A filter as the client's reads take it."""

    __slots__ = ("_filter",)

    def __init__(self, row_filter: Filter) -> None:
        self._filter = row_filter

    def _to_pb(self) -> Any:
        from google.cloud.bigtable_v2.types import RowFilter  # noqa: PLC0415 - loaded by now

        return RowFilter.wrap(self._filter)


# ------------------------------------------------------------------------------------------------- errors


def status(error: BaseException) -> str:
    """Return the status code of an answer, or the name of what went wrong before there was one."""
    code = getattr(error, "grpc_status_code", None)
    return type(error).__name__ if code is None else str(code.name)


def is_passing(error: BaseException) -> bool:
    """Tell whether the same request may succeed at once: BT-13, and faults of transport, time and authentication."""
    if getattr(error, "grpc_status_code", None) is not None:
        return status(error) in PASSING and not _names_a_family(error)
    return isinstance(error, OSError) or type(error).__module__.startswith(("google.auth.", "grpc"))


def translate(error: Exception) -> TierstreamError:
    """Return *error* of the client as one of ours; the text names the status, never a key or a value."""
    if isinstance(error, TierstreamError):
        return error
    if status(error) == "NOT_FOUND" or _names_a_family(error):
        return BackendError("bigtable: the table or one of its families is missing: run `tierstream storage init`")
    later = is_passing(error) or status(error) in LATER
    return (BackendUnavailable if later else BackendError)(f"bigtable: {status(error)}")


def _names_a_family(error: BaseException) -> bool:
    """Tell whether a family is missing; the emulator's status for that is UNKNOWN."""
    return getattr(error, "grpc_status_code", None) is not None and "family" in str(error)


# ------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class TableName:
    """Which table, and how to get there."""

    project: str
    instance: str
    table: str
    emulator_host: str | None = None
    """HOST:PORT; without credentials. None: ``BIGTABLE_EMULATOR_HOST`` if that is set, else Google."""
    app_profile: str | None = None
    """It has to route to a single cluster: conditional writes are refused otherwise."""

    @classmethod
    def from_settings(cls, settings: Any) -> TableName:
        """Read the section of a tier or of the change log."""
        return cls(settings.project, settings.instance, settings.table, settings.emulator_host, settings.app_profile)


class BigtableTable:
    """A connection to one table; used by the event loop that sends the first request.

    Args:
        name: Which.
        families: The families it needs: True where cells are collected when their timestamp has passed.

    Raises:
        ConfigError: the client is not installed, or there are no credentials.
    """

    def __init__(self, name: TableName, families: Mapping[str, bool]) -> None:
        for load in (vendor, wire_kinds, transport):  # now, as importing blocks
            load()
        self._name = name
        self._families = families
        self._path = f"projects/{name.project}/instances/{name.instance}/tables/{name.table}"
        self._connection: _Connection | None = None
        self._connecting: asyncio.Lock | None = None

    async def check_and_mutate(
        self,
        row_key: bytes,
        predicate: Filter | None,
        *,
        matched: Sequence[Change] = (),
        unmatched: Sequence[Change] = (),
    ) -> Check:
        """Write *matched* if *predicate* lets a cell of the row pass, else *unmatched*, atomically."""
        attempts = 0
        request = wire_kinds().CheckAndMutate(
            table_name=self._path,
            app_profile_id=self._name.app_profile,
            row_key=row_key,
            predicate_filter=predicate,
            true_mutations=matched,
            false_mutations=unmatched,
        )

        def attempt(connection: _Connection) -> Awaitable[bool]:
            nonlocal attempts
            attempts += 1
            return connection.check_and_mutate_row(request)

        return Check(await self._request(attempt), attempts > 1)

    async def mutate(self, row_key: bytes, changes: Sequence[Change]) -> None:
        """Write to a row, atomically and whatever it holds."""
        request = wire_kinds().Mutate(
            table_name=self._path, app_profile_id=self._name.app_profile, row_key=row_key, mutations=changes
        )
        await self._request(lambda connection: connection.mutate_row(request))

    async def read(self, row_key: bytes, row_filter: Filter) -> Cells:
        """Read what *row_filter* lets pass of a row."""
        wanted = _ReadFilter(row_filter)
        row = await self._request(lambda connection: connection.read_row(row_key, row_filter=wanted))
        return {} if row is None else _cells(row)

    async def read_rows(self, row_keys: Sequence[bytes], row_filter: Filter) -> Mapping[bytes, Cells]:
        """Read what *row_filter* lets pass of several rows, in one attempt; rows of which nothing does are left out."""
        query = vendor().ReadRowsQuery(row_keys=list(row_keys), row_filter=_ReadFilter(row_filter))
        seconds = {"operation_timeout": GROUP_SECONDS, "attempt_timeout": GROUP_SECONDS}
        rows = await self._request(lambda connection: connection.read_rows(query, **seconds), attempts=1)
        return {row.row_key: _cells(row) for row in rows}

    async def read_page(
        self, after: bytes, end: bytes, row_filter: Filter, limit: int
    ) -> Sequence[tuple[bytes, Cells]]:
        """Read up to *limit* rows of which *row_filter* lets something pass, with keys from *after* to *end*."""
        data = vendor()
        scope = data.RowRange(start_key=after, end_key=end, start_is_inclusive=False, end_is_inclusive=False)
        query = data.ReadRowsQuery(row_ranges=scope, row_filter=_ReadFilter(row_filter), limit=limit)
        seconds = {"operation_timeout": SCAN_SECONDS, "attempt_timeout": SCAN_SECONDS}
        rows = await self._request(lambda connection: connection.read_rows(query, **seconds))
        return [(row.row_key, _cells(row)) for row in rows]

    async def check(self) -> None:
        """Make sure that table, families and permission to write are there, by deleting nothing.

        Raises:
            ConfigError: the table or one of its families is missing.
            BackendError: the permission is missing.
        """
        nothing = [delete_column(family, b"-") for family in self._families]
        try:
            await self.mutate(b"~check", nothing)
        except BackendError as error:
            if isinstance(error.__cause__, Exception) and "storage init" in str(error):
                raise ConfigError(f"{error} (table {self._name.table})") from error
            raise

    async def create(self) -> None:
        """Make the table and the families that are missing; what is there is checked and left alone.

        Raises:
            ConfigError: a family is there that would lose what is to be kept.
        """
        from google.api_core.exceptions import AlreadyExists, NotFound  # noqa: PLC0415 - slow, and an extra

        wanted = {
            family: {"gc_rule": {"max_age": COLLECTED_AFTER}} if collected else {}
            for family, collected in self._families.items()
        }
        parent, path = f"projects/{self._name.project}/instances/{self._name.instance}", self._path
        losing: list[str] = []
        channel, admin = await self._admin()
        try:
            try:
                found = await admin.get_table(name=path, timeout=CREATE_SECONDS)
            except NotFound:
                try:
                    table = {"column_families": wanted}
                    found = await admin.create_table(
                        parent=parent, table_id=self._name.table, table=table, timeout=CREATE_SECONDS
                    )
                except AlreadyExists:  # by another process, a moment ago
                    found = await admin.get_table(name=path, timeout=CREATE_SECONDS)
            for family, collected in self._families.items():
                there = found.column_families.get(family)
                if there is None:
                    added = [{"id": family, "create": wanted[family]}]
                    try:
                        await admin.modify_column_families(name=path, modifications=added, timeout=CREATE_SECONDS)
                    except AlreadyExists:
                        continue
                elif not collected and "gc_rule" in there:
                    losing.append(family)
        except Exception as error:
            raise translate(error) from error
        finally:
            await channel.close()
        if losing:
            raise ConfigError(
                f"table {self._name.table}: families {losing} have a collection rule and would lose what is to be kept"
            )

    async def close(self) -> None:
        """Let go of the connection, bounded; a second call does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # ------------------------------------------------------------------------------------------------- inside

    async def _request(self, attempt: Callable[[_Connection], Awaitable[T]], attempts: int = ATTEMPTS) -> T:
        connection = self._connection or await self._connect()
        failed = 0
        while True:
            try:
                return await attempt(connection)
            except Exception as error:
                failed += 1
                if failed < attempts and is_passing(error):
                    repeated()
                    continue
                raise translate(error) from error

    async def _connect(self) -> _Connection:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._connection is None:
                self._connection = _Connection.to(
                    self._name, self._path, await self._credentials(), self._emulator_host
                )
            return self._connection

    @property
    def _emulator_host(self) -> str | None:
        return self._name.emulator_host or os.environ.get(EMULATOR_VARIABLE)

    async def _credentials(self) -> Any:
        from google.auth import credentials, default  # noqa: PLC0415 - slow, and an extra
        from google.auth.exceptions import DefaultCredentialsError  # noqa: PLC0415 - as above

        if self._emulator_host is not None:
            return credentials.AnonymousCredentials()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):  # it reads files, and may ask a metadata server: in a thread
                found, _ = await asyncio.to_thread(default)
        except TimeoutError:
            raise BackendUnavailable("bigtable: no credentials in time") from None
        except DefaultCredentialsError:
            raise ConfigError(
                "bigtable: there are no Google credentials: set GOOGLE_APPLICATION_CREDENTIALS, or emulator_host"
            ) from None
        return found

    async def _admin(self) -> tuple[Any, Any]:
        """Return a client that makes tables, and the channel it uses."""
        from google.cloud.bigtable_admin_v2.services.bigtable_table_admin import (  # noqa: PLC0415 - as above
            BaseBigtableTableAdminAsyncClient,
        )
        from google.cloud.bigtable_admin_v2.services.bigtable_table_admin.transports import (  # noqa: PLC0415
            BigtableTableAdminGrpcAsyncIOTransport,
        )
        from grpc import aio  # noqa: PLC0415 - as above

        credentials = await self._credentials()
        if self._emulator_host is not None:
            channel = aio.insecure_channel(self._emulator_host)
        else:
            channel = BigtableTableAdminGrpcAsyncIOTransport.create_channel(credentials=credentials)
        transport = BigtableTableAdminGrpcAsyncIOTransport(channel=channel, credentials=credentials)
        return channel, BaseBigtableTableAdminAsyncClient(transport=transport)


class _Connection:
    """What requests to one table are sent over: the client for reads, and writes by themselves.

    Raises (requests): what Google's client raises, ``google.api_core.exceptions`` above all.
    """

    def __init__(self, client: Any, table: Any, writes: _Writes) -> None:
        self._client = client
        self._table = table
        self._writes = writes
        self.read_row = table.read_row
        self.read_rows = table.read_rows
        self.check_and_mutate_row = writes.check_and_mutate_row
        self.mutate_row = writes.mutate_row

    @classmethod
    def to(cls, name: TableName, path: str, credentials: Any, emulator_host: str | None) -> _Connection:
        """Make one on the event loop, which it is bound to."""
        # The environment is the client's only way to be told.
        with _environment(EMULATOR_VARIABLE, name.emulator_host), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that there is an emulator is no surprise
            client = vendor().BigtableDataClientAsync(project=name.project, credentials=credentials)
        table = client.get_table(
            name.instance,
            name.table,
            app_profile_id=name.app_profile,
            default_operation_timeout=ATTEMPT_SECONDS,
            default_attempt_timeout=ATTEMPT_SECONDS,
            default_retryable_errors=(),
            default_read_rows_operation_timeout=ATTEMPT_SECONDS,
            default_read_rows_attempt_timeout=ATTEMPT_SECONDS,
            default_read_rows_retryable_errors=(),
        )
        return cls(client, table, _Writes(path, name.app_profile, credentials, emulator_host))

    async def close(self) -> None:
        """Let go of everything, bounded."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writes.close()
                await self._table.close()
                exporters = _taken_exporters(self._client)
                await self._client.close(timeout=CLOSE_SECONDS)
            if exporters:  # they end with a request of their own, and block
                ending = [asyncio.to_thread(exporter.close) for exporter in exporters]
                await asyncio.wait(map(asyncio.ensure_future, ending), timeout=CLOSE_SECONDS)
        except TimeoutError:
            log.warning("the Bigtable client did not close in time", seconds=CLOSE_SECONDS)


class _Writes:
    """Sends writes to one table, over up to :data:`WRITE_CONNECTIONS` connections.

    Raises (requests): ``google.api_core.exceptions``, as the client does.
    """

    def __init__(self, path: str, app_profile: str | None, credentials: Any, emulator_host: str | None) -> None:
        sender = transport()
        self._error: type[Exception] = sender.Error
        self._translated = sender.translated
        # Where Google's servers look for what they route a request by.
        self._routing = (sender.routing({"table_name": path, "app_profile_id": app_profile or ""}),)
        self._lines = [_Line(_channel(credentials, emulator_host)) for _ in range(WRITE_CONNECTIONS)]

    async def check_and_mutate_row(self, request: Any) -> bool:
        """Send a conditional write; True if its predicate let something pass."""
        line = self._free_line()
        matched: bool = (await self._answer(line, line.check_and_mutate, request)).predicate_matched
        return matched

    async def mutate_row(self, request: Any) -> None:
        """Send a write without condition."""
        line = self._free_line()
        await self._answer(line, line.mutate, request)

    async def _answer(self, line: _Line, send: Any, request: Any) -> Any:
        line.on_the_way += 1
        call = send(request, timeout=ATTEMPT_SECONDS, metadata=self._routing)
        try:
            await _end_of(call)  # and not the call itself: whoever is cancelled while it waits for that ends it
            return await call
        except self._error as error:
            raise self._translated(error) from error
        except asyncio.CancelledError:
            await asyncio.wait({_end_of(call)}, timeout=SETTLE_SECONDS)
            call.cancel()
            raise
        finally:
            line.on_the_way -= 1

    async def close(self) -> None:
        """End what is on its way, and let go of the connections."""
        for line in self._lines:
            await line.channel.close()

    def _free_line(self) -> _Line:
        """Return the first connection with room for a request; where all are full, the one that has fewest."""
        for line in self._lines:
            if line.on_the_way < WRITES_AT_ONCE:
                return line
        return min(self._lines, key=lambda line: line.on_the_way)


class _Line:
    """One connection for writes; it connects with the first of them."""

    __slots__ = ("channel", "check_and_mutate", "mutate", "on_the_way")

    def __init__(self, channel: Any) -> None:
        kinds, service = wire_kinds(), "/google.bigtable.v2.Bigtable/"
        self.channel = channel
        self.check_and_mutate = channel.unary_unary(
            service + "CheckAndMutateRow", kinds.CheckAndMutate.SerializeToString, kinds.Checked.FromString
        )
        self.mutate = channel.unary_unary(
            service + "MutateRow", kinds.Mutate.SerializeToString, kinds.Mutated.FromString
        )
        self.on_the_way = 0


def _end_of(call: Any) -> asyncio.Future[None]:
    """Return what is done when a call is, whatever came of it."""
    end = asyncio.get_running_loop().create_future()

    def ended(_call: Any) -> None:
        if not end.done():
            end.set_result(None)

    call.add_done_callback(ended)
    return end


def _channel(credentials: Any, emulator_host: str | None) -> Any:
    """Return a connection for writes, of its own: by default gRPC would make one of all that look alike."""
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),  # a cell is larger than the default
    )
    if emulator_host is not None:
        return transport().insecure_channel(emulator_host, options=options)
    return transport().secure_channel(credentials=credentials, options=options)


class RowReader:
    """Reads rows through one filter; those asked for at the same time travel in one request.

    1. Who asks waits. What gathers until the end of the event loop's turn, or while :data:`GROUPS_AT_ONCE` requests are
       on their way, is sent together, up to :data:`GROUP_ROWS_MAX` rows; a row asked for twice is read once.
       * OK: everybody gets its row.
       * Any error: each row is read alone, as if there had been no group, so that only the one at fault fails.
    2. A row that nobody else asks for is read alone in the first place.

    A read never joins a request already sent, so it sees every write answered before it.

    Cancelled while waiting: the row is read for nobody.

    Args:
        table: Where.
        row_filter: What of each row.
    """

    def __init__(self, table: BigtableTable, row_filter: Filter) -> None:
        self._table = table
        self._filter = row_filter
        self._waiting: deque[tuple[bytes, asyncio.Future[Cells]]] = deque()
        self._requests: set[asyncio.Task[None]] = set()
        self._sending = False

    async def read(self, row_key: bytes) -> Cells:
        """Read a row.

        Raises: as :meth:`BigtableTable.read`.
        """
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((row_key, answer))
        self._send_soon()
        cells: Cells = await answer
        return cells

    async def close(self) -> None:
        """End what is on its way, and what gathers behind it; whoever waits is cancelled."""
        for _, answer in self._waiting:
            answer.cancel()
        for request in self._requests:
            request.cancel()
        if self._requests:
            await asyncio.wait(self._requests, timeout=CLOSE_SECONDS)

    def _send_soon(self) -> None:
        if self._waiting and not self._sending and len(self._requests) < GROUPS_AT_ONCE:
            self._sending = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._sending = False
        group: dict[bytes, list[asyncio.Future[Cells]]] = {}
        while self._waiting and len(group) < GROUP_ROWS_MAX:
            row_key, answer = self._waiting.popleft()
            if not answer.done():
                group.setdefault(row_key, []).append(answer)
        if group:
            request = asyncio.get_running_loop().create_task(self._read(group), name="read of Bigtable rows")
            self._requests.add(request)
            request.add_done_callback(self._sent)
        self._send_soon()

    def _sent(self, request: asyncio.Task[None]) -> None:
        self._requests.discard(request)
        self._send_soon()

    async def _read(self, group: Mapping[bytes, Sequence[asyncio.Future[Cells]]]) -> None:
        try:
            rows: Mapping[bytes, Cells] | None = None
            if len(group) > 1:
                with suppress(TierstreamError):
                    rows = await self._table.read_rows(list(group), self._filter)
            if rows is None:
                await asyncio.gather(*(self._read_alone(row_key, group[row_key]) for row_key in group))
                return
            for row_key, answers in group.items():
                _answer(answers, rows.get(row_key, {}))
        finally:
            for answers in group.values():
                for answer in answers:
                    answer.cancel()  # those without an answer: this request has been ended

    async def _read_alone(self, row_key: bytes, answers: Sequence[asyncio.Future[Cells]]) -> None:
        try:
            _answer(answers, await self._table.read(row_key, self._filter))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for those who wait
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
                    answer.exception()  # seen, also where the reader has been cancelled just now


def _answer(answers: Sequence[asyncio.Future[Cells]], cells: Cells) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_result(cells)


def _cells(row: Any) -> Cells:
    """Return the newest cell of each column; they come sorted by time, newest first."""
    found: dict[tuple[str, bytes], Cell] = {}
    for one in row.cells:
        found.setdefault((one.family, one.qualifier), Cell(one.value, one.timestamp_micros))
    return found


def _taken_exporters(client: Any) -> list[Any]:
    """Take from the client what exports its metrics, so that it is not closed on the event loop."""
    metrics: Any = getattr(client, "_metrics", None)
    exporters = list(getattr(metrics, "handlers", ()))
    if exporters:
        metrics.handlers = []
    return exporters


@contextmanager
def _environment(variable: str, value: str | None) -> Iterator[None]:
    """Set an environment variable for the block, if there is a value."""
    before = os.environ.get(variable)
    if value is not None:
        os.environ[variable] = value
    try:
        yield
    finally:
        if value is not None:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before
