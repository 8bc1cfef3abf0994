"""HTML tables for notebooks.

``html_table(headers, rows, caption)``: every cell is text and is escaped; numbers stand to the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table as HTML. ``caption``: lines of text above it. Cells that are numbers are aligned to the right."""
    title = f'<caption style="{_TITLE}">{escape(caption)}</caption>' if caption else ""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_TITLE = "caption-side: top; text-align: left; white-space: pre-line"


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    side = "right" if number else "left"
    return f'<td style="text-align: {side}">{escape(str(value))}</td>'
