"""A page in a real browser: it loads without errors, sorts, filters, leads from graph to table, and fits a phone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import quant2e
from lowering.bench.command import Row
from lowering.bench.worker import Footprint
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]

SLY = "<img src=x onerror=alert(1)>"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.softmax(self.head((x + self.branch(x)).mean((2, 3))), -1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("page") / "report.html"
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    inputs = (torch.randn(2, 3, 8, 8),)
    model = Net().eval()
    result = quant2e.quantize(model, inputs, quantizer, [inputs[0]] * 3, min_sqnr_db=None)
    sensitivity = quant2e.sensitivity(model, inputs, quantizer, [inputs[0]] * 3)
    rows = [
        Row(path=path.with_name(name), size=10, footprint=Footprint(load_ms=1.0, peak_mb=2.0), medians={1: ms},
            ratios={1: 1.0})
        for name, ms in (("float.pte", 10.0), ("int8.pte", 9.0))
    ]  # fmt: skip
    result.report.to_html(path, sensitivity, rows, title=SLY)
    return path, result.report


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the extra dev")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def opened(page, driver):
    driver.set_window_size(1100, 900)
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page[0].as_uri())
    return driver


def cells(driver, table, column):
    """What stands in a column of the rows that are shown."""
    shown = "[...document.querySelectorAll(arguments[0])].filter(row => !row.hidden)"
    script = f"return {shown}.map(row => row.cells[{column}].textContent)"
    return driver.execute_script(script, f"#{table} tbody tr")


def table_of(driver, title):
    found = "[...document.querySelectorAll('section')].find(s => s.querySelector('h2').textContent == arguments[0])"
    return driver.execute_script(f"return {found}.querySelector('table').id", title)


def test_it_loads_without_errors_and_asks_for_nothing_else(opened, page):
    assert opened.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page[0].as_uri()}
    assert opened.title == SLY
    assert opened.find_elements("css selector", "img") == []
    shown = [title.text for title in opened.find_elements("css selector", "h2")]
    assert shown[:4] == ["Summary", "Ops", "Graph", "Worst tensors"]
    assert shown[-2:] == ["Sensitivity", "Latency"]


def test_tables_sort_by_number_and_by_word(opened, page):
    table = table_of(opened, "Ops")
    buttons = opened.find_elements("css selector", f"#{table} thead button")
    macs = [v.op.macs for v in page[1].verdicts]
    buttons[5].click()
    assert [int(cell.replace(",", "")) for cell in cells(opened, table, 5)] == sorted(macs)
    buttons[5].click()
    assert [int(cell.replace(",", "")) for cell in cells(opened, table, 5)] == sorted(macs, reverse=True)
    buttons[0].click()
    names = cells(opened, table, 0)
    assert names == sorted(names)
    latency = table_of(opened, "Latency")
    opened.find_elements("css selector", f"#{latency} thead button")[4].click()
    assert cells(opened, latency, 0) == ["int8.pte", "float.pte"]


def test_tables_are_searched_and_filtered(opened, page):
    table = table_of(opened, "Ops")
    tools = opened.find_element("css selector", f"[data-table={table}]")
    search = tools.find_element("css selector", "input")
    search.send_keys("CONV2d static")
    assert set(cells(opened, table, 0)) == {v.op.name for v in page[1].verdicts if "conv2d" in v.op.target}
    assert tools.find_element("css selector", ".count").text == f"2 of {len(page[1].verdicts)}"
    search.clear()
    search.send_keys(" ")
    tools.find_element("css selector", "select option[value=float]").click()
    assert cells(opened, table, 0) == [v.op.name for v in page[1].verdicts if v.kind == "float"]


def test_the_graph_leads_to_the_row_of_an_op(opened):
    link = opened.find_elements("css selector", ".graph a")[0]
    opened.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", link)
    row = opened.execute_script("return document.querySelector('tr:target').cells[0].textContent")
    assert row == "conv2d"


def test_a_phone_shows_it_without_scrolling_the_page_sideways(opened):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        width = opened.execute_script("return document.documentElement.scrollWidth")
        assert width == 375
        assert (
            opened.execute_script("return document.querySelector('.tools input').getBoundingClientRect().height") >= 40
        )
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
