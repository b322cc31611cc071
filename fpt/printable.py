"""Text that may come from anywhere, made safe to print.

A label, a message of an error or a value of a query may hold characters that are commands to a
terminal (ESC), that reverse what stands after them (U+202E), or that no XML may hold. `printable`
shows them as Python would write them, so that nothing is lost and nothing is obeyed.
"""

from __future__ import annotations

import re

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, line feed and tab among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction (Unicode's Bidi_Control)
    "\u2028\u2029"  # other line and paragraph separators
    "\ufff9-\ufffb"  # interlinear annotation, which hides a text
    "\ud800-\udfff\ufffe\uffff]"  # surrogates and noncharacters, which neither UTF-8 nor XML has
)
"""Characters that are no text."""


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text with each unprintable character written as an escape: `\x1b`, `\u202e`.

    Args:
        text: Any text.
        keep: Unprintable characters that stay: `"\n\t"` for a text of several lines.
    """

    def escaped(found: re.Match[str]) -> str:
        char = found[0]
        return char if char in keep else char.encode("unicode_escape").decode("ascii")

    return UNPRINTABLE.sub(escaped, text)
