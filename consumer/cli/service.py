"""``run``, ``health``, ``check-config``, ``config``, ``version``: the service and its configuration."""

from __future__ import annotations

import json
import platform
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from consumer.cli.options import AsJson, Bootstrap, ConfigFile, Group, Url, configuration
from consumer.cli.output import EXIT_FAILURE, EXIT_USAGE, Failure, complain, note, say, say_json
from consumer.errors import ConfigError
from consumer.exits import CLEAN

if TYPE_CHECKING:
    from consumer.config import Config

HEALTH_SECONDS: Final = 5.0
"""A probe that takes longer is a no; container probes usually wait 1 to 10 s."""

ANSWER_BYTES_MAX: Final = 64 * 1024
"""Most of a probe's answer that is read; a real one has a line."""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(run)
    app.command()(health)
    app.command("check-config")(check_config)
    config = typer.Typer(help="Effective values, and the schema of all settings.", no_args_is_help=True)
    config.command("show")(config_show)
    config.command("schema")(config_schema)
    app.add_typer(config, name="config")
    app.command()(version)


# ------------------------------------------------------------------------------------------------- run, health


def run(config: ConfigFile = None, bootstrap: Bootstrap = None, group: Group = None) -> None:
    """Run the service until SIGTERM or SIGINT. Logs to stderr."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _nothing_has_begun)
    settings = configuration(config, bootstrap, group)
    from consumer import log

    log.configure(settings.log.level, settings.log.format)
    logger = log.get_logger(__name__)
    for warning in settings.warnings:
        logger.warning("configuration", remark=warning)
    if settings.runtime.processes > 1:
        from consumer.processes.supervisor import main as supervise

        raise typer.Exit(supervise(settings))
    from consumer.app import main

    raise typer.Exit(main(settings))


def _nothing_has_begun(*_signal: object) -> None:
    """A first signal before the service has its own handlers; process 1 of a container would not even end by it."""
    raise SystemExit(CLEAN)


def health(url: Url = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Exit with 0 if the running service is ready, else with 1."""
    address = admin_address(url, config) + "/readyz"
    try:
        status, body = fetch(address)
    except OSError as error:
        answer: dict[str, Any] = {"ready": False, "reasons": [f"no answer from {address}: {cause_of(error)}"]}
    else:
        answer = _readiness(status, body)
    if as_json:
        say_json(answer, line=True)
    else:
        say("ready" if answer["ready"] else f"not ready: {', '.join(answer['reasons'])}")
    raise typer.Exit(0 if answer["ready"] else EXIT_FAILURE)


def _readiness(status: int, body: bytes) -> dict[str, Any]:
    """Read an answer of ``/readyz``; ready only if status and body agree on it."""
    try:
        said = json.loads(body)
        ready, reasons = bool(said["ready"]), [str(reason) for reason in said["reasons"]]
    except (ValueError, KeyError, TypeError):
        return {"ready": False, "reasons": [f"unexpected answer with status {status}"]}
    return {"ready": ready and status == 200, "reasons": reasons}


def admin_address(url: str | None, config: Path | None) -> str:
    """Return the address of the admin port, without a slash at the end.

    A service that listens on all addresses is asked at the loopback one.

    Raises:
        Failure: the port is chosen at start, so that only the user can know it; or *url* is no address.
        ConfigError: the configuration cannot be used.
    """
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise Failure(f"{url} is no address", "--url http://HOST:PORT", exit_code=EXIT_USAGE)
        return url.rstrip("/").removesuffix("/readyz")
    admin = configuration(config).admin
    if admin.port == 0:
        raise Failure(
            "admin.port is 0: the port was chosen at start", "--url http://HOST:PORT", exit_code=EXIT_USAGE
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(admin.host, admin.host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{admin.port}" if ":" in host else f"http://{host}:{admin.port}"


def fetch(
    address: str, seconds: float = HEALTH_SECONDS, bytes_max: int = ANSWER_BYTES_MAX
) -> tuple[int, bytes]:
    """GET *address* directly, whatever proxy the environment names; return status and at most *bytes_max* of the body.

    Raises:
        OSError: no answer within *seconds*.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=seconds) as answer:
            return answer.status, answer.read(bytes_max)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(bytes_max)
    except ValueError as error:  # no address at all, or no HTTP
        raise OSError(str(error)) from error


def cause_of(error: OSError) -> str:
    """Return why there was no answer, in words: urllib wraps it, and the system numbers it."""
    cause = getattr(error, "reason", error)
    return getattr(cause, "strerror", None) or str(cause)


# ------------------------------------------------------------------------------------------------- configuration


def check_config(
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    group: Group = None,
    online: Annotated[bool, typer.Option("--online", help="Also ask the brokers.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the configuration. Exit 2 if it is wrong, 1 if what it names is not there."""
    try:
        settings = configuration(config, bootstrap, group)
    except ConfigError as error:
        if not as_json:
            raise
        say_json({"valid": False, "problems": str(error).splitlines(), "warnings": [], "checks": []})
        raise typer.Exit(EXIT_USAGE) from None
    checks: list[dict[str, Any]] = []
    if online:
        from consumer.cli.online import check_online

        checks = [check.shown() for check in check_online(settings)]
    failed = any(check["ok"] is False for check in checks)
    if as_json:
        say_json({"valid": True, "problems": [], "warnings": list(settings.warnings), "checks": checks})
    else:
        for warning in settings.warnings:
            note(f"warning: {warning}")
        say("the configuration is valid")
        for check in checks:
            mark = {True: "ok", False: "FAILED", None: "not checked"}[check["ok"]]
            say(f"{mark:11}  {check['check']}: {check['detail']}")
    if failed:
        hints = [check["hint"] for check in checks if "hint" in check]
        complain("not everything that the configuration needs is there", hints[0] if hints else None)
        raise typer.Exit(EXIT_FAILURE)


def config_show(
    config: ConfigFile = None,
    bootstrap: Bootstrap = None,
    group: Group = None,
    origin: Annotated[bool, typer.Option("--origin", help="Also say where each value comes from.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the effective value of every setting; secrets are masked."""
    settings = configuration(config, bootstrap, group)
    if as_json:
        say_json(_with_origins(settings, settings.shown()) if origin else settings.shown())
    else:
        for line in _yaml_lines(settings, settings.shown(), origin=origin):
            say(line)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _with_origins(settings: Config, tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Put ``{"value", "origin"}`` in the place of each value."""
    return {
        name: _with_origins(settings, value, f"{path}{name}.")
        if isinstance(value, Mapping) and value
        else {"value": value, "origin": settings.origin(path + name)}
        for name, value in tree.items()
    }


def _yaml_lines(settings: Config, tree: Mapping[str, Any], *, origin: bool) -> Iterator[str]:
    """Write YAML with values in JSON's notation, which YAML understands, and origins as comments."""
    before: tuple[str, ...] = ()
    for path, value in _leaves(tree):
        for depth, name in enumerate(path[:-1]):
            if path[: depth + 1] != before[: depth + 1]:
                yield "  " * depth + f"{name}:"
        before = path
        line = "  " * (len(path) - 1) + f"{path[-1]}: {json.dumps(value, ensure_ascii=False)}"
        yield f"{line}  # {settings.origin('.'.join(path))}" if origin else line


def config_schema(as_json: AsJson = False) -> None:
    """Print the JSON Schema of the configuration file."""
    from consumer.config import json_schema

    del as_json  # it is JSON in any case
    say_json(json_schema())


# ------------------------------------------------------------------------------------------------- version


def version(as_json: AsJson = False) -> None:
    """Show the version."""
    release, client, python = _installed("tierstream"), _installed("aiokafka"), platform.python_version()
    compiled = _is_compiled()
    if as_json:
        say_json({"version": release, "python": python, "aiokafka": client, "compiled": compiled}, line=True)
    else:
        say(f"tierstream {release} (Python {python}, aiokafka {client}{', compiled' if compiled else ''})")


def _is_compiled() -> bool:
    """Tell whether records are decoded and encoded by machine code, as in a wheel made with TIERSTREAM_COMPILE=1."""
    from importlib import machinery, util

    found = util.find_spec("consumer.codec")
    return found is not None and (found.origin or "").endswith(tuple(machinery.EXTENSION_SUFFIXES))


def _installed(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def show_version(wanted: bool) -> None:
    """Act on the global option ``--version``."""
    if wanted:
        version()
        raise typer.Exit
