"""HTML tables: text is text, whatever it holds."""

from quant2e.report.html import html_table

LEFT, RIGHT = '<td style="text-align: left">', '<td style="text-align: right">'


def test_cells_headers_and_caption_are_escaped_and_numbers_stand_right():
    text = html_table(["op", "a & b"], [["<script>", 3], ['"', 0.5]], "two\n<lines>")
    assert text == (
        '<table><caption style="caption-side: top; text-align: left; white-space: pre-line">'
        "two\n&lt;lines&gt;</caption>"
        "<thead><tr><th>op</th><th>a &amp; b</th></tr></thead><tbody>"
        f"<tr>{LEFT}&lt;script&gt;</td>{RIGHT}3</td></tr><tr>{LEFT}&quot;</td>{RIGHT}0.5</td></tr></tbody></table>"
    )


def test_a_table_without_rows_or_caption():
    assert html_table(["op"], []) == "<table><thead><tr><th>op</th></tr></thead><tbody></tbody></table>"
