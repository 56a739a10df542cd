"""What the pictures share: colours."""

from __future__ import annotations

OWN = "#9aa0a6"
INK = "#2b2b2b"
CURVES = ("#c1432e", "#e0952b", "#2f7f73", "#33608f", "#7a4e8a")
