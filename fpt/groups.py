"""Parameter name -> group, checked to be exhaustive; what trains, what is frozen, the counts.

Names here are canonical: `input.weight`, `output.bias`, and `backbone.` before the backbone's own
name, without the number of a member.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod

from fpt.backbones import Group
from fpt.config import BackboneConfig, TrainSet

PREFIX = "backbone."
"""What canonical names have before a backbone's own name."""


def assign(names: Iterable[str], backbone: BackboneConfig) -> dict[str, Group]:
    """The group of every parameter.

    Args:
        names: Canonical names.
        backbone: Whose rules hold.

    Raises:
        ValueError: If a parameter of the backbone matches no rule.
    """
    groups: dict[str, Group] = {}
    unmatched = []
    for name in names:
        if name.startswith(PREFIX):
            own = name.removeprefix(PREFIX)
            group = backbone.row.group(own)
        else:
            group = "input" if name.startswith("input.") else "output"
        if group is None:
            unmatched.append(name)
        else:
            groups[name] = group
    if unmatched:
        raise ValueError(
            f"backbone {backbone.name}: no group for {', '.join(sorted(unmatched))}; add rules to "
            "backbone.groups, as {regular expression: group}"
        )
    return groups


def trained(
    groups: Mapping[str, Group], train: Iterable[TrainSet], backbone: BackboneConfig
) -> set[str]:
    """The names of the parameters that train.

    Raises:
        ValueError: If the backbone has no parameter in a group that should train.
    """
    chosen: set[str] = set()
    last = re.compile(backbone.row.layer)
    for part in train:
        group, _, only_last = part.partition(":")
        members = {name for name, its in groups.items() if its == group}
        if only_last:
            members = {
                name
                for name in members
                if (found := last.search(name.removeprefix(PREFIX)))
                and int(found.group(1)) == backbone.layers - 1
            }
        if not members:
            raise ValueError(
                f"train: {backbone.name} has no parameter in group {part!r}; it has "
                f"{', '.join(sorted(set(groups.values())))}"
            )
        chosen |= members
    return chosen


def counts(
    groups: Mapping[str, Group], shapes: Mapping[str, tuple[int, ...]], trains: set[str]
) -> dict[str, dict[str, int]]:
    """Group -> tensors, parameters, and how many of the parameters train."""
    table: dict[str, dict[str, int]] = {}
    for name, group in sorted(groups.items()):
        row = table.setdefault(group, {"tensors": 0, "parameters": 0, "trained": 0})
        size = prod(shapes[name])
        row["tensors"] += 1
        row["parameters"] += size
        row["trained"] += size if name in trains else 0
    return table
