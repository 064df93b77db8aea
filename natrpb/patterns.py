"""Which keys a query sees, per axis: the five numbers that every op of the library takes.

One axis of length L is split into `dilation` residue groups: position i belongs to group g = i mod d with in-group index
p = i div d, and the group holds Lg = ceil((L - g) / d) positions. Inside its group query p sees one interval of keys:

    neighborhood   K keys from clamp(leader - K // 2, 0, Lg - K),         leader = min((p // s) * s + s // 2, Lg - 1)
    causal         max(leader - K + 1, 0) .. p,                           leader = min((p // s) * s + s - 1, Lg - 1)
    window         max(b * K + shift, 0) .. min((b + 1) * K + shift, Lg) - 1,      b = floor((p - shift) / K)

with kernel size (or window size) K and stride s; s = 1 makes every query its own leader. `csrc/include/natrpb/geometry.h`
holds the same rules for the compiled code.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

NEIGHBORHOOD, CAUSAL, WINDOW = 0, 1, 2
MOST_SLOTS = 2**31  # of one query in the compiled ops


class Pattern(NamedTuple):
    """The attention pattern of one op call: five tuples with one integer per spatial axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kind: tuple[int, ...]  # NEIGHBORHOOD, CAUSAL or WINDOW
    shift: tuple[int, ...]  # used by WINDOW axes only, 0 <= shift < kernel_size

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    @property
    def num_slots(self) -> int:
        """Most keys that one query can see; the last axis of unfused attention weights."""
        slots = 1
        for k in self.kernel_size:
            slots *= k
        return slots

    @property
    def rpb_shape(self) -> tuple[int, ...]:
        """Shape of one head's bias table, (2 K_0 - 1, ...)."""
        return tuple([2 * k - 1 for k in self.kernel_size])


def per_axis(name: str, given, ndim: int, kind: type = int) -> tuple:
    """Spreads a scalar over `ndim` axes, or checks that a sequence has one `kind` per axis.

    Raises:
        ValueError: a sequence of another length.
        TypeError: something that is neither a `kind` nor a sequence of them.
    """
    if type(given) is kind:  # NB: the usual cases first; a small call is shorter than elaborate checks of it
        return (given,) * ndim
    if type(given) is tuple and list(map(type, given)) == [kind] * ndim:
        return given
    if _is_one(given, kind):
        return (_plain(given, kind),) * ndim
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != ndim:
            raise ValueError(f"{name} must be one {kind.__name__} or {ndim} of them, got {len(given)}: {given!r}")
        if all(_is_one(item, kind) for item in given):
            return tuple(_plain(item, kind) for item in given)
    raise TypeError(f"{name} must be {kind.__name__} or a sequence of {ndim} {kind.__name__}, got {given!r}")


def _is_one(item, kind: type) -> bool:
    if kind is bool or isinstance(item, bool):
        return kind is bool and isinstance(item, bool)
    return isinstance(item, (int, numbers.Integral))  # NB: int first, which is found faster


def _plain(item, kind: type):
    """NumPy's numbers as Python's; a compiler's symbolic ones stay what they are."""
    return item if isinstance(item, kind) else kind(item)


def neighborhood_pattern(ndim: int, kernel_size, stride=1, dilation=1, is_causal=False) -> Pattern:
    """Builds and checks the pattern of a (dilated, strided, causal) neighborhood attention.

    Raises:
        ValueError: kernel_size < 1, dilation < 1, or stride outside [1, kernel_size].
        TypeError: arguments of another type.
    """
    kernel_size = per_axis("kernel_size", kernel_size, ndim)
    stride = per_axis("stride", stride, ndim)
    dilation = per_axis("dilation", dilation, ndim)
    causal = per_axis("is_causal", is_causal, ndim, bool)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation)):
        if k < 1:
            raise ValueError(f"kernel_size must be at least 1, got {k} on axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on axis {axis}")
        if not 1 <= s <= k:
            raise ValueError(f"stride must be between 1 and kernel_size ({k}), got {s} on axis {axis}")
    kind = tuple([CAUSAL if c else NEIGHBORHOOD for c in causal])
    return Pattern(kernel_size, stride, dilation, kind, (0,) * ndim)


def window_pattern(ndim: int, window_size, shift_size=0) -> Pattern:
    """Builds and checks the pattern of (shifted) windowed attention.

    Raises:
        ValueError: window_size < 1 or larger than `MOST_SLOTS` over all axes, or shift_size outside [0, window_size).
        TypeError: arguments of another type.
    """
    window = per_axis("window_size", window_size, ndim)
    shift = per_axis("shift_size", shift_size, ndim)
    for axis, (w, s) in enumerate(zip(window, shift)):
        if w < 1:
            raise ValueError(f"window_size must be at least 1, got {w} on axis {axis}")
        if not 0 <= s < w:
            raise ValueError(f"shift_size must be between 0 and window_size - 1 ({w - 1}), got {s} on axis {axis}")
    if math.prod(window) > MOST_SLOTS:
        raise ValueError(f"window_size must span at most {MOST_SLOTS} positions over all axes, got {list(window)}")
    ones = (1,) * ndim
    return Pattern(window, ones, ones, (WINDOW,) * ndim, shift)


def check_fits(pattern: Pattern, spatial: Sequence[int]) -> None:
    """Raises ValueError where a neighborhood axis is shorter than kernel_size * dilation.

    Windows fit any length, and an empty map holds no query that could miss a key.
    """
    for axis, (length, k, d, kind) in enumerate(zip(spatial, pattern.kernel_size, pattern.dilation, pattern.kind)):
        if k * d > length and kind != WINDOW and 0 not in spatial:
            raise ValueError(
                f"kernel_size * dilation must not exceed the input's length on every axis, got {k} * {d} > {length} "
                f"on axis {axis}"
            )
