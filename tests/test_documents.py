"""Tests of the documents: links, commands, sizes and the page of options, which this file writes.

python tests/test_documents.py        # writes docs/options.md
"""

import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest
import typer

import uknowpan
from uknowpan.commands.main import app

ROOT = Path(__file__).parents[1]
OPTIONS = ROOT / "docs" / "options.md"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LONGEST_LINE, MOST_BYTES = 120, 80_000
INTRODUCTION = """\
# Options

This page lists the options of every command. It is generated from the code; `uknowpan COMMAND --help` shows the same.
In Python, the options of `sharpen` are keywords, with `_` for `-` ([Python](python.md)).
"""


def short(path):
    return path.relative_to(ROOT).as_posix()


@cache
def commands():
    """Click commands by name; those of a group as "group command"."""
    table = {}
    for name, command in typer.main.get_command(app).commands.items():
        group = getattr(command, "commands", None)
        table |= {f"{name} {inner}": it for inner, it in group.items()} if group else {name: command}
    return table


def wrapped(text, indent=""):
    return textwrap.fill(text, LONGEST_LINE, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def options_page():
    parts = [INTRODUCTION]
    for name, command in commands().items():
        context = typer.Context(command, info_name=name)
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        summary = " ".join((command.help or "").split("\n\n")[0].split())
        parts.append(f"\n## {name}\n\n`{' '.join(['uknowpan', name, *arguments])}`\n\n{wrapped(summary)}\n")
        panels = {}
        for option in command.params:
            if option.param_type_name == "option" and not option.hidden:
                names, text = option.get_help_record(context)
                entry = wrapped(f"- `{names}`: {' '.join(text.split())}", "  ")
                panels.setdefault(option.rich_help_panel or "Options", []).append(entry)
        for panel, entries in panels.items():
            parts.append(f"\n**{panel}**\n\n" + "\n".join(entries) + "\n")
    return "".join(parts)


def test_the_page_of_options_is_up_to_date():
    assert OPTIONS.read_text() == options_page(), "python tests/test_documents.py writes it"


def test_documents_are_short():
    assert sum(path.stat().st_size for path in PAGES if path != OPTIONS) <= MOST_BYTES


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_a_page_reads_well(path):
    text = path.read_text()
    assert not [line for line in text.splitlines() if len(line) > LONGEST_LINE]
    assert "../shared" not in text
    hashes = re.findall(r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", text)
    assert not hashes
    assert not re.search(r"\b(un)?told\b", text)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", path.read_text()):
        if link and not link.startswith("http"):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_tests_in_a_page_exist(path):
    """A promise whose test was renamed or removed."""
    tests = [*(ROOT / "tests").rglob("test_*.py")]
    there = {name for test in tests for name in [test.stem, *re.findall(r"def (test_\w+)", test.read_text())]}
    assert set(re.findall(r"[`/:](test_\w+)(?:`|::|\.py)", path.read_text())) <= there


def shell_commands(text):
    """Words of the lines in shell blocks, with continued lines joined and comments left out."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_commands_in_a_page_exist(path):
    for words in shell_commands(path.read_text()):
        if not words or not words[0].endswith("uknowpan") or words[1].startswith("-"):
            continue
        name = " ".join(words[1:3]) if words[1] == "models" else words[1]
        known = {opt for option in commands()[name].params for opt in [*option.opts, *option.secondary_opts]}
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help"}, f"{' '.join(words)}: {used - known}"


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_python_in_a_page_uses_what_there_is(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        compile(block, short(path), "exec")
        for name in re.findall(r"\buknowpan\.(\w+)\(?", block):
            assert hasattr(uknowpan, name), name


if __name__ == "__main__":
    OPTIONS.write_text(options_page())
