"""Links from a page out of ``docs/``, which MkDocs does not know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LINK_OUT = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Lead ``[text](../file)``, which works on GitHub, to the repository; where that has no URL, name the file.

    Raises:
        FileNotFoundError: the repository has no such file.
    """

    def resolved(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to ../{path}, which does not exist")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if text.strip("`/") == path else f"{text} (`{path}`)"

    return _LINK_OUT.sub(resolved, markdown)
