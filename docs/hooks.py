"""Used by mkdocs: what the pages link to outside of `docs` is in the repository, not on the site."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points relative links that leave `docs` at the repository."""

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if "://" in match[2] or path.startswith("docs"):
            return match[0]
        return f"{match[1]}{config.repo_url}/blob/main/{path})"

    return re.sub(r"(\]\()([^)\s#]+)\)", absolute, markdown)
