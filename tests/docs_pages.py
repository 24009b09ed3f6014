"""Pages of the documentation as a test sees them: fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
LANGUAGES = {"sh", "python", "yaml", "text"}
"""What a block may be: commands, Python, a file that is named in its first line, or nothing to run."""
FENCE = re.compile(r"^(\s*)```(\S*)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block; line: of its first line within the page, from 1."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order. Raises ValueError for one that is not closed."""
    found, start, language, inside = [], 0, "", False
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if fence and not inside:
            language, start, inside = fence[2], number + 1, True
        elif fence:
            found.append(Block(language, "\n".join(lines[start - 1 : number - 1]) + "\n", start))
            inside = False
    if inside:
        raise ValueError(f"{page}: the block of line {start} is not closed")
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block of the language sh; comments are left out."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Where a link may point to within a page, as GitHub makes anchors of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}
