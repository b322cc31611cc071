"""Sweep files to begin with, which `sweep init` writes: one for each kind of question."""

from __future__ import annotations

from importlib import resources

QUESTIONS = {
    "modality": "what it was pretrained on",
    "what-trains": "which of its parts train",
    "size": "how large it is",
    "tuned": "a contrast with a tuned learning rate in each arm",
    "quickstart": "the paper's table 2 in small",
}
"""Template -> what its sweep asks about a transformer."""


def text(template: str, name: str) -> str:
    """Return the text of a sweep file.

    Args:
        template: A key of `QUESTIONS`.
        name: The name of the sweep.
    """
    file = resources.files(__name__) / f"{template}.yaml"
    return file.read_text(encoding="utf-8").replace("sweep: NAME\n", f"sweep: {name}\n", 1)
