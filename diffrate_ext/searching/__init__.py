"""The rate search: the loop, its checkpoints, what it tells and draws."""

from __future__ import annotations

from .loop import SearchResult, SearchSettings, check_target, run_search, search

__all__ = ["SearchResult", "SearchSettings", "check_target", "run_search", "search"]
