"""Compression of a model by a schedule: in place or as a copy, and what it costs."""
