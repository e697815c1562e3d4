"""Hooks of the site: pages that lie outside of docs/, and links to them.

The README is the first page. A link from docs/ to another file of the repository is one to a copy
of it in the site.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FIRST = "README.md"
OUTSIDE = (FIRST, "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()([^)#\s]+)([^)]*\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and what pages link to outside of docs/."""
    sources = [ROOT / name for name in OUTSIDE]
    results = sorted(ROOT.glob("benchmarks/results/**/*"))
    sources += [path for path in results if path.suffix in (".md", ".png", ".svg")]
    for path in [*sources, ROOT / "LICENSE", ROOT / "CITATION.cff"]:
        where = path.relative_to(ROOT).as_posix()
        where = "index.md" if where == FIRST else where
        if path.suffix == ".md":
            text = _linked(path.read_text(), path, where)
            files.append(File.generated(config, where, content=text))
        else:
            files.append(File.generated(config, where, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the pages in docs/ to files outside of it."""
    path = ROOT / "docs" / page.file.src_uri
    return _linked(markdown, path, page.file.src_uri) if path.exists() else markdown


def _linked(markdown: str, path: Path, where: str) -> str:
    """The text with its links as seen from its place in the site."""

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        aim = (path.parent / target).resolve()
        if not aim.is_relative_to(ROOT):
            return found[0]
        inside = aim.is_relative_to(ROOT / "docs")
        place = aim.relative_to(ROOT / "docs" if inside else ROOT).as_posix()
        place = "index.md" if place == FIRST else place
        up = len(PurePosixPath(where).parents) - 1
        return f"{found[1]}{'../' * up}{place}{found[3]}"

    return _LINK.sub(link, markdown)
