"""Pages that are made from the code at each build, so that they cannot fall behind it.

The reference of the sweep file comes from the JSON Schema, the one of the command line from the
commands, the one of the Python API from the public names. The page of findings is that of
results/published.
"""

from __future__ import annotations

import html
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

Schema = dict[str, Any]

PUBLISHED = Path(__file__).parents[1] / "results/published"
"""Where measured tables lie, and the page that sums them up."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {"sweep-file": sweep_file(), "cli": command_line(), "python": python_names()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "findings.md", content=findings()))
    return files


def findings() -> str:
    """Return the page of what was measured, which lies beside the rows that it was made of."""
    text = (PUBLISHED / "README.md").read_text(encoding="utf-8")
    # What lies in the repository alone is named, not linked: the site does not have it.
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def command_line() -> str:
    """Return the page of all commands, as Typer writes it, with whole sentences in its list."""
    import typer
    from typer.cli import get_docs_for_click

    from sweep.cli import app

    command = typer.main.get_command(app)
    said = {name: one.get_short_help_str(200) for name, one in command.commands.items()}
    page: str = get_docs_for_click(obj=command, ctx=typer.Context(command), name="sweep")
    page = re.sub(r"^\* `(\w+)`: .*$", lambda m: f"* `{m[1]}`: {said[m[1]]}", page, flags=re.M)
    return page.replace("# `sweep`", "# Command line", 1)


def python_names() -> str:
    """Return the page of the public names of both packages."""
    lines = ["# Python API", ""]
    for package in ("sweep", "fpt"):
        module = importlib.import_module(package)
        lines += [f"## {package}", "", (module.__doc__ or "").split("\n\n")[0], ""]
        for name in module.__all__:
            if not name.startswith("__"):
                lines += [f"::: {package}.{name}", ""]
    return "\n".join(lines)


def sweep_file() -> str:
    """Return the page of every field of a sweep file."""
    from sweep.sweepfile.json_schema import json_schema

    schema: Schema = json_schema()
    lines = [
        "# Every field of a sweep file",
        "",
        "Made from the models that read the file. `sweep schema` prints the same as JSON Schema,",
        "for editors that complete and check.",
        "",
    ]
    parts = {"The file": schema} | schema.get("$defs", {})
    for name, part in parts.items():
        if "properties" in part:
            lines += [f"## {name}", "", _text(part.get("description", "")), ""]
            lines += ["| field | type | default | meaning |", "| :-- | :-- | :-- | :-- |"]
            lines += [_row(field, own, part) for field, own in part["properties"].items()]
            lines.append("")
    return "\n".join(lines)


def _row(name: str, field: Schema, part: Schema) -> str:
    default = "required" if name in part.get("required", ()) else ""
    if field.get("default") not in (None, "", [], {}):
        default = f"`{json.dumps(field['default'])}`".replace("|", "\\|")
    kinds = " or ".join(dict.fromkeys(_types(field)))
    return f"| `{name}` | {kinds} | {default} | {_text(field.get('description', ''))} |"


def _types(field: Schema) -> Iterator[str]:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield f"[{name}](#{name.lower()})"
    for kind in ("anyOf", "oneOf", "allOf"):
        for one in field.get(kind, ()):
            yield from _types(one)
    if "enum" in field or "const" in field:
        yield from (f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif field.get("type") == "array":
        inner = " or ".join(dict.fromkeys(_types(field.get("items") or {}))) or "anything"
        yield f"list of {inner}"
    elif isinstance(field.get("type"), str):
        yield field["type"]


def _text(words: str) -> str:
    return html.escape(" ".join(words.split()), quote=False).replace("|", "\\|")
