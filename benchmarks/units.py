"""Numbers as they stand in tables, and names as they stand in files."""

from __future__ import annotations

import re


def milliseconds(seconds: float) -> str:
    return three_digits(seconds * 1e3)


def microseconds(seconds: float) -> str:
    return three_digits(seconds * 1e6)


def three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}" if size < 1e7 else f"{size / 1e6:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def rate(amount: float, limit: float) -> str:
    return f"{amount:.3g} ({percent(amount / limit)})"


def slug(name: str) -> str:
    """A processor's name as a part of file names: NVIDIA H200 -> nvidia-h200."""
    return "-".join(re.findall(r"[a-z0-9.]+", re.sub(r"\(r\)|\(tm\)|cpu|processor", " ", name.lower())))
