"""How sure a counted share is."""

import math

Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Bounds in [0, 1] of the 95 % interval around successes / n, n > 0 (Wilson 1927, eq. 7)."""
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
