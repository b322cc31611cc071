from __future__ import annotations

import ast
import unicodedata
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from fpt.printable import UNPRINTABLE, printable

ANYTHING = st.text(st.characters(exclude_categories=()))


@given(ANYTHING)
def test_what_is_printed_obeys_nothing_and_loses_nothing(text: str) -> None:
    shown = printable(text)
    assert not [
        char
        for char in shown
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI")
        or unicodedata.bidirectional(char) in ("FSI", "PDI")
    ]
    shown.encode()
    ElementTree.fromstring(f"<a>{shown.replace('&', '&amp;').replace('<', '&lt;')}</a>")
    # Python itself reads the escapes back, where the text has no backslash of its own.
    if "\\" not in text:
        quoted = shown.replace('"', '\\"')
        assert ast.literal_eval(f'"{quoted}"') == text


@given(ANYTHING)
def test_printing_twice_is_printing_once(text: str) -> None:
    assert printable(printable(text)) == printable(text)


def test_text_of_any_script_stays() -> None:
    for text in ("naïve ± †", "預訓練", "προεκπαίδευση", "مدرّب مسبقًا", "नमस्ते", "👩‍🔬", "می‌خواهم"):
        assert printable(text) == text
    assert printable("a\tb\nc\x1b", keep="\n\t") == "a\tb\nc\\x1b"
    assert UNPRINTABLE.search("\u202e")
