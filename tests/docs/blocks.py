"""The fenced blocks of the documents, and the shell commands in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "docker", "deploy", "loadtest", "demo", "bench", "aot_vllm", "server")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md") if "results" not in page.parts),
    ]
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    heading: str
    """The nearest heading above it."""
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The shell commands in a `console` block, each with its further lines."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        return [part.rstrip() for part in parts[1:]]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, without the indentation of their fences."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"```.*?```", "", before, flags=re.DOTALL), re.MULTILINE)
        content = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        heading = headings[-1] if headings else ""
        name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
        found.append(Block(name, before.count("\n") + 1, heading, match["language"].strip(), content))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def on(page: str, language: str, heading: str | None = None) -> list[Block]:
    """The blocks of a page in a language, under a heading or anywhere."""
    found = [block for block in BLOCKS if (block.page, block.language) == (page, language)]
    return [block for block in found if heading is None or block.heading == heading]
