"""What mkdocs does beyond its own: README and changelog become pages, and links out of docs/ become words.

Files of the repository that are no pages (tests, proto, licences) have no place on the site, so that a link to one
would lead nowhere; their paths stay, as code.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?:)(?!images/)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand above docs/."""
    for source, target in _PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = (
            text.replace("](docs/", "](")
            .replace("](README.md", "](readme.md")
            .replace("](CHANGELOG.md", "](changelog.md")
        )
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to what is no page into words."""
    del page, config

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        name = path.removeprefix("../")
        name = _PAGES.get(name, name)
        if files.get_file_from_path(name) is not None:
            return f"[{text}]({name}{anchor})"
        return text if path in text else f"{text} (`{path.removeprefix('../')}`)"

    words = _PICTURE.sub(lambda match: f"*{match[1]} (`{match[2]}`)*", markdown)
    return _LINK.sub(link, words)
