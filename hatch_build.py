"""The metadata that depends on where a release is built: the project's address, and links in the README.

REPOSITORY_URL is the address of the repository, which the release workflow sets. Links to files of the repository become
absolute with it, because PyPI shows the README alone. Without it the README stays as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class RepositoryHook(MetadataHookInterface):
    """Fill in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add them to the project's metadata."""
        url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, url) if url else text}
        metadata["urls"] = {}
        if url:
            metadata["urls"] = {
                "Repository": url,
                "Documentation": f"{url}/tree/main/docs",
                "Changelog": f"{url}/blob/main/CHANGELOG.md",
                "Issues": f"{url}/issues",
            }


def absolute(text: str, url: str) -> str:
    """Return Markdown whose links to files of the repository begin with its address; pictures are taken raw."""

    def link(match: re.Match[str]) -> str:
        path = match[3].removeprefix("./")
        return f"{match[1]}({url}/{'raw' if match[2] else 'blob'}/main/{path})"

    return re.sub(r"((!?)\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)", link, text)
