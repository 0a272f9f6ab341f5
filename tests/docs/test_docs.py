"""The documentation says what is so: links lead somewhere, command lines are ones, Python examples run."""

import re
import shlex
from urllib.parse import urlsplit

import pytest

import hedgelab.cli
from hedgelab.cli import COMMANDS, dispatch
from hedgelab.cli.light import LightParser
from tests.docs.generated import ROOT, pages, renewed

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
BY_CONFIG = {"fit", "hedge", "phase", "figures"}  # these can parse a config without running it
LIGHT = {"export", "import", "compare", "report", "runs", "ui"}
NEEDS = {"LLMDataModule": "transformers", "sae_lens": "sae_lens"}
"""What an example that contains a word needs to have installed."""


def command_lines():
    """Every ``hedgelab …`` of every page, in code blocks and between backticks, without comments."""
    found = []
    for text in PAGES.values():
        blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        lines = [p for block in blocks for line in block.replace("\\\n", " ").splitlines() for p in line.split("&&")]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found += [shlex.split(line, comments=True) for line in lines if line.strip().startswith("hedgelab ")]
    return list(dict.fromkeys(tuple(words[1:]) for words in found if words[1:]))


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_generated_blocks_are_up_to_date(page):
    assert renewed(PAGES[page]) == PAGES[page], "run `python -m tests.docs.generated`"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            continue
        assert (ROOT / page).parent.joinpath(parts.path).exists(), f"{page}: {link}"


def test_there_are_command_lines():
    assert any(words[0] == "fit" for words in command_lines())


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_command_line_is_one(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, rest = words[0], list(words[1:])
    assert command[0] == "-" or "." in command or command in COMMANDS, f"no command '{command}'"  # or a class path
    for word in rest:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word
    if command in LIGHT and rest and not any(word.startswith("[") for word in rest):
        parse_light(command, rest, monkeypatch)
    elif command in BY_CONFIG and any(word.startswith("configs/") for word in rest):
        assert hedgelab.cli.main([command, *rest, "--print_config"]) == 0


def parse_light(command, rest, monkeypatch):
    """Parse the line as the command does, and stop there."""

    class ParsedError(Exception):
        pass

    def parse(self, words):
        raise ParsedError(original(self, words))

    original = LightParser.parse
    monkeypatch.setattr(LightParser, "parse", parse)
    with pytest.raises(ParsedError):
        dispatch([command, *rest])


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hedgelab.metrics.ValidationMetric.declared", {})  # a page may show a metric
    names: dict[str, object] = {"__name__": "example"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)):
        for word, package in NEEDS.items():
            if word in block:
                pytest.importorskip(package, reason=f"needs {package}")
        exec(compile(block, f"{page}[{number}]", "exec"), names)
