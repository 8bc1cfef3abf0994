"""Pages: what is shown, escaped; one file that loads nothing; refused before anything is written."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest

from quant2e.errors import Quant2eError
from quant2e.page.render import page_text, sections_of, write_page
from quant2e.page.section import DotChart, FlowChart, FlowNode, PageSection, RangeChart, ScatterChart

SLY = "</script><script>alert(1)</script>\"'&$x$"
SECTION = PageSection(
    title=SLY,
    lines=(SLY,),
    headers=("op", SLY, "n"),
    rows=((SLY, "a", 12345), ("second", "b", float("inf"))),
    filters=(SLY,),
    charts=(
        DotChart(title=SLY, unit=SLY, names=(SLY, "y"), series={SLY: (1.0, float("inf")), "b": (2.0, 3.0)}),
        RangeChart(title=SLY, low=-1.0, high=1.0, counts=(1, 20, 3), chosen=(-0.5, 0.5)),
        ScatterChart(title=SLY, x=SLY, y="y", points=((1.0, 2.0), (2.0, 3.0)), labels=(SLY, "2"), front=(0, 1)),
        FlowChart(title=SLY, nodes=(FlowNode(id=SLY, label=SLY, kind="float", detail=SLY),)),
    ),
    data={"name": SLY},
)


class Shown:
    def __init__(self, *sections):
        self.sections = sections

    def page_sections(self):
        return self.sections


@pytest.fixture(scope="module")
def text():
    return page_text(SLY, [SECTION], "report.json")


def test_text_is_text_wherever_it_stands(text):
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    assert text.count(html.escape(SLY, quote=False).replace('"', "&#34;").replace("'", "&#39;")) >= 5


def test_the_json_is_what_was_given(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(found[1]) == {"title": SLY, "parts": [{"title": SLY, "data": {"name": SLY}}]}


def test_only_the_script_of_the_page_runs_and_nothing_is_loaded(text):
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    told = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{told}'" in text
    linked = set(re.findall(r"""(?:src|href)=["']([^"'#]+)""", text)) | set(re.findall(r"url\(([^#)]+)\)", text))
    assert linked == {"data:,"}


def test_numbers_sort_by_value_and_words_can_be_chosen(text):
    assert '<td class="n" data-value="12345">12,345</td>' in text
    assert '<td class="n" data-value="1e308">inf</td>' in text
    assert '<option value="a">a</option>' in text
    assert re.search(r'<a href="#row-1-0"><circle', text), "the graph leads to the row of the op"


def test_equal_sections_give_equal_bytes():
    assert page_text("t", [SECTION], "x.json") == page_text("t", [SECTION], "x.json")


def test_rows_of_many_are_one_table_where_they_say_so_and_titles_differ():
    row = {"title": "Latency", "headers": ("p", "ms"), "joined": True}
    rows = [PageSection(rows=(("a", 1.0),), data=[1], **row), PageSection(rows=(("b", 2.0),), data=[2], **row)]
    other = PageSection(title="Program")
    found = sections_of([[Shown(rows[0]), Shown(other)], (Shown(rows[1], other),)])
    assert [section.title for section in found] == ["Latency", "Program", "Program (2)"]
    assert found[0].rows == (("a", 1.0), ("b", 2.0))
    assert found[0].data == [1, 2]


def test_what_cannot_be_shown_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("before")
    with pytest.raises(Quant2eError, match="a page shows reports, comparisons.* not a int"):
        write_page(path, "t", [Shown(), 3])
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(ValueError, match="every row has 1 cells"):
        PageSection(title="x", headers=("a",), rows=((1, 2),))


@pytest.mark.parametrize(("module", "said"), [("jinja2", "rendered by jinja2"), ("matplotlib", "drawn by matplotlib")])
def test_a_library_that_is_missing_is_named(module, said, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(Quant2eError, match=rf"{said}, which is not installed: pip install 'quant2e\[html\]'"):
        write_page(tmp_path / "r.html", "t", [Shown(SECTION)])
    assert [*tmp_path.iterdir()] == []
