# SPDX-License-Identifier: Apache-2.0
"""
The documents are true: their blocks run, their names exist, their links lead somewhere.

How a block is run, and what a page may say about it, is in `blocks`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import click
import pytest

from fasten.cli import main
from fasten.settings import VARIABLES
from tests.blocks import Block, BlockFailed, Reader, sections
from tests.outside import ROOT

PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
README: Final = ROOT / "README.md"

SECTIONS: Final = [
    pytest.param(blocks, id=f"{page.relative_to(ROOT)}: {title}")
    for page in PAGES
    for title, blocks in sections(page).items()
]

ENVIRONMENT: Final = {
    "FASTEN_SERVICE_ID": "my-service",
    "FASTEN_NODE_ID": "host-01",
    "FASTEN_AUDIT_DSN": "sqlite:///./audit.db",
}
"""What the first block of a section finds: the page's own `.env`."""


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """
    Return a reader of one section, in an empty folder.
    """
    return Reader(tmp_path, {**os.environ, **ENVIRONMENT})


@pytest.mark.slow
@pytest.mark.parametrize("blocks", SECTIONS)
def test_each_block_does_what_its_page_says(reader, blocks):
    """
    The blocks of a section run one after the other and print what they show.
    """
    for block in blocks:
        reader.follow(block)


class TestReadme:
    @pytest.mark.parametrize("command", ["make demo", "make test"])
    def test_it_names_the_two_commands(self, command):
        """
        A newcomer finds how to try fasten, and how to test it.
        """

        assert command in README.read_text(encoding="utf-8")

    def test_each_make_target_exists(self):
        """
        Each `make` target that a page names is one of the Makefile's.
        """
        named = {
            target
            for page in PAGES
            for target in re.findall(r"`make ([a-z-]+)`", page.read_text("utf-8"))
        }
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))

        assert set() == named - targets

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_each_link_within_the_checkout_leads_somewhere(self, page):
        """
        A relative link names a file that is there.
        """
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        broken = [
            link
            for link in links
            if "://" not in link
            and not link.startswith("mailto:")
            and not (page.parent / link).exists()
        ]

        assert [] == broken

    def test_each_variable_of_the_environment_is_listed(self):
        """
        The README names each FASTEN_* variable that is read, and the pages no other.
        """
        readme = README.read_text(encoding="utf-8")
        named = {
            name
            for page in PAGES
            for name in re.findall(r"\bFASTEN_[A-Z_]*[A-Z]\b", page.read_text("utf-8"))
            if not name.startswith("FASTEN_TEST_")
        }
        listed = {name for name in VARIABLES if re.search(rf"\b{name}\b", readme)}

        assert set() == set(VARIABLES) - listed
        assert set() == named - set(VARIABLES)

    def test_each_command_of_the_cli_is_named(self):
        """
        Each `fasten` command stands in the README and has a help text.
        """
        readme = README.read_text(encoding="utf-8")
        context = click.Context(main)
        missing = [
            name
            for name in main.list_commands(context)
            if f"fasten {name}" not in readme
            or not main.get_command(context, name).help
        ]

        assert [] == missing


def page_of(tmp_path: Path, text: str) -> list[Block]:
    """
    Return the blocks of a page that holds *text*.
    """
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return [block for blocks in sections(page).values() for block in blocks]


class TestTheReader:
    def test_it_runs_python(self, tmp_path, reader):
        """
        A python block that raises fails, with file and line.
        """
        (block,) = page_of(tmp_path, "text\n\n```python\nraise SystemExit(3)\n```\n")
        with pytest.raises(BlockFailed, match=r"page\.md:3: exit 3"):
            reader.follow(block)

    def test_a_block_can_continue(self, tmp_path, reader):
        """
        A block that continues knows the names of the one before.
        """
        first, second = page_of(
            tmp_path,
            "```python\na = 1\n```\n"
            "<!-- continues -->\n```python\nassert a == 1\n```\n",
        )
        reader.follow(first)
        reader.follow(second)
        with pytest.raises(BlockFailed, match="NameError"):
            reader.follow(second._replace(orders={}))

    def test_exports_hold_for_the_next_block(self, tmp_path, reader):
        """
        A variable exported in a shell block reaches the next one.
        """
        export, use = page_of(
            tmp_path,
            "```sh\nexport WHO=me\n```\n\n```console\n$ echo $WHO\nme\n```\n",
        )
        reader.follow(export)
        reader.follow(use)
        with pytest.raises(BlockFailed, match="but printed\nme"):
            reader.follow(use._replace(text="$ echo $WHO\nyou\n"))

    def test_dots_stand_for_anything(self, tmp_path, reader):
        """
        Output that changes from run to run is shown with dots; a comment explains.
        """
        (block,) = page_of(
            tmp_path,
            "```console\n$ date +%s\n# seconds\n...\n"
            "$ echo a-b \\\n  c\na-... c\n$ cat <<E\n> d\n> E\nd\n```\n",
        )
        reader.follow(block)

    def test_the_output_of_python_is_compared(self, tmp_path, reader):
        """
        An output block shows what the block before it printed.
        """
        code, shown = page_of(
            tmp_path,
            "```python\nprint('b')\n```\n\n<!-- output -->\n```text\na\n```\n",
        )
        reader.follow(code)
        with pytest.raises(BlockFailed, match="shown\na\n"):
            reader.follow(shown)

    def test_a_block_can_be_a_file(self, tmp_path, reader):
        """
        A block that is a file's content is written where the next one finds it.
        """
        content, use = page_of(
            tmp_path,
            "<!-- file: etc/.env -->\n```sh\nA=1\n```\n"
            "```console\n$ cat etc/.env\nA=1\n```\n",
        )
        reader.follow(content)
        reader.follow(use)

    def test_a_block_with_a_reason_is_not_run(self, tmp_path, reader):
        """
        A block that names why it cannot run is checked for its syntax only.
        """
        (block,) = page_of(
            tmp_path,
            "<!-- not run: no network -->\n```python\nawait publish()\n```\n",
        )
        reader.follow(block)
        with pytest.raises(BlockFailed, match="not python: invalid syntax"):
            reader.follow(block._replace(text="def\n"))

    def test_an_unknown_target_of_make_is_told(self, tmp_path, reader):
        """
        A command that is not run must still exist in the Makefile.
        """
        (block,) = page_of(
            tmp_path, "<!-- not run: takes minutes -->\n```sh\nmake no-such\n```\n"
        )
        with pytest.raises(BlockFailed, match="no-such"):
            reader.follow(block)

    def test_text_between_comment_and_block_parts_them(self, tmp_path):
        """
        A comment belongs to the block right after it, and to no later one.
        """
        (block,) = page_of(
            tmp_path, "<!-- not run: x -->\ntext\n```python\nprint()\n```\n"
        )

        assert {} == block.orders

    def test_a_block_that_is_never_closed_is_told(self, tmp_path):
        """
        A missing fence would hide the rest of the page.
        """
        with pytest.raises(BlockFailed, match=r"page\.md:1: this block is never"):
            page_of(tmp_path, "```python\nprint()\n")
