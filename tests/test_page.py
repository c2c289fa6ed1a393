"""report.html in a real Chromium: no error, every control works, and it stays readable whatever the run holds."""

import html
import importlib.util
import json
import os
import re
import shutil

import pytest

from bitladder.errors import OutputError
from bitladder.report import build_report, render_html, render_markdown, write_figures, write_report
from bitladder.report.numbers import markdown_table
from bitladder.report.page import html_table, inline, plot_data
from test_planning import measurement_of
from test_report import PREFIX, make_evaluation, make_manifest, make_measurement, make_report, make_scheme, tables
from test_report_evidence import make_evidence, report_with
from test_report_runtimes import MISSING, make_probe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = (390, 800), (1280, 900)


@pytest.fixture(scope="module")
def chromium():
    """A running browser."""
    if CHROMIUM is None:
        if os.environ.get("BITLADDER_REQUIRE_CHROMIUM"):
            pytest.fail("BITLADDER_REQUIRE_CHROMIUM is set, but there is no chromium on the path")
        pytest.skip("no chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a report; at the end nothing may have been said on the console, nor asked of the network."""
    said, asked, contexts = [], [], []

    def open_(report, size=DESK, **options):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(render_html(report))
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def big_report(layers=80, count=40):
    """80 layers of four groups, 40 schemes, none evaluated."""
    kinds = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    scores = [{"fp8": 1e-4 * (1 + (7 * index) % 31)} for index in range(4 * layers)]
    measurement = measurement_of([1600] * len(scores), scores, batches=2)
    names = [f"{PREFIX}{layer}.{kind}" for layer in range(layers) for kind in kinds]
    renamed = dict(zip((group.name for group in measurement.groups), names, strict=True))
    groups = tuple(group.model_copy(update={"name": renamed[group.name]}) for group in measurement.groups)
    candidates = tuple(c.model_copy(update={"group": renamed[c.group]}) for c in measurement.candidates)
    measurement = measurement.model_copy(update={"groups": groups, "candidates": candidates})
    schemes = [
        make_scheme(measurement, f"a_scheme_with_a_long_name_{index:02}", set(range(8 * (index + 1))))
        for index in range(count)
    ]
    return build_report({}, measurement, schemes, {}, None, {}, [])


def failed_probe_report():
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    probes = [make_probe(manifests["top25"]), make_probe(manifests["full"], findings=(MISSING,))]
    evaluations = {"full": make_evaluation(manifests["full"], 9e-3, None)}  # the other one wasn't evaluated
    evidence = make_evidence(measurement, manifests["full"])
    return build_report({}, measurement, schemes, manifests, None, evaluations, [], probes=probes, evidence=evidence)


def one_scheme_report():
    measurement = make_measurement(run=None)
    return build_report({}, measurement, [make_scheme(measurement, "only", {0})], {}, None, {}, [])


REPORTS = {
    "full": report_with,
    "task": lambda: make_report(task=True),
    "not evaluated": lambda: make_report({}),
    "one scheme": one_scheme_report,
    "failed probe": failed_probe_report,
    "40 schemes, 80 layers": big_report,
}


def drawn(page, plot):
    """Return the traces of a plot."""
    return page.evaluate(f"document.getElementById('{plot}').data.map(t => ({{name: t.name, x: t.x, y: t.y, z: t.z}}))")


# --- without a browser ---


def test_the_same_report_gives_the_same_page():
    assert render_html(make_report()) == render_html(make_report())


def words_of(text):
    return re.sub(r"\s+", " ", html.unescape(text))


def test_the_page_says_the_numbers_of_the_markdown():
    report = report_with()
    page = words_of(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", render_html(report), flags=re.DOTALL)))
    assert words_of(report.verdict.replace("`", " ")) in page
    rows = tables(render_markdown(report))[0][2:]
    assert len(rows) == 5
    for row in rows:
        for cell in row[:1] + row[2:4] + row[5:]:
            assert cell.replace("`", "") in page


def test_nothing_of_a_report_becomes_markup():
    text = "a|b `<script>alert(1)</script>` **bold** & </td>"
    table = html.unescape(html_table(markdown_table(["h<1>", "x"], [[text, 1], ["2", "3"]]), "name"))
    assert "a|b <code><script>alert(1)</script></code> **bold** & </td></td>" in table
    raw = html_table(markdown_table(["h<1>", "x"], [[text, 1], ["2", "3"]]), "name")
    assert "<script>" not in raw
    assert raw.count("<tr>") == 3
    assert raw.count("</td>") == 4
    assert "<td class=n>3</td>" in raw
    assert html.unescape(inline("`a` < *b*")) == "<code>a</code> < *b*"
    measurement = make_measurement()
    report = build_report({"x": "</script><b>"}, measurement, [make_scheme(measurement, "s", {0})], {}, None, {}, [])
    assert "</script><b>" not in render_html(report)


def test_columns_can_be_left_out():
    table = html_table("| a | b | c |\n| :--- | ---: | ---: |\n| 1 | 2 | 3 |", without=("b",))
    assert re.findall(r"<t[hd][^>]*>(\w)", table) == ["a", "c", "1", "3"]


def test_plots_have_the_reports_numbers():
    report = report_with()
    data = plot_data(report)
    json.dumps(data, allow_nan=False)
    assert [scheme["name"] for scheme in data["schemes"]] == ["top25", "top50", "full"]
    assert data["schemes"][0]["kl"] == {"held_out": [2.8e-3, 1e-4]}
    assert data["schemes"][2]["bytes"] == 2000  # eight bits each
    assert len(data["arms"]) == 4
    assert {group["layer"] for group in data["groups"]} == {0, 1}


def test_files_are_written_and_figures_are_the_same_each_time(tmp_path):
    write_report(report_with(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}
    paths = write_figures(report_with(), tmp_path / "a")
    assert [path.name for path in paths] == [
        f"{name}.{suffix}" for name in ("frontier", "sensitivity", "predicted") for suffix in ("svg", "png")
    ][: len(paths)]
    for path in write_figures(report_with(), tmp_path / "b"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    assert [path.stem for path in write_figures(make_report({}), tmp_path / "c")] == ["sensitivity"] * 2


# --- in Chromium ---


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_report_opens_and_fits(opened, name, size):
    page = opened(REPORTS[name](), size)
    page.wait_for_selector("#plot-heat .plot-container")
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= seen
    assert page.locator("h1").inner_text() == ("m" if name.startswith("40") else "tiny-lm")
    for plot in ("plot-heat", "plot-strips"):
        assert page.locator(f"#{plot} svg.main-svg").count() > 0


def test_the_frontier_follows_its_controls(opened):
    page = opened(report_with())
    traces = drawn(page, "plot-frontier")
    assert [trace["name"] for trace in traces] == ["random groups", "most sensitive first", "schemes"]
    assert traces[-1]["y"] == [2.8e-3, 9.5e-3, 29.7e-3]
    assert page.evaluate("document.getElementById('plot-frontier').layout.yaxis.type") == "log"
    page.select_option("#scale", "linear")
    assert page.evaluate("document.getElementById('plot-frontier').layout.yaxis.type") == "linear"
    assert page.locator("#split option").all_inner_texts() == ["held_out"]


def test_the_heat_map_marks_the_chosen_scheme(opened):
    page = opened(report_with())
    page.select_option("#heat-scheme", "top25")
    heat, marks = drawn(page, "plot-heat")
    assert (marks["x"], marks["y"]) == ([0, 0], ["qkv_proj", "o_proj"])
    assert len(heat["z"]) == 4
    page.select_option("#heat-value", "rank")
    ranks = [rank for row in drawn(page, "plot-heat")[0]["z"] for rank in row]
    assert sorted(ranks) == list(range(1, 9))
    page.select_option("#heat-scheme", "full")
    assert len(drawn(page, "plot-heat")[1]["x"]) == 8


def test_strips_show_every_scheme(opened):
    page = opened(report_with())
    (strips,) = drawn(page, "plot-strips")
    assert strips["y"] == ["top25", "top50", "full"]
    assert [sum(row) for row in strips["z"]] == [2, 3, 8]


def test_the_difference_of_any_two_schemes(opened):
    page = opened(report_with())
    page.select_option("#first", "top25")
    page.select_option("#second", "top50")
    assert "1 of 8 groups differ: top50 quantises 1 that top25 leaves" in page.locator("#difference-words").inner_text()
    assert page.locator("#difference-table tbody tr").count() == 1
    page.select_option("#second", "top25")
    assert page.locator("#difference-words").inner_text() == "No group differs."
    page.select_option("#second", "full")
    assert page.locator("#difference-table tbody tr").count() == 6


def test_the_groups_can_be_filtered_and_sorted(opened):
    page = opened(report_with())
    rows = page.locator("#group-table tbody tr:not([hidden])")
    assert rows.count() == 8
    page.fill("#filter", "1.self")
    assert rows.count() == 2
    assert page.locator("#shown").inner_text() == "2 of 8"
    page.fill("#filter", "")
    page.select_option("#kind", "down_proj")
    assert rows.count() == 2
    page.select_option("#kind", "")
    head = page.locator("#group-table th", has_text="sensitivity")
    for order, first in (("ascending", "0.self_attn.qkv_proj"), ("descending", "1.mlp.down_proj")):
        head.click()
        assert head.get_attribute("aria-sort") == order
        assert rows.first.locator("td").first.inner_text() == first
    page.locator("#group-table th").first.press("Enter")
    assert rows.first.locator("td").first.inner_text() == "0.mlp.down_proj"


def test_predicted_against_measured_is_drawn(opened):
    page = opened(report_with())
    if page.locator("#plot-predicted").count():
        assert [trace["name"] for trace in drawn(page, "plot-predicted")] == ["equal", "control arms", "schemes"]
    else:
        assert "Too few schemes" in page.locator("#predicted").inner_text()


def test_dark_and_light(opened):
    page = opened(report_with(), color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark, light) == ("rgb(20, 24, 31)", "rgb(255, 255, 255)")
    assert page.evaluate("document.getElementById('plot-heat').layout.font.color") == "#1c2330"
    page.emulate_media(color_scheme="light")
    # A change is told when a frame is drawn; two changes between frames would be none.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")


def test_without_javascript_the_numbers_are_there(opened):
    page = opened(failed_probe_report(), java_script_enabled=False)
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert "missing_tensor" in page.locator("#runtimes").inner_text()
    assert page.locator("#group-table tbody tr").count() == 8
    assert page.locator("#schemes tbody tr").count() == 4


def test_it_prints(opened):
    page = opened(report_with())
    assert page.pdf().startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflow") == "visible"


def test_what_failed_is_said(opened):
    page = opened(failed_probe_report())
    assert "full" in page.locator(".verdict").inner_text()
    assert "missing_tensor" in page.locator("#schemes").inner_text()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'bitladder\[figures\]'"):
        write_figures(report_with(), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
