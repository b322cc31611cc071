"""A table as it is printed, and the formats it is printed in.

A `Sheet` is text only: lines of entries, each with the marks of its footnotes. What the figures are
and which notes they need is decided in `sweep.analysis.tables`; here they become Markdown, LaTeX,
HTML or a terminal's cells. Lines of a reference are subordinate to ours wherever the format has a
way to say so: greyed, and in Markdown in italics. In them, a weak entry is in a paler grey still
and slanted; Markdown has no grey, and leaves it to the entry's mark.

Labels, titles and notes are anybody's text: each format writes them so that they are text in it and
nothing else, and unprintable characters as escapes.
"""

from __future__ import annotations

import csv
import html
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fpt.printable import printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as Grid

Kind = Literal["ours", "reference", "baseline"]


@dataclass(frozen=True)
class Entry:
    """A text with the marks of its footnotes."""

    text: str
    marks: tuple[str, ...] = ()
    weak: bool = False
    """Not to be relied upon: set paler than the rest of its line."""
    said: str = ""
    """In words what the text says by its form alone, for those who hear a page: HTML has it."""
    cell: str = ""
    """What the figure is made of: an anchor of a page that lists it."""

    @property
    def plain(self) -> str:
        """Both, in characters: `98.0 ± 0.2 [a]`."""
        return self.text + (f" [{','.join(self.marks)}]" if self.marks else "")


@dataclass(frozen=True)
class Line:
    """A line of a sheet."""

    kind: Kind
    label: Entry
    entries: tuple[Entry, ...]
    """One for each column."""


@dataclass(frozen=True)
class Sheet:
    """A table, ready to be printed."""

    title: str
    corner: str
    """The name of what the lines are."""
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[tuple[str, str], ...]
    """(mark, text); a note about the whole table has no mark."""


class Footnotes:
    """Footnotes of a sheet, lettered as they come up, in reading order; each once."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """Return the mark of a footnote, which is made if its text is a new one: a, b ... z, aa, bb
        ...
        """
        number = len(self._marks)
        return self._marks.setdefault(text, chr(ord("a") + number % 26) * (number // 26 + 1))

    def lettered(self) -> tuple[tuple[str, str], ...]:
        """(mark, text) of each."""
        return tuple((mark, text) for text, mark in self._marks.items())


# --- Markdown -----------------------------------------------------------------------------------


def markdown(sheet: Sheet) -> str:
    """Return a table as GitHub's Markdown has them."""
    rows = [[_md(text) for text in (sheet.corner, *sheet.columns)]]
    rows.append([":--"] + ["--:"] * len(sheet.columns))
    for line in sheet.lines:
        texts = [_md(entry.plain) for entry in (line.label, *line.entries)]
        italic = line.kind == "reference"
        rows.append([f"*{text}*" if italic and text else text for text in texts])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [
        f"- {_md(f'[{mark}] ') + _md(text) if mark else _md_note(text)}"
        for mark, text in sheet.notes
    ]
    # Blanks beside the asterisks would not be bold, and asterisks alone a rule across the page.
    title = _md(sheet.title).strip()
    return "\n".join([f"**{title}**" if title else "", "", *lines, "", *notes, ""])


def _md(text: str) -> str:
    # What python-markdown does not take a backslash before is an entity. An underscore inside a
    # word is plain text already, and so are brackets that no address follows.
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    escaped = re.sub(r"[\\`*|]|(?<!\w)_|_(?!\w)|(?<=\])[(\[]", r"\\\g<0>", escaped)
    return escaped.replace("]:", "]&#58;").replace("~~", "&#126;&#126;")


def _md_note(text: str) -> str:
    # At the beginning of an item these would make a quotation, a heading, a rule or a list of it.
    return re.sub(r"^(\d*)([-+>#=~.)])", r"\1\\\2", _md(text).lstrip())


# --- LaTeX --------------------------------------------------------------------------------------

_TEX = {
    **{char: "\\" + char for char in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "†": r"\dag{}", "≈": r"$\approx$", "≠": r"$\neq$",
}  # fmt: skip


def latex(sheet: Sheet) -> str:
    r"""A `table` environment; it needs the packages booktabs and xcolor. Where it has letters that
    pdflatex has not, a comment says so and names the engines that do.
    """
    head = [sheet.corner, *sheet.columns]
    out = [
        r"% \usepackage{booktabs,xcolor}",
        *_engine(sheet),
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_tex(sheet.title)}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(sheet.columns)}}}",
        r"    \toprule",
        rf"    {' & '.join(_tex(text) for text in head)} \\",
        r"    \midrule",
    ]
    ruled = False
    for line in sheet.lines:
        if line.kind == "baseline" and not ruled:
            out.append(r"    \midrule")
            ruled = True
        texts = [_tex_entry(entry) for entry in (line.label, *line.entries)]
        if line.kind == "reference":
            entries = zip((line.label, *line.entries), texts, strict=True)
            texts = [_tex_grey(text, weak=entry.weak) for entry, text in entries]
            texts[0] = r"\quad " + texts[0]
        out.append(rf"    {' & '.join(texts)} \\")
    out += [r"    \bottomrule", r"  \end{tabular}", "", r"  \smallskip"]
    out += [r"  \begin{minipage}{\linewidth}\footnotesize\raggedright"]
    for mark, text in sheet.notes:
        sign = rf"\textsuperscript{{{_tex(mark)}}}" if mark else ""
        out.append(rf"    {sign}{_tex(text)}\par")
    return "\n".join([*out, r"  \end{minipage}", r"\end{table}", ""])


_LATIN = "ßæÆøØœŒłŁı§¶£©¡¿–—‘’“”…×·°µ²³¹½¼¾®ª¬÷€™"  # noqa: RUF001
# What pdflatex has without a package, besides ASCII and letters with an accent.


def _in_pdflatex(char: str) -> bool:
    if char.isascii() or char in _TEX or char in _LATIN:
        return True
    letter, *accents = list(unicodedata.normalize("NFD", char))
    # Of Latin-1 and Latin Extended-A; an ogonek takes fonts of another encoding.
    return "\xa0" < char < "\u0180" and letter.isascii() and accents not in ([], ["\u0328"])


def _engine(sheet: Sheet) -> list[str]:
    lines = (entry.text for line in sheet.lines for entry in (line.label, *line.entries))
    notes = (text for _, text in sheet.notes)
    every = "".join([sheet.title, sheet.corner, *sheet.columns, *lines, *notes])
    lacking = sorted({char for char in printable(every) if not _in_pdflatex(char)})
    if not lacking:
        return []
    shown = "".join(lacking[:10]) + ("..." if len(lacking) > 10 else "")
    return [
        f"% Compile with lualatex or xelatex: pdflatex lacks {shown}",
        r"% \usepackage{fontspec} \setmainfont{...}: a font that has them",
    ]


def _tex(text: str) -> str:
    # After the end of a row, a bracket or a star would be read as its argument. A hyphen before a
    # number is a minus.
    escaped = "".join(_TEX.get(char, char) for char in printable(text))
    escaped = re.sub(r"^\s*([\[*])", r"{\1}", escaped)
    return re.sub(r"(?<![\w)])-(?=\d)", "$-$", escaped)


def _tex_grey(text: str, *, weak: bool) -> str:
    if weak:
        return rf"\textcolor{{black!40}}{{\textit{{{text}}}}}"
    return rf"\textcolor{{black!55}}{{{text}}}" if text else ""


def _tex_entry(entry: Entry) -> str:
    marks = _tex(",".join(entry.marks))
    return _tex(entry.text) + (rf"\textsuperscript{{{marks}}}" if marks else "")


# --- HTML ---------------------------------------------------------------------------------------

CSS = """\
.fpt { --soft: light-dark(#5f6368, #a3a8ae); --weak: light-dark(#767676, #8c9196);
  font: 16px/1.5 system-ui, sans-serif; margin: 1rem 0; }
.fpt .scroll { overflow-x: auto; position: relative; }
.fpt table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.fpt caption { font-weight: 600; text-align: left; padding-bottom: .5rem; }
.fpt th, .fpt td { padding: .2rem .8rem; text-align: right; white-space: nowrap; }
.fpt th:first-child { text-align: left; padding-left: 0; }
.fpt th { font-weight: 500; }
.fpt thead tr { border-bottom: 2px solid; }
.fpt tbody tr.baseline { border-top: 1px solid; }
.fpt tbody tr.baseline ~ tr.baseline { border-top: 0; }
.fpt tr.reference th, .fpt tr.reference td { color: var(--soft); font-size: .875rem;
  font-weight: 400; padding-top: 0; }
.fpt tr.reference th { padding-left: 1rem; }
.fpt tr.reference td.weak { color: var(--weak); font-style: italic; }
.fpt sup { line-height: 0; }
.fpt .said { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
.fpt .notes { color: var(--soft); font-size: .875rem; margin-top: .5rem; max-width: 60rem; }
.fpt .notes p { margin: 0; }
"""
"""The style of `fragment`, for whoever puts it into a page of theirs."""


def fragment(sheet: Sheet, *, linked: bool = False) -> str:
    """Return a `figure` element; its style is `CSS`.

    Args:
        sheet: What to print.
        linked: Whether entries with a `cell` are links to that anchor, which the page has to have.
    """
    title = _text(sheet.title)
    # Who has no mouse scrolls what has the focus.
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
    out = ['<figure class="fpt">', scroll, "<table>", f"<caption>{title}</caption>"]
    heads = (f'<th scope="col">{_text(text)}</th>' for text in (sheet.corner, *sheet.columns))
    out += [f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
    for line in sheet.lines:
        cells = "".join(_html_cell(entry, linked=linked) for entry in line.entries)
        head = f'<th scope="row">{_html(line.label)}</th>'
        out.append(f'<tr class="{line.kind}">{head}{cells}</tr>')
    out += ["</tbody>", "</table>", "</div>", '<figcaption class="notes">']
    for mark, text in sheet.notes:
        sign = f"<sup>{_text(mark)}</sup> " if mark else ""
        out.append(f"<p>{sign}{_text(text)}</p>")
    return "\n".join([*out, "</figcaption>", "</figure>", ""])


def page(sheet: Sheet) -> str:
    """Return a page of its own, which needs nothing else."""
    head = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(sheet.title)}</title>",
        f"<style>\n:root {{ color-scheme: light dark; }}\n{CSS}</style>",
        "</head>",
        "<body>",
    ]
    return "\n".join([*head, fragment(sheet) + "</body>", "</html>", ""])


def _html_cell(entry: Entry, *, linked: bool) -> str:
    inner = _html(entry, linked=linked)
    return f'<td class="weak">{inner}</td>' if entry.weak else f"<td>{inner}</td>"


def _html(entry: Entry, *, linked: bool = False) -> str:
    marks = _text(",".join(entry.marks))
    text = _text(entry.text)
    if entry.said:
        text += f'<span class="said">, {_text(entry.said)}</span>'
    if linked and entry.cell and entry.text:
        text = f'<a href="#{_text(entry.cell)}">{text}</a>'
    return text + (f"<sup>{marks}</sup>" if marks else "")


def _text(text: str) -> str:
    return html.escape(printable(text))


# --- the terminal -------------------------------------------------------------------------------


WORD = 16
"""Characters of a label's word up to which a narrow terminal does not break it."""


def terminal(sheet: Sheet) -> Group:
    """Return what rich prints: a title, the table, the notes."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    styles = {"ours": "", "reference": "dim", "baseline": "italic"}
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    words = (word for line in sheet.lines for word in line.label.plain.split())
    least = min(max(map(len, words), default=0), WORD)
    grid.add_column(Text(printable(sheet.corner)), justify="left", min_width=least, overflow="fold")
    for number, column in enumerate(sheet.columns):
        # Wrapped between a figure and what stands after it, never inside the figure.
        widest = max((_figure_width(line.entries[number]) for line in sheet.lines), default=0)
        grid.add_column(Text(printable(column)), justify="right", min_width=widest, overflow="fold")
    before: Kind = "ours"
    for line in sheet.lines:
        if line.kind == "baseline" and before != "baseline":
            grid.add_section()
        before = line.kind
        indent = "  " if line.kind == "reference" else ""
        label = Text(indent + printable(line.label.plain))
        texts = [Text(printable(one.plain), "italic" if one.weak else "") for one in line.entries]
        grid.add_row(label, *texts, style=styles[line.kind])

    notes: Grid = Grid.grid(padding=(0, 1, 0, 0))
    for mark, text in sheet.notes:
        notes.add_row(Text(f"[{mark}]" if mark else ""), Text(printable(text)), style="dim")
    return Group(Text(printable(sheet.title), style="bold"), Text(), grid, Text(), notes)


def _figure_width(entry: Entry) -> int:
    return len(re.split(r" [(\[]", entry.plain)[0])


# --- CSV ----------------------------------------------------------------------------------------


def comma_separated(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as CSV, a line each below a line of names; a list is one field of it.

    Text that a spreadsheet would take for a formula (`=1+1`, `@SUM(1)`) begins with an apostrophe,
    by which spreadsheets know text; a number never does.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_field(name) for name in names])
    writer.writerows([_field(record.get(name)) for name in names] for record in records)
    return out.getvalue()


def _field(value: Any) -> Any:
    if isinstance(value, list | tuple):
        value = "; ".join(map(str, value))
    if not isinstance(value, str):
        return value
    value = printable(value, keep="\n")
    return f"'{value}" if value.lstrip()[:1] in FORMULA and not _is_number(value) else value


FORMULA = frozenset("=+-@＝＋－＠")  # noqa: RUF001 (the wide forms do as well)
"""What a formula of a spreadsheet begins with."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
