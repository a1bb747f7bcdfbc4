"""Options that many commands share, and the configuration they choose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from consumer.config import Config

ConfigFile: TypeAlias = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The YAML configuration. Default: $TIERSTREAM_CONFIG."),
]
Bootstrap: TypeAlias = Annotated[
    str | None,
    typer.Option("--bootstrap", "-b", metavar="HOST:PORT", help="Brokers, instead of kafka.bootstrap_servers."),
]
Group: TypeAlias = Annotated[
    str | None, typer.Option("--group", "-g", metavar="GROUP", help="Consumer group, instead of kafka.group_id.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url: TypeAlias = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The admin port of the service. Default: from the configuration."),
]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


def configuration(config: Path | None, bootstrap: str | None = None, group: str | None = None) -> Config:
    """Load the configuration with what the command line says on top.

    Raises:
        ConfigError: it cannot be used.
    """
    from consumer.config import load

    return load(config, flags={"kafka.bootstrap_servers": bootstrap, "kafka.group_id": group})
