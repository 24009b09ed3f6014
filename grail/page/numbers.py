"""Numbers as a person reads them."""

from __future__ import annotations


def short(value: float | None, digits: int = 4) -> str:
    """So many significant digits, below a million at least those before the point; exponents without padding; a dash
    for None."""
    if value is None:
        return "–"
    if 10**digits <= abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    return power(value, digits)


def power(value: float, digits: int) -> str:
    """So many significant digits, with an exponent where there are more before the point."""
    mantissa, _, exponent = format(float(value), f".{digits}g").partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa.replace("-", "−", 1)


def whole(value: float | None) -> str:
    """With commas between thousands."""
    return "–" if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """91.2 %."""
    return "–" if share is None else f"{100 * share:.1f} %"


def change(before: float | None, after: float | None) -> str:
    """−22.2 %, or nothing where it cannot be said."""
    if not before or after is None:
        return ""
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "−")


def seconds(value: float | None) -> str:
    """2 min 40 s; 3 h 5 min; 0.53 s."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.3g} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
