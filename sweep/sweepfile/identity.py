"""Identity: the ids of trials and of their cells.

A trial is a fact and belongs to no sweep: its id is a hash of everything that can change its
numbers. A cell is a trial without its seed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fpt.config import ADDED_FIELDS, TrialConfig
from fpt.spec import JSON

IDENTITY_VERSION = 2
"""Raised when ids change their meaning; it is part of every id."""

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)

_SEED = "\0seed\0"
# Stands for a seed in the canonical text of a trial. No field can hold it: a NUL is in no name and
# in no path.


def hashed(identity: JSON) -> JSON:
    """Return what of a trial's identity is hashed: all but added fields that do nothing there.

    Args:
        identity: As `TrialConfig.identity` gives it.
    """
    for path, old in ADDED_FIELDS.items():
        identity = _without(identity, path, old)
    return identity


def _without(identity: JSON, path: str, old: object) -> JSON:
    name, _, inner = path.partition(".")
    if inner and isinstance(identity.get(name), dict):
        return {**identity, name: _without(identity[name], inner, old)}
    same = not inner and name in identity and identity[name] == old
    return {key: value for key, value in identity.items() if key != name} if same else identity


def _canonical(identity: JSON) -> str:
    return _CANONICAL.encode({"identity_version": IDENTITY_VERSION, **hashed(identity)})


def _hash(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class CellIdentity:
    """The identity of a cell, of which the ids of its trials follow by their seeds."""

    cell_id: str
    _around_seed: tuple[str, ...]
    # The canonical text of a trial, cut where its seed belongs: to encode it once a cell is ten
    # times as fast as once a trial.

    @classmethod
    def of(cls, config: TrialConfig, identity: JSON) -> CellIdentity:
        """Return the identity of a trial's cell.

        Args:
            config: Any trial of the cell.
            identity: Its identity, or that of a trial which differs from it as all of the cell do.
        """
        # A backbone_seed that follows the seed is a draw that the cell's interval includes; a fixed
        # one is the same for the whole cell and belongs to it.
        fixed = None if config.drawn_from is None else config.backbone_seed
        follows = {"seed": _SEED}
        if config.drawn_from is not None and fixed is None:
            follows["backbone_seed"] = _SEED
        seedless = {name: value for name, value in identity.items() if name != "seed"}
        return cls(
            _hash(_canonical(seedless | {"backbone_seed": fixed})),
            tuple(_canonical(identity | follows).split(_CANONICAL.encode(_SEED))),
        )

    def trial_id(self, seed: int) -> str:
        """Return the id of the cell's trial with a seed."""
        return _hash(str(seed).join(self._around_seed))


def trial_id(config: TrialConfig) -> str:
    """Return the first 12 hex digits of the SHA-256 of all that can change the trial's numbers.

    Raises:
        DataError: If the content behind a path of the config has to be read and is not there.
    """
    return CellIdentity.of(config, config.identity()).trial_id(config.seed)


def cell_id(config: TrialConfig) -> str:
    """Return the id of a trial's cell: the trial without its seed, nor a backbone_seed that
    follows it.

    Raises:
        DataError: As `trial_id`.
    """
    return CellIdentity.of(config, config.identity()).cell_id
