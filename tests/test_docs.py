"""Runs the Python of README.md and docs/, page by page, and holds what it prints to what the page shows.

Blocks marked ``python`` run in the order of the page and share their names; so does a block hidden in an HTML
comment that opens with ``<!-- python``. A block marked ``text`` right behind one is what that one prints, our
callbacks' messages included and Lightning's left out. There ``...`` stands for anything, and a number with a
decimal point may be off by 0.1 or a tenth: machines round differently.
"""

from __future__ import annotations

import doctest
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^```(?P<kind>\w+)\n(?P<code>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$", re.MULTILINE | re.DOTALL
)
DECIMAL = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
OUR_MESSAGES = ("Binarization:", "InstaTune:", "SupernetTraining:")


@dataclass(frozen=True)
class Code:
    """A block to run, the line of the page that it begins on, and what the page says it prints."""

    source: str
    line: int
    shown: str | None


def code_of(page: str) -> list[Code]:
    blocks: list[Code] = []
    end_of_code = None
    for match in BLOCK.finditer(page):
        is_output = match["kind"] == "text" and end_of_code is not None
        if is_output and not page[end_of_code : match.start()].strip():
            blocks[-1] = Code(blocks[-1].source, blocks[-1].line, match["code"])
        end_of_code = None
        if match["hidden"] or match["kind"] == "python":
            source = match["hidden"] or match["code"]
            blocks.append(Code(source, page.count("\n", 0, match.start()) + 1, None))
            end_of_code = match.end()
    return blocks


@contextmanager
def printed() -> Iterator[io.StringIO]:
    class OurMessages(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(OUR_MESSAGES):
                stream.write(f"{record.getMessage()}\n")

    stream, handler = io.StringIO(), OurMessages()
    lightning = logging.getLogger("pytorch_lightning")
    lightning.addHandler(handler)
    try:
        with redirect_stdout(stream):
            yield stream
    finally:
        lightning.removeHandler(handler)


def check_output(shown: str, got: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(DECIMAL.sub("#", shown), DECIMAL.sub("#", got), options)
    assert same, f"the page shows\n{shown}\nbut the code prints\n{got}"
    if "..." not in shown:
        numbers, measured = ([float(n) for n in DECIMAL.findall(text)] for text in (shown, got))
        assert measured == pytest.approx(numbers, rel=0.1, abs=0.1), f"the code prints\n{got}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is better than of the largest")  # so short a run says nothing
@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page.read_text())], ids=lambda p: p.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page):
    names = {"__name__": f"page_{page.stem.replace('-', '_').lower()}"}
    for block in code_of(page.read_text()):
        with printed() as stream:
            exec(compile("\n" * block.line + block.source, str(page), "exec", dont_inherit=True), names)
        if block.shown is not None:
            check_output(block.shown, stream.getvalue())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_of_the_docs_is_reached_from_their_index():
    index = (ROOT / "docs/index.md").read_text()
    assert [p.name for p in PAGES[1:] if p.name != "index.md" and f"({p.name})" not in index] == []


def test_output_that_differs_from_the_page_is_found():
    check_output("depth 3, accuracy 0.91\n", "depth 3, accuracy 0.88\n")
    check_output("InstaTune: ...\n", "InstaTune: anything\n")
    with pytest.raises(AssertionError, match="the page shows"):
        check_output("depth 3\n", "depth 4\n")
    with pytest.raises(AssertionError, match="the code prints"):
        check_output("accuracy 0.91\n", "accuracy 0.71\n")
