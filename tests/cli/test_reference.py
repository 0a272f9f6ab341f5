"""What the README says of commands and metrics is what the code has, and every command line in it is one."""

import re
import shlex
from pathlib import Path

import pytest

import hedgelab.cli
from hedgelab.cli import COMMANDS, dispatch
from hedgelab.cli.light import LightParser
from hedgelab.cli.reference import BLOCKS, main, renewed

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BY_CONFIG = {"fit", "hedge", "phase", "figures"}  # these can parse a config without running it
LIGHT = {"export", "import", "compare", "report", "runs", "ui"}


def command_lines():
    """Every ``hedgelab …`` of the README, in code blocks and between backticks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [part for block in blocks for line in block.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    outside = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines += re.findall(r"`([^`]+)`", outside)
    found = (shlex.split(line, comments=True) for line in lines if line.strip().startswith("hedgelab "))
    return list(dict.fromkeys(tuple(words[1:]) for words in found if words[1:]))


def test_generated_blocks_are_up_to_date():
    assert renewed(README) == README, "run `python -m hedgelab.cli.reference README.md`"


def test_blocks_are_renewed_between_their_marks_only(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("above\n<!-- commands -->\nold\n<!-- /commands -->\nbelow\n")
    assert main([str(file)]) == 0
    lines = file.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert sum(line.startswith("| `hedgelab ") for line in lines) == len(COMMANDS)
    assert renewed(file.read_text()) == file.read_text()


def test_tables_have_a_row_each_and_no_stray_bars():
    for make in BLOCKS.values():
        rows = make().splitlines()
        assert len({row.count("|") for row in rows}) == 1, rows


def test_the_readme_has_command_lines():
    assert ("runs",) in command_lines()
    assert any(words[0] == "fit" for words in command_lines())


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_command_line_of_the_readme_is_one(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, rest = words[0], list(words[1:])
    assert command.startswith("-") or command in COMMANDS, f"no command '{command}'"
    for word in rest:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word
    if command in LIGHT and not any(word.startswith("[") for word in rest):
        parse_light(command, rest, monkeypatch)
    elif command in BY_CONFIG and any(word.startswith("configs/") for word in rest):
        assert hedgelab.cli.main([command, *rest, "--print_config"]) == 0


def parse_light(command, rest, monkeypatch):
    """Parse the line as the command does, and stop there."""

    class ParsedError(Exception):
        pass

    def parse(self, words):
        parsed = original(self, words)
        raise ParsedError(parsed)

    original = LightParser.parse
    monkeypatch.setattr(LightParser, "parse", parse)
    with pytest.raises(ParsedError):
        dispatch([command, *rest])
