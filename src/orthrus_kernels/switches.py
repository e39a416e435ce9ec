"""The switch in the environment that chooses between forms with the same bits."""

from __future__ import annotations

import os

GLUON = "ORTHRUS_GLUON"


def gluon_is_on() -> bool:
    """Whether kernels run in Gluon where they have its form. Raises ValueError where ORTHRUS_GLUON is neither
    on nor off."""
    said = os.environ.get(GLUON, "on")
    if said not in ("on", "off"):
        raise ValueError(f"{GLUON} is on or off, not {said!r}: leave it out for on")
    return said == "on"
