"""The number of a sender's buckets. It stands apart from `protocol` because the planner counts them and loads no torch."""

from __future__ import annotations

SLOTS = 3
"""Buckets of a sender that may be under way: one is filled, one on its way or waiting, one loaded."""
