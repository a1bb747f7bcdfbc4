"""How a service process ends: its exit codes, and the time an end may take (contract 11)."""

from __future__ import annotations

from typing import Final

CLEAN: Final = 0
"""Stopped as it was asked to, with nothing left undone."""
FAILURE: Final = 1
"""Also: a drain that ran out of time."""
USAGE: Final = 2
"""Arguments or configuration; a restart changes nothing."""
FATAL: Final = 3
"""A restart is right."""
POISONED: Final = 4
"""Stopped by the poison limit."""
SIGNALLED: Final = 128
"""Plus the number of a second signal."""

STOP_MARGIN_SECONDS: Final = 15.0
"""What a stop may take beside the drain; the chart's grace period counts on it. After it the process ends, whatever
still hangs."""
