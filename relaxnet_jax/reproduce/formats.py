"""Numbers formatted for people."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """Formats a number with ``digits`` significant digits; a dash for None and non-finite numbers.

    Powers of ten appear only below 1e-4 and from 1e6 on.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{_decimals(size, digits)}f}"


def with_deviation(mean: float, deviation: float | None, digits: int = 3) -> str:
    """Formats a mean with its deviation, such as "12.3 ± 0.4".

    The mean has ``digits`` significant digits, and one more decimal if the deviation needs it.
    """
    if deviation is None or not math.isfinite(mean) or not 1e-4 <= abs(mean) < 1e6:
        return number(mean, digits)
    decimals = _decimals(abs(mean), digits)
    if deviation > 0:
        decimals = max(decimals, min(_decimals(deviation, 1), decimals + 1))
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def percent_change(ratio: float) -> str:
    """Formats the ratio 1.123 as "+12.3 %"; a dash if there is nothing to compare."""
    return f"{100 * (ratio - 1):+.1f} %" if math.isfinite(ratio) else "–"


def _decimals(size: float, digits: int) -> int:
    return max(digits - 1 - math.floor(math.log10(size)), 0)
