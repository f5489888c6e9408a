"""All rows, in the catalogue's order: importing the modules that hold them enters them."""

from tests.chaos import (  # noqa: F401
    elastic,
    hostile_data,
    hostile_weights,
    hostile_words,
    numerics,
    order,
    resuming,
    saving,
    serving,
    shards,
    stopping,
)
from tests.chaos.rows import ENTERED, Row

ROWS: dict[str, Row] = {
    name: ENTERED[name] for name in sorted(ENTERED, key=lambda name: ("CRDS".index(name[0]), int(name[1:])))
}
"""By the catalogue's number."""
