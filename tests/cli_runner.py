"""The command line, run in this process: quicker than a child, for what needs no process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from consumer import cli


class Result:
    """What one run of the command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        """Its stdout as JSON."""
        return json.loads(self.out)


class Tierstream:
    """Runs the command in an empty folder, with an environment without settings.

    Args:
        monkeypatch: Undoes what is changed for the command.
        capfd: Catches what it prints.
        folder: Where it runs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.folder = folder
        for name in [name for name in os.environ if name.startswith("TIERSTREAM_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str, config: Mapping[str, Any] | None = None) -> Result:
        """Run ``tierstream ARGUMENTS``, with a configuration file if there is one to write."""
        if config is not None:
            (self.folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            arguments = (*arguments, "--config", "config.yaml")
        self._monkeypatch.setattr(sys, "argv", ["tierstream", *arguments])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Result(code or 0, out, err)
