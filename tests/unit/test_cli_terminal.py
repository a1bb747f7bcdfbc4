"""Commands in a real terminal of 80 columns, and in a pipe: what wraps, what is coloured, what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from admin_double import AdminDouble
from cli_runner import Tierstream
from consumer import cli
from consumer.cli import output
from service_process import ROOT, clean_environment, command_line
from terminal import Terminal, tierstream

pytestmark = [pytest.mark.slow, pytest.mark.process]

ALTERNATE_SCREEN, MAIN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
CURSOR_SHOWN = b"\x1b[?25h"


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command there is, by its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))

CONTRACT = (
    "run", "demo", "broker", "check-config", "config show", "config schema", "produce", "tail", "inspect", "lag", "why",
    "top", "verify", "replay", "reset-offsets", "offset-map show", "offset-map clear", "schema show", "schema check",
    "schema register", "storage init", "storage verify", "storage get", "storage head", "storage rm",
    "storage recover", "bench", "health",
)  # fmt: skip
"""Contract 7."""

CHANGING = {
    "produce", "replay", "reset-offsets", "offset-map clear", "schema register", "storage init", "storage rm",
    "storage recover",
}  # fmt: skip


def partition(number: int, **changes: Any) -> dict[str, Any]:
    """A partition of `/debug/state`."""
    return {
        "topic": "operations-of-a-topic-with-a-long-name",
        "partition": number,
        "epoch": 1,
        "window": 50,
        "in_flight": number % 50,
        "buffered": 0,
        "position": 1_234_567_890,
        "committed": 1_234_567_890,
        "lowest_unfinished": 1_234_567_890,
        "finished_above_gap": 0,
        "high_watermark": 2_234_567_890,
        "lag": 1_000_000_000,
        "paused_for": ["storage_unavailable", "bytes"] if number == 0 else [],
        "oldest": None,
        **changes,
    }


STATE: dict[str, Any] = {
    "state": "running",
    "limiter": {"limit": 500, "in_use": 480, "available": 20, "queued": 0},
    "partitions": [partition(number) for number in range(40)],
    "totals": dict.fromkeys(
        ("records", "responses", "failures", "poison", "dead_letters", "commits", "rebalances"), 1_000_000_000
    ),
    "storage": {},
}


@pytest.fixture
def port() -> Iterator[AdminDouble]:
    """A service, as far as `top` and `why` see it."""
    standing = AdminDouble()
    standing.state = STATE
    yield standing
    standing.stop()


class TestTop:
    """`top`: the one command that takes the terminal for itself, and so has to give it back."""

    @pytest.mark.parametrize("ending", ["q", "ctrl-c", "SIGTERM"])
    def test_it_is_redrawn_until_it_is_told_to_end_and_leaves_the_terminal_as_it_was(
        self, port: AdminDouble, tmp_path: Path, ending: str
    ) -> None:
        """Echo, line mode, cursor and screen are back, the exit code is 0, and nothing is left on the screen."""
        with Terminal(tierstream("top", "--url", port.url, "--interval", "0.2"), tmp_path) as terminal:
            terminal.wait(lambda text: "tierstream running" in text and "more partitions" in text, "the first picture")
            first = terminal.shown
            port.state = STATE | {"state": "draining"}
            terminal.wait(lambda text: "tierstream draining" in text, "the next picture")
            assert terminal.settings[3] != terminal.settings_before[3], "a key would be seen"
            terminal.press("xyz ")
            match ending:
                case "q":
                    terminal.press("q")
                case "ctrl-c":
                    terminal.process.send_signal(signal.SIGINT)
                case _:
                    terminal.process.send_signal(signal.SIGTERM)

            assert terminal.wait_end() == 0, terminal.text
            assert terminal.settings == terminal.settings_before
            assert ALTERNATE_SCREEN in terminal.raw
            assert MAIN_SCREEN in terminal.raw.rpartition(ALTERNATE_SCREEN)[2]
            assert CURSOR_SHOWN in terminal.raw.rpartition(b"\x1b[?25l")[2]
            assert b"Traceback" not in terminal.raw

        assert all("operations-of-a" not in line or re.search(r"/\d+ ", line) for line in first), "a name was cut short"
        assert first[3].split() == ["partition", "window", "lag", "rec/s", "oldest", "paused", "for"]
        assert "storage_un" in first[4], "the partition with trouble is not on top"
        assert sum("/50" in line for line in first) >= 15, "the screen is not used"
        assert any("more partitions" in line for line in first)

    def test_colours_are_left_out_where_that_is_asked_for(self, port: AdminDouble, tmp_path: Path) -> None:
        """`NO_COLOR`."""
        seen = {}
        for name, environment in {"colour": {}, "none": {"NO_COLOR": "1"}}.items():
            with Terminal(tierstream("top", "--url", port.url), tmp_path, environment=environment) as terminal:
                terminal.wait(lambda text: "tierstream running" in text, "the first picture")
                seen[name] = re.findall(rb"\x1b\[[\d;]*3[0-7]m", terminal.raw)

        assert seen["colour"]
        assert not seen["none"]

    def test_a_terminal_that_can_nothing_gets_one_picture(self, port: AdminDouble, tmp_path: Path) -> None:
        """`TERM=dumb`: an editor's shell."""
        command = tierstream("top", "--url", port.url)
        with Terminal(command, tmp_path, lines=60, environment={"TERM": "dumb"}) as terminal:
            assert terminal.wait_end() == 0

        assert b"\x1b" not in terminal.raw
        assert sum("/50 " in line for line in terminal.shown) == 40


def test_every_command_of_the_contract_is_there_with_its_options() -> None:
    """Contract 7: `--json` on every one that tells something, `--yes` and `--dry-run` on every one that changes."""
    for name in CONTRACT:
        options = {option for parameter in COMMANDS[tuple(name.split())].params for option in parameter.opts}
        assert "--json" in options or name == "run", name
        if name in CHANGING:
            assert {"--yes", "--dry-run"} <= options, name


def test_help_fits_80_columns_without_an_escape_or_a_cut(tierstream_here: Tierstream) -> None:
    """Of every command; the list of them is read first, so none of its lines is cut short."""
    listed = tierstream_here("--help")
    assert "..." not in listed.out.partition("Commands:")[2]
    for words in [(), *COMMANDS, ("config",), ("storage",), ("offset-map",), ("schema",)]:
        said = tierstream_here(*words, "--help")
        assert (said.code, said.err) == (0, "")
        assert "\x1b" not in said.out
        assert max(map(len, said.out.splitlines())) <= 80, words
        assert "..." not in said.out.partition("Commands:")[2], words


@pytest.fixture
def tierstream_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Tierstream:
    """The command, in this process."""
    return Tierstream(monkeypatch, capfd, tmp_path)


class TestTables:
    """`lag`, `offset-map show`, `reset-offsets`: numbers of eleven digits side by side."""

    ROWS: Sequence[dict[str, Any]] = [
        {
            "topic": "operations",
            "partition": number,
            "committed": 12_345_678_901,
            "end": 12_345_678_999,
            "lag": 98,
            "map_bytes": None,
            "finished_above_gap": 17,
            "reason": "it belongs to another cluster, so it has no effect; its records run again",
        }
        for number in (0, 11)
    ]
    COLUMNS = ("topic", "partition", "committed", "end", "lag", "map_bytes", "finished_above_gap", "reason")

    def test_on_a_narrow_terminal_names_are_broken_and_texts_are_cut(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No line wraps, no number is cut."""
        monkeypatch.setattr(output, "_terminal_columns", lambda: 80)

        output.say_table(self.COLUMNS, self.ROWS)

        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80, lines
        assert [line.split()[-1] for line in lines[:2]] == ["finished", "above"]
        assert lines[2].split() == ["topic", "partition", "committed", "end", "lag", "bytes", "gap", "reason"]
        assert [line.split()[1:7] for line in lines[3:]] == [
            [str(number), "12345678901", "12345678999", "98", "-", "17"] for number in (0, 11)
        ]
        assert all(line.endswith("…") for line in lines[3:])

    @pytest.mark.parametrize("columns", [None, 200])
    def test_where_there_is_room_or_no_terminal_nothing_is_changed(
        self, columns: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What reads a pipe relies on names and texts."""
        monkeypatch.setattr(output, "_terminal_columns", lambda: columns)

        output.say_table(self.COLUMNS, self.ROWS)

        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == list(self.COLUMNS)
        assert len(lines) == 3
        assert lines[1].endswith("run again")


class TestPipes:
    """What others read."""

    def test_nothing_that_goes_into_a_pipe_has_an_escape(self, port: AdminDouble, tmp_path: Path) -> None:
        """Also where the environment forces colours on others."""
        forced = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "NO_COLOR": "", "TERM": "xterm-256color"}
        for arguments in (
            ["top", "--url", port.url],
            ["why", "--url", port.url],
            ["config", "show"],
            ["--help"],
            ["lga"],
        ):
            done = command_line(*arguments, cwd=tmp_path, environment=forced)
            assert "\x1b" not in done.stdout + done.stderr, arguments

    @pytest.mark.parametrize(
        "arguments", [["config", "schema"], ["config", "show"], ["why"], ["top"], ["schema", "show"], ["--help"]]
    )
    def test_a_reader_that_leaves_ends_it_quietly(
        self, port: AdminDouble, tmp_path: Path, arguments: list[str]
    ) -> None:
        """`… | head -1`: no trace, no words, at whatever write it is noticed."""
        if arguments[0] in {"why", "top"}:
            port.state = STATE | {"partitions": [partition(number) for number in range(3_000)]}
            arguments = [*arguments, "--url", port.url]
        ours, theirs = os.pipe()
        os.close(ours)
        with os.fdopen(theirs, "wb") as gone:
            done = subprocess.run(
                tierstream(*arguments),
                cwd=tmp_path,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=gone,
                stderr=subprocess.PIPE,
                timeout=60,
                check=False,
            )

        assert done.returncode in {0, 1}
        assert done.stderr == b""


class TestCompletion:
    """What the shells ask, and what they get."""

    def environment(self, **more: str) -> dict[str, str]:
        """A shell that finds the command."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return clean_environment(PATH=path, PYTHONPATH=str(ROOT), **more)

    def test_bash_completes_a_subcommand_an_option_and_a_choice(self, tmp_path: Path) -> None:
        """By the very function that `--show-completion` prints, in bash itself."""
        asked = {
            "off": "tierstream off",
            "reset": "tierstream res",
            "nested": "tierstream storage ver",
            "option": "tierstream lag --boot",
            "choice": "tierstream size --policy e",
        }
        script = ['eval "$(tierstream --show-completion)"', "complete -p tierstream >&2"]
        for name, line in asked.items():
            script += [
                f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()",
                "_tierstream_completion tierstream",
                f'echo "{name}=${{COMPREPLY[*]}}"',
            ]
        done = subprocess.run(
            ["bash", "--norc", "-c", "\n".join(script)],
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=tmp_path,
            timeout=120,
            check=True,
        )

        assert "-F _tierstream_completion tierstream" in done.stderr
        assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == {
            "off": "offset-map",
            "reset": "reset-offsets",
            "nested": "verify",
            "option": "--bootstrap",
            "choice": "equal-share",
        }

    def test_it_can_be_installed_for_bash(self, tmp_path: Path) -> None:
        """Into the home folder, where bash looks for it; a new shell then knows it."""
        done = subprocess.run(
            ["bash", "--norc", "-c", "tierstream --install-completion; exit $?"],
            capture_output=True,
            text=True,
            env=self.environment(HOME=str(tmp_path), SHELL="/bin/bash"),
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        shell = subprocess.run(
            ["bash", "--rcfile", str(tmp_path / ".bashrc"), "-i", "-c", "complete -p tierstream"],
            capture_output=True,
            text=True,
            env=self.environment(HOME=str(tmp_path)),
            timeout=60,
            check=False,
        )

        assert "_tierstream_completion" in shell.stdout, shell.stderr

    def test_zsh_is_told_names_and_what_they_do(self, tmp_path: Path) -> None:
        """As its completion function asks."""
        asked = subprocess.run(
            ["tierstream"],
            capture_output=True,
            text=True,
            env=self.environment(_TIERSTREAM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="tierstream rep"),
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        shown = subprocess.run(
            ["tierstream"],
            capture_output=True,
            text=True,
            env=self.environment(_TIERSTREAM_COMPLETE="source_zsh"),
            cwd=tmp_path,
            timeout=60,
            check=True,
        )

        assert '"replay":"Put records, or dead letters, back on their input."' in asked.stdout
        assert "#compdef tierstream" in shown.stdout

    @pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
    def test_zsh_completes_in_a_terminal(self, tmp_path: Path) -> None:
        """A subcommand below another one, an option, a choice; what would be ambiguous is listed with what it does."""
        environment = self.environment(HOME=str(tmp_path), PS1="> ")
        with Terminal(["zsh", "-f", "-i"], tmp_path, columns=100, environment=environment) as terminal:
            terminal.press("autoload -U compinit; compinit -u\n")
            terminal.press('eval "$(_TIERSTREAM_COMPLETE=source_zsh tierstream)"; print it is $((1 + 1))\n')
            terminal.wait(lambda text: "it is 2" in text, "the function to be known")
            for typed, completed in (
                ("storage ver", "tierstream storage verify"),
                ("lag --boot", "tierstream lag --bootstrap"),
                ("size --policy e", "tierstream size --policy equal-share"),
                ("re", "reset-offsets  -- Let the group go on elsewhere."),
            ):
                terminal.press(f"\x15tierstream {typed}\t")
                terminal.wait(lambda text, completed=completed: completed in text, completed)  # type: ignore[misc]

    @pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
    def test_fish_completes(self, tmp_path: Path) -> None:
        """By its own question for what a line may become."""
        lines = ("storage ver", "lag --boot", "size --policy e")
        script = ["env _TIERSTREAM_COMPLETE=source_fish tierstream | source"]
        script += [f'complete -C "tierstream {line}"' for line in lines]
        done = subprocess.run(
            ["fish", "--no-config", "-c", "; ".join(script)],
            capture_output=True,
            text=True,
            env=self.environment(HOME=str(tmp_path)),
            cwd=tmp_path,
            timeout=120,
            check=True,
        )

        assert [line.partition("\t")[0] for line in done.stdout.splitlines() if line] == [
            "verify",
            "--bootstrap",
            "equal-share",
        ]
