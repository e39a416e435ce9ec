"""Switches in the environment that choose between forms with the same bits. Each is on or off."""

from __future__ import annotations

import os

# Whether kernels run in Gluon where they have its form.
GLUON = "ORTHRUS_GLUON"
# Whether trees and blocks attend in the shared form on a GPU. Off until one has timed it: bench/LOG.md, 136.
SHARED = "ORTHRUS_SHARED"
_DEFAULTS = {GLUON: "on", SHARED: "off"}


def is_on(switch: str) -> bool:
    """What a switch says. Raises ValueError for another value than on or off."""
    said = os.environ.get(switch, _DEFAULTS[switch])
    if said not in ("on", "off"):
        raise ValueError(f"{switch} is on or off, not {said!r}: leave it out for {_DEFAULTS[switch]}")
    return said == "on"


def check_switches() -> None:
    """Raises ValueError where a switch is neither on nor off."""
    for switch in _DEFAULTS:
        is_on(switch)
