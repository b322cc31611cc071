"""Words in a table are words in every format: read back by parsers of others' making."""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import html5lib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from fpt.printable import UNPRINTABLE, printable
from sweep.analysis import typeset
from sweep.analysis.figures.style import clipped
from sweep.analysis.typeset import Entry, Line, Sheet, comma_separated

HOSTILE = [
    "two\nlines\t\u202ereversed \x1b[31mred",
    "\x1b]0;a title\x07",
    "<b>bold</b> <script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](http://x/y.png)",
    "[x][y]",
    "[y]: http://x/y",
    "a | b \\| c \\",
    "*a* _b_ `c` ~~d~~ & &lt; &#60;",
    "$x$ $$ \\input{/etc/passwd} %{}#^~",
    "naïve “quotes” — é ű ß",
    "\x00\x85\u2028\ufffe\ud800",
    "* star",
    "[a] in brackets",
    "# heading",
    "1. first",
    "> said",
    "=== ",
    "---",
    "    indented",
    "```",
    "- item",
]
WORDS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=("Cn", "Co", "Zs")), min_size=1, max_size=12),
    st.text("[]()<>*_`|\\~$&:!#-=+@ \n\x1b\u202eab1", min_size=1, max_size=12),
)


def sheet_of(text: str) -> Sheet:
    line = Line("ours", Entry(text), (Entry("1.0", ("a",)),))
    return Sheet(text, text, (text,), (line,), (("a", text), ("", text)))


def told(text: str) -> str:
    """What a reader sees of it: blanks at the ends and in a row count for nothing."""
    return " ".join(printable(text).split())


@given(WORDS)
def test_words_in_markdown_are_words(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(typeset.markdown(sheet_of(text)))
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {
        "text",
        "text_special",
        "strong_open",
        "strong_close",
        "softbreak",
    }
    blocks = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    table = {"table", "thead", "tbody", "tr", "th", "td"}
    assert blocks <= {"paragraph", "inline", "bullet_list", "list_item"} | table
    cells = [
        " ".join("".join(child.content for child in token.children or ()).split())
        for before, token in itertools.pairwise(tokens)
        if before.type in ("th_open", "td_open")
    ]
    assert cells == [told(text), told(text), told(text), "1.0 [a]"]


def test_words_in_markdown_are_no_tags_where_a_backslash_escapes_none() -> None:
    # python-markdown takes a backslash before few characters, and passes other tags on.
    for text in HOSTILE:
        assert "<" not in typeset.markdown(sheet_of(text))


@given(WORDS)
def test_words_in_html_are_words(text: str) -> None:
    root = html5lib.parse(typeset.page(sheet_of(text)), namespaceHTMLElements=False)
    assert {one.tag for one in root.find("body").iter()} == {
        "body", "figure", "div", "table", "caption", "thead", "tr", "th", "tbody", "td", "sup",
        "figcaption", "p",
    }  # fmt: skip
    assert root.find(".//caption").text == printable(text)
    assert root.find(".//div").get("aria-label") == printable(text)
    fragment = ElementTree.fromstring(typeset.fragment(sheet_of(text)))  # as XML, too
    assert fragment.find(".//caption").text == printable(text)  # type: ignore[union-attr]


@given(WORDS)
def test_words_on_a_terminal_are_no_commands(text: str) -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(typeset.terminal(sheet_of(text)))
    assert not UNPRINTABLE.search(out.getvalue().replace("\n", ""))


@given(st.lists(st.one_of(WORDS, st.integers(), st.floats(allow_nan=False)), min_size=1))
def test_csv_holds_no_formula_and_the_same_fields(values: list[object]) -> None:
    names = [f"c{number}" for number in range(len(values))]
    text = comma_separated(names, [dict(zip(names, values, strict=True))])
    ((*read,),) = list(csv.reader(io.StringIO(text)))[1:]
    for value, field in zip(values, read, strict=True):
        assert field.removeprefix("'") == printable(str(value), keep="\n").removeprefix("'")
        if field.lstrip()[:1] in set("=+-@"):
            float(field)


def test_numbers_and_names_of_csv_stay() -> None:
    text = comma_separated(["a", "=b"], [{"a": "-1.5", "=b": ["x", 2]}, {"a": -1e-5, "=b": None}])
    assert text == "a,'=b\n-1.5,x; 2\n-1e-05,\n"


@given(WORDS)
def test_words_in_a_figure_are_words(text: str) -> None:
    figure = Figure()
    drawn = figure.text(0, 0, clipped(text, 40))
    assert drawn._preprocess_math(drawn.get_text())[1] is False  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_latex_of_hostile_words_compiles(tmp_path: Path) -> None:
    body = "\n".join(typeset.latex(sheet_of(text)) for text in HOSTILE)
    assert "lualatex" not in body
    head = r"\documentclass{article}\usepackage{booktabs,xcolor}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{body}\n\\end{{document}}\n")
    ran = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert "passwd" in body


@pytest.mark.parametrize("text", ["προεκπαίδευση", "預訓練", "предобучение", "ą"])
def test_latex_names_the_engine_for_letters_that_pdflatex_lacks(text: str) -> None:
    text_ = typeset.latex(sheet_of(text))
    assert re.search(r"^% Compile with lualatex or xelatex: pdflatex lacks \S", text_, re.MULTILINE)
    assert text in html.unescape(text_)
