"""The command ``tierstream``: from arguments to an exit code; the commands stand in the modules of this package.

* Data goes to stdout, everything else to stderr: ``error: …``, then, where something can be done, ``hint: …``.
* Exit codes: 0 = done, 1 = failed or the answer is no, 2 = usage or configuration, 130 = interrupted; ``run`` has more.
* Heavy imports stand inside the commands: ``--help``, ``version`` and ``health`` need no Kafka client and no storage.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

import typer

from consumer.cli import development, inspection, ledger, objects, offsets, records, schemas, service, size
from consumer.cli.output import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, Failure, complain
from consumer.errors import ConfigError, TierstreamError

app = typer.Typer(
    name="tierstream",
    help="Kafka records in, object-storage operations, exactly one indexed response per record out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
service.register(app)
records.register(app)
inspection.register(app)
ledger.register(app)
objects.register(app)
offsets.register(app)
schemas.register(app)
size.register(app)
development.register(app)


@app.callback()
def _all_commands(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=service.show_version)
    ] = False,
) -> None:
    del version  # its callback has done everything


_WRONG_USAGE: Final[type[Exception]] = typer.BadParameter.__mro__[1]
"""What typer raises for arguments that cannot be; it has no public name of its own."""


def _explain(error: Any) -> None:
    """Say what is wrong with the arguments; a command that was given none shows its help instead."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    command = "tierstream" if error.ctx is None else error.ctx.command_path
    complain(error.format_message(), f"`{command} --help` says what there is")


def main() -> None:
    """Run the command line and end the process with its exit code; no failure of a known kind shows a trace."""
    try:
        sys.exit(app(prog_name="tierstream", standalone_mode=False))
    except _WRONG_USAGE as error:
        _explain(error)
        sys.exit(EXIT_USAGE)
    except ConfigError as error:
        complain(str(error), "`tierstream config schema` and docs/configuration.md list every setting")
        sys.exit(EXIT_USAGE)
    except Failure as failure:
        complain(str(failure), failure.hint)
        sys.exit(failure.exit_code)
    except TierstreamError as error:
        complain(str(error), error.hint)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`). What is still buffered must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
