"""The page on backbones has the table that the rules make."""

from __future__ import annotations

from pathlib import Path

from fpt.backbones.families import FAMILIES, Family

PAGE = Path(__file__).parents[3] / "docs/backbones.md"


def made_of_the_rules() -> str:
    """One row a family, its model_types together."""
    kinds: dict[str, list[str]] = {}
    for kind, family in FAMILIES.items():
        kinds.setdefault(family.title, []).append(f"`{kind}`")
    lines = [
        "| family | model_type | sees | groups | left out |",
        "| :-- | :-- | :-- | :-- | :-- |",
    ]
    for title, names in kinds.items():
        family: Family = next(f for f in FAMILIES.values() if f.title == title)
        groups = {group for _, group in family.groups} - {"token"}
        left_out = dict.fromkeys(what for _, what in family.left_out)
        alone = " (packs of one)" if family.alone else ""
        lines.append(
            f"| {title}{alone} | {', '.join(names)} | {family.words} | "
            f"{', '.join(sorted(groups))} | {', '.join(left_out)} |"
        )
    return "\n".join(lines)


def test_the_page_has_the_table_of_the_rules() -> None:
    assert made_of_the_rules() in PAGE.read_text(encoding="utf-8")
