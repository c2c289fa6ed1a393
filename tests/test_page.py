"""report.html in a real Chromium: no error, every control works, and it stays readable whatever the run holds."""

import decimal
import html
import importlib.util
import json
import os
import re
import shutil

import PIL.Image
import pytest
import yaml

from bitladder.errors import OutputError
from bitladder.planning import plan, plan_all
from bitladder.recipe import SchemeSpec
from bitladder.records import TaskSummary, Throughput
from bitladder.report import build_report, render_html, render_markdown, write_figures, write_report
from bitladder.report.damage import damage_of
from bitladder.report.ladder import Ladder
from bitladder.report.numbers import markdown_table, narrow
from bitladder.report.page import FIRST_PICTURES, html_table, inline
from bitladder.report.parts import chips_of, findings_of_runtimes, runs_in_words, runtime_matrix, verdict_card
from bitladder.report.plots import plot_data
from bitladder.report.public import shorten
from bitladder.report.verdict import decide, verdict
from test_planning import measurement_of
from test_report import (
    HELD_OUT,
    PREFIX,
    make_evaluation,
    make_manifest,
    make_measurement,
    make_report,
    make_scheme,
    tables,
)
from test_report_evidence import make_evidence, report_with
from test_report_runtimes import MISSING, make_probe
from test_report_speed import report_with_speeds
from test_report_verdict import two_formats

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


def two_formats_report():
    """Two formats, three schemes that were evaluated: a choice for the planner."""
    measurement = two_formats()
    specs = [
        SchemeSpec(name="gentle", effective_bits=12),
        SchemeSpec(name="middle", effective_bits=8, formats=("fp8", "int4_w4a16")),
        SchemeSpec(name="least", effective_bits=5),
        SchemeSpec(name="least_fp8", coverage=1, formats=("fp8",)),
    ]
    schemes = plan_all(measurement, specs)
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    evaluations = {s.name: make_evaluation(manifests[s.name], s.predicted_score, 1e-4) for s in schemes}
    return build_report({}, measurement, schemes, manifests, None, evaluations, [])


REPORTS["two formats"] = two_formats_report


def tasks_report():
    """Two tasks: on one the smaller scheme, which has the least KL, is surely worse than the original."""
    report = make_report(task=True)
    asked = TaskSummary(source="package:questions.jsonl", sha256="0" * 64, samples=500, harness="lm-eval 0.4.13")
    told_of = dict.fromkeys(("novel_endings", "novel_words"), asked)
    schemes = []
    for scheme in report.schemes:
        *others, task = scheme.results
        lost = 12 if scheme.name == "top50" else 1
        told = [
            task.model_copy(update={"split": name, "value": right / 500, "reference": 0.8})
            for name, right in (("novel_endings", 401), ("novel_words", 400 - 4 * lost))
        ]
        results = (*others, *told)
        schemes.append(scheme.model_copy(update={"results": results, "damage": damage_of(results)}))
    report = report.model_copy(update={"schemes": tuple(schemes), "tasks": told_of})
    report = report.model_copy(update={"decision": decide(report)})
    return report.model_copy(update={"verdict": verdict(report)})


REPORTS["tasks"] = tasks_report
REPORTS["speeds"] = lambda: report_with_speeds()[2]


def two_sets_report():
    """Two held-out sets, a task, and a runtime that doesn't take a checkpoint: as many columns as there are."""
    report = make_report(task=True)
    schemes = []
    for scheme in report.schemes:
        again = tuple(result.model_copy(update={"split": "captions"}) for result in scheme.results)
        schemes.append(scheme.model_copy(update={"results": (*scheme.results, *again)}))
    probes = failed_probe_report().probes
    return report.model_copy(
        update={"schemes": tuple(schemes), "splits": (*report.splits, "captions"), "probes": probes}
    )


REPORTS["two sets"] = two_sets_report


def attributes(page, selector, *names):
    """Return some attributes of every element that the selector finds."""
    script = "(found, names) => found.map(e => names.map(n => e.getAttribute(n)))"
    found = page.locator(selector).evaluate_all(script, list(names))
    return [values[0] if len(names) == 1 else tuple(values) for values in found]


# --- without a browser ---


def test_the_same_report_gives_the_same_page():
    assert render_html(make_report()) == render_html(make_report())


def words_of(text):
    return re.sub(r"\s+", " ", html.unescape(text))


def test_the_page_says_the_numbers_of_the_markdown():
    report = report_with()
    page = words_of(re.sub(r"<[^>]+>", " ", re.sub(r"<script.*?</script>", "", render_html(report), flags=re.DOTALL)))
    assert words_of(f" {report.verdict} ".replace("`", " ")).strip() in page
    summary, asked = (table[2:] for table in tables(render_markdown(report))[:2])
    assert (len(summary), len(asked)) == (5, 4)
    for scheme, bits, _, kl, perplexity, *_ in summary[2:]:
        assert all(shown in page for shown in (scheme, bits, kl, perplexity))
    for scheme, _, coverage, _, predicted, *_ in asked[1:]:
        assert all(shown in page for shown in (scheme, coverage, predicted))


@pytest.mark.parametrize("name", REPORTS)
def test_no_table_of_the_markdown_has_eight_columns(name):
    found = tables(render_markdown(REPORTS[name]()))
    assert len(found) > 5
    assert all(len({len(row) for row in table}) == 1 and len(table[0]) < 8 for table in found)


@pytest.mark.parametrize(
    ("columns", "blocks", "shapes"),
    [
        (7, (), [7]),
        (8, (), [5, 5]),  # both have the two columns that are kept
        (19, (4, 4), [6, 6, 6, 7]),
    ],
)
def test_a_wide_table_is_several_that_have_all_of_its_cells(columns, blocks, shapes):
    header, rows = [f"c{i}" for i in range(columns)], [[f"{r}{i}" for i in range(columns)] for r in "ab"]
    found = tables(narrow(markdown_table(header, rows, left=3), 2, blocks))
    assert [len(table[0]) for table in found] == shapes
    for place, own in enumerate([header, *rows]):
        lines = [[table[0], *table[2:]][place] for table in found]
        assert all(line[:2] == own[:2] for line in lines)
        assert own == [*own[:2], *(cell for line in lines for cell in line[2:])]


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


def test_plots_have_the_reports_numbers():
    report = report_with()
    data = plot_data(report)
    json.dumps(data, allow_nan=False)
    assert [scheme["name"] for scheme in data["schemes"]] == ["top25", "top50", "full"]
    assert data["schemes"][0]["kl"] == {"held_out": [2.8e-3, 1e-4]}
    assert data["schemes"][2]["bytes"] == 2000  # eight bits each
    assert len(data["arms"]) == 4
    assert {group["layer"] for group in data["groups"]} == {0, 1}
    assert data["worst"] == {
        "fp8": [f"{PREFIX}1.{kind}" for kind in ("mlp.down_proj", "mlp.gate_up_proj")] + [f"{PREFIX}1.self_attn.o_proj"]
    }
    shades = [group["scores"]["fp8"]["shade"] for group in data["groups"]]
    assert (shades[0], shades[-1]) == (0.0, 1.0)
    assert shades == sorted(shades)


def page_rows(page):
    """Return {scheme: {column: text}} of the page's table of schemes."""
    found = {}
    for body in re.findall(r"<tbody[^>]*><tr><th scope=.row.>(.*?)</tr>", page, flags=re.DOTALL):
        name = re.match(r"\s*([\w.]+)", body)[1]
        cells = re.findall(r'data-label="([^"]*)">(.*?)</td>', body, flags=re.DOTALL)
        found[name] = {label: " ".join(re.sub(r"<[^>]+>", " ", cell).split()) for label, cell in cells}
    return found


def rounded(value, digits):
    """Round half to even to significant digits, as a decimal numeral."""
    number = decimal.Context(prec=digits).create_decimal(repr(value))
    return f"{number:f}"


def test_the_pages_numbers_are_those_of_report_json(tmp_path):
    write_report(make_report(task=True), tmp_path)
    record = json.loads((tmp_path / "report.json").read_text())
    page = html.unescape((tmp_path / "report.html").read_text())
    rows = page_rows(page)
    source = record["source_weight_file_bytes"]
    for scheme in record["schemes"]:
        row, results = rows[scheme["name"]], {found["metric"]: found for found in scheme["results"]}
        kl, task = results["kl"], results["task_accuracy"]
        assert row["effective bits"] == f"{scheme['effective_bits']:.2f}"
        value, error = (rounded(1000 * kl[key], digits) for key, digits in (("value", 2), ("standard_error", 1)))
        assert row["held-out KL"] == f"{value} ± {error}"
        assert row["top-1"] == f"{100 * results['top1_agreement']['value']:.1f}%"
        assert row["task accuracy"].startswith(f"{100 * task['value']:.1f}% ±")
        change = 100 * scheme["weight_file_bytes"] / source - 100
        assert row["weight files"].endswith(f"{change:+.0f}%".replace("-", "−"))
        assert row["damage"].startswith(scheme["damage"].replace("_", " "))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [[s["name"], s["bits"], s["weightBytes"]] for s in data["schemes"]] == [
        [s["name"], s["effective_bits"], s["weight_bytes"]] for s in record["schemes"]
    ]
    assert [list(s["kl"].values()) for s in data["schemes"]] == [
        [[r["value"], r["standard_error"]] for r in s["results"] if r["metric"] == "kl"] for s in record["schemes"]
    ]
    assert [g["scores"]["fp8"]["score"] for g in data["groups"]] == [
        g["sensitivities"][0]["score"] for g in record["groups"]
    ]
    planned = json.loads(report_with_speeds()[2].model_dump_json())["frontier"]["curves"]
    for drawn, curves in ((data, record["frontier"]["curves"]), (plot_data(report_with_speeds()[2]), planned)):
        for curve, own in zip(drawn["curves"], curves, strict=True):
            assert [{key: p[key] for key in q} for p, q in zip(curve["points"], own["points"], strict=True)] == own[
                "points"
            ]


def test_the_card_has_its_tiles_and_how_to_serve_it():
    report = report_of_a_loaded_scheme()
    card = verdict_card(report, Ladder(report))
    assert (card["scheme"], card["damage"], card["word"]) == ("top50", "nearly_lossless", "nearly lossless")
    tiles = {tile["label"]: (tile["value"], tile["small"], tile["state"]) for tile in card["tiles"]}
    assert tiles == {
        "Size": ("−17%", "", ""),  # 5,005 of 6,000 bytes
        "KL to the original": ("7.1", "± 0.1", ""),
        "Top-1 agreement": ("97.1%", "", ""),
        "Speed": ("1.25×", "", "good"),
        "vLLM": ("served", "", "good"),
    }
    assert card["serve"] == "vllm serve 'out dir/top50'"
    page = render_html(report)
    assert '<code id="serve">vllm serve &#39;out dir/top50&#39;</code>' in page
    assert verdict_card(make_report({}), Ladder(make_report({})))["scheme"] is None


def report_of_a_loaded_scheme():
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top50", {0, 1, 2}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    kls = {"top50": 7.1e-3, "full": 30e-3}
    evaluations = {name: make_evaluation(manifests[name], kl, 1e-4) for name, kl in kls.items()}
    speed = Throughput(phase="decode", requests=64, tokens_per_second=250, source_tokens_per_second=200)
    probes = [
        make_probe(manifests["top50"], "preflight", runtime="sglang", version="0.5"),
        make_probe(manifests["top50"], "generate", device="GPU X", throughput=(speed,)),
        make_probe(manifests["full"], "preflight", runtime="sglang", version="0.5", findings=(MISSING,)),
    ]
    settings = {"layout": {"checkpoints": "out dir/{scheme}"}}
    return build_report(settings, measurement, schemes, manifests, None, evaluations, [], probes=probes)


def test_of_several_tasks_the_worst_is_named_everywhere():
    report = tasks_report()
    lost = next(scheme for scheme in report.schemes if scheme.name == "top50")
    assert lost.damage == "noticeable"
    assert report.decision.take == "top25"  # top50 was nearly lossless by its KL
    said = "accuracy on novel_words, the worst of 2 tasks, 79.2% against the original's 80.0%"
    assert said in report.decision.advice
    assert "surely worse than the original on novel_words: `top50` (70.4% against 80.0%)" in report.decision.notes
    tiles = {tile["label"]: tile for tile in verdict_card(report, Ladder(report))["tiles"]}
    assert tiles["Worst of 2 tasks"]["value"] == "79.2%"
    assert tiles["Worst of 2 tasks"]["detail"] == "novel_words; the original’s: 80.0%; 500 questions"
    assert {"text": "worse on novel_words", "tone": "bad"} in chips_of(report, lost)
    page = render_html(report)
    assert page_rows(page)["top50"]["worst task"] == "−9.6 points novel_words: 70.4%"
    for words in ("accuracy on novel_endings</dt>", "80.2% ± 1.0%; the original’s: 80.0%, +0.2 points"):
        assert words in page
    row = next(row for row in tables(render_markdown(report))[0] if row[0] == "top50")
    assert row[-1] == "novel_words −9.6"


def test_the_matrix_of_runtimes_says_how_far_each_came():
    matrix = runtime_matrix(report_of_a_loaded_scheme())
    assert sorted(matrix["columns"]) == ["SGLang 0.5", "vLLM 0.32.0 on GPU X"]
    cells = {row["scheme"]: dict(zip(matrix["columns"], row["cells"], strict=True)) for row in matrix["rows"]}
    assert cells["top50"]["SGLang 0.5"]["text"] == "by rules"
    assert (cells["top50"]["vLLM 0.32.0 on GPU X"]["text"], cells["full"]["vLLM 0.32.0 on GPU X"]["text"]) == (
        "served",
        "–",
    )
    assert (cells["full"]["SGLang 0.5"]["text"], cells["full"]["SGLang 0.5"]["state"]) == ("missing_tensor", "bad")
    assert not matrix["fine"]


def test_a_row_says_how_far_its_checkpoint_came():
    report = report_of_a_loaded_scheme()
    assert runs_in_words(report, "top50") == ("served by vLLM", "")
    assert runs_in_words(report, "full") == ("no", "SGLang: missing_tensor")
    assert runs_in_words(make_report(), "full") == ("not run", "")


def test_what_two_runtimes_find_alike_is_said_once():
    measurement = make_measurement()
    schemes = [make_scheme(measurement, "top25", {0, 1}), make_scheme(measurement, "full", set(range(8)))]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    probes = [
        make_probe(manifests[name], "preflight", runtime=runtime, findings=(MISSING,))
        for name in manifests
        for runtime in ("vllm", "sglang")
    ]
    report = build_report({}, measurement, schemes, manifests, None, {}, [], probes=probes)
    (line,) = findings_of_runtimes(report)
    assert line.startswith("`top25`, `full` (vLLM 0.32.0 by rules, SGLang 0.32.0 by rules): error, missing_tensor: ")


def test_a_row_has_what_was_found_as_chips():
    report = make_report(broken="full")
    chips = {s.name: [chip["text"] for chip in chips_of(report, s)] for s in report.schemes}
    assert chips["top50"][0] == "recommended"
    assert "doesn’t match its scheme" in chips["full"]
    noisy = make_report({"top25": (7.0e-3, 0.2e-3), "top50": (7.1e-3, 0.2e-3), "full": (0.5e-3, 1e-5)})
    chips = {s.name: [chip["text"] for chip in chips_of(noisy, s)] for s in noisy.schemes}
    assert "within noise of its neighbour" in chips["top25"]
    assert "below BF16’s own noise" in chips["full"]


def test_the_page_is_small_and_says_what_it_is():
    report = report_with()
    page = render_html(report)
    assert len(page.encode()) < 200_000
    assert len(render_html(big_report()).encode()) < 1_500_000
    described = html.unescape(re.search(r'<meta name="description" content="([^"]*)">', page)[1])
    assert described == f"FP8 beside BF16: {report.verdict.replace('`', '')}"
    assert "2026-01-01" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/somebody/models/tiny-lm", "…/tiny-lm"),
        ("/home/some body/my models/tiny lm", "…/tiny lm"),
        ("~/models/tiny", "…/tiny"),
        ("/srv/out/{scheme}", "…/{scheme}"),
        ("can't read /var/tmp/x/a.json: gone", "can't read …/a.json: gone"),
        ("file=/a/b, then '/c/d/e'", "file=…/b, then '…/e'"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("package:demo/data/x.jsonl", "package:demo/data/x.jsonl"),
        ("checkpoints/{scheme} and ../runs/x", "checkpoints/{scheme} and ../runs/x"),
        ("tokens/s, 1 / 2", "tokens/s, 1 / 2"),
    ],
)
def test_directories_of_the_machine_are_left_out(text, shown):
    assert shorten(text) == shown


def test_no_directory_of_the_machine_is_in_the_page():
    measurement = make_measurement(calibration=HELD_OUT.model_copy(update={"source": "/home/somebody/c.txt"}))
    settings = {"output": "/home/somebody/runs/x", "model": {"path": "/home/somebody/tiny-lm"}}
    measurement = measurement.model_copy(
        update={"model": measurement.model.model_copy(update={"path": "/home/somebody/tiny-lm"})}
    )
    page = render_html(build_report(settings, measurement, [make_scheme(measurement, "s", {0})], {}, None, {}, []))
    assert "somebody" not in page
    assert "…/c.txt" in page
    assert "<h1>tiny-lm</h1>" in page


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
@pytest.mark.parametrize("size", [DESK, (900, 900), (600, 900), PHONE], ids=["desk", "half", "tablet", "phone"])
def test_every_report_opens_and_fits(opened, name, size):
    report = REPORTS[name]()
    page = opened(report, size)
    page.wait_for_selector("#pictures svg")
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= seen
    assert page.locator("h1").inner_text() == ("m" if name.startswith(("40", "speeds")) else "tiny-lm")
    assert page.locator("#pictures figure:not([hidden]) svg").count() == min(len(report.schemes), FIRST_PICTURES)
    inside = "e => e.scrollWidth <= e.clientWidth + 1"
    assert page.locator("table.schemes").evaluate(inside)  # the table of schemes needs no scrolling


def test_the_frontier_follows_its_controls(opened):
    page = opened(two_formats_report())
    frontier = page.locator("#plot-frontier")
    measured = {s.name: s.results[0].value for s in two_formats_report().schemes}
    shown = dict(attributes(page, "#plot-frontier .scheme", "data-name", "data-kl"))
    assert {name: float(kl) for name, kl in shown.items()} == measured
    assert attributes(page, "#plot-frontier .curve", "data-formats") == ["int4_w4a16", "fp8", "fp8 int4_w4a16"]
    assert frontier.locator(".band").count() == 1

    def heights():
        return {name: float(y) for name, y in attributes(page, "#plot-frontier .scheme", "data-name", "cy")}

    log = heights()
    assert sorted(measured, key=measured.get) == sorted(log, key=lambda name: -log[name])
    page.select_option("#scale", "linear")
    linear = heights()
    assert linear != log
    floor = max(linear.values())
    share = [(floor - linear[n]) / (floor - linear["least"]) for n in ("middle", "least_fp8")]
    least = min(measured.values())
    assert share == pytest.approx(
        [(measured[n] - least) / (measured["least"] - least) for n in ("middle", "least_fp8")]
    )
    page.select_option("#across", "bytes")
    assert "searched weights, MiB" in frontier.inner_text()
    across = dict(attributes(page, "#plot-frontier .scheme", "data-name", "cx"))
    bits = {scheme.name: scheme.effective_bits for scheme in two_formats_report().schemes}
    assert sorted(bits, key=bits.get) == sorted(across, key=lambda name: float(across[name]))


def test_arms_and_the_noise_floor_are_in_the_frontier(opened):
    page = opened(report_with())
    assert page.locator("#plot-frontier .arm").count() == 4
    assert "noise floor of BF16 arithmetic" in page.locator("#plot-frontier").inner_text()
    assert "nearly lossless" in page.locator("#plot-frontier").inner_text()
    assert page.locator("#split option").all_inner_texts() == ["held_out"]


def test_what_the_search_is_worth_is_drawn(opened):
    page = opened(report_with())
    assert [float(kl) for kl in attributes(page, "#plot-worth .scheme", "data-kl")] == [2.8e-3, 9.5e-3]
    assert page.locator("#plot-worth .arm").count() == 4


def test_the_picture_of_the_layers_is_the_schemes(opened):
    report = two_formats_report()
    page = opened(report)
    for scheme in report.schemes:
        frame = f'[data-layers="{scheme.name}"]'
        cells = dict(attributes(page, f"{frame} .cell", "data-group", "data-format"))
        assert cells == {group.name: group.formats[scheme.name] for group in report.groups}
        assert page.locator(f"{frame} .worst").all_text_contents() == ["3", "2", "1"]  # in network order
    assert page.locator("#worst li").first.inner_text().startswith(f"{PREFIX}1.mlp.down_proj 0.0080 nats² per token")
    page.select_option("#reference", "int4_w4a16")
    assert page.locator("#worst li").first.inner_text().startswith(f"{PREFIX}1.mlp.down_proj 0.032 nats² per token")


def test_more_pictures_come_when_asked_for(opened):
    page = opened(big_report(layers=4, count=12))
    assert page.locator("#pictures svg").count() == FIRST_PICTURES
    page.click("#more-layers")
    assert page.locator("#pictures svg").count() == 12


@pytest.mark.parametrize("curve", ["0", "1", "2"])
def test_the_planners_line_makes_the_plan_that_is_shown(opened, curve):
    page, measurement = opened(two_formats_report()), two_formats()
    page.select_option("#plan-formats", curve)
    slider = page.locator("#slider")
    slider.focus()
    page.keyboard.press("Home")
    seen = set()
    for _ in range(6):
        (entry,) = yaml.safe_load(page.locator("#plan-recipe").inner_text())
        scheme = plan(measurement, SchemeSpec.model_validate(entry))
        cells = dict(attributes(page, "#plan-layers .cell", "data-group", "data-format"))
        assert cells == scheme.formats
        assert page.locator("#plan-bits").inner_text() == f"{scheme.effective_bits:.2f}"
        seen.add(tuple(scheme.formats.items()))
        for _ in range(5):
            page.keyboard.press("ArrowRight")
    assert len(seen) >= 4
    page.keyboard.press("End")
    assert "groups differ from" in page.locator("#plan-near").inner_text()


@pytest.mark.parametrize("curve", [0, 1, 3, 4])  # all formats, FP8 alone; along the speed of prefill, of decoding
def test_the_planner_shows_the_reports_speeds(opened, curve):
    report = report_with_speeds()[2]
    page, drawn = opened(report), report.frontier.curves[curve]
    page.select_option("#plan-formats", str(curve))
    ends = ("Fewer bits", "more bits") if drawn.along == "bits" else ("Slower", "faster")
    assert (page.locator("#plan-less").inner_text(), page.locator("#plan-more").inner_text()) == ends
    page.locator("#slider").focus()
    page.keyboard.press("Home")
    for point in drawn.points[:5]:
        ratios = f"{point.prefill_ratio:.2f}", f"{point.decode_ratio:.2f}"
        assert page.locator("#plan-speed").inner_text() == f"{ratios[0]} / {ratios[1]}×"
        said = page.locator("#slider").get_attribute("aria-valuetext")
        bits = f"{point.effective_bits:.2f} effective bits"
        assert said == f"{bits}, {ratios[0]}× at prefill, {ratios[1]}× at decoding"
        (entry,) = yaml.safe_load(page.locator("#plan-recipe").inner_text())
        assert entry.get("speed", {}).get(drawn.along, entry.get("effective_bits")) == point.target
        page.keyboard.press("ArrowRight")
    assert page.locator("#plan-speed-of").inner_text() == "prefill / decoding, of 16 bits on Invented GPU"


def test_without_a_profile_the_planner_shows_no_speed(opened):
    page = opened(two_formats_report())
    assert page.locator("#plan-speed").count() == 0
    assert page.locator("#plan-formats option").count() == 3


def test_figures_can_be_saved_and_commands_copied(opened):
    page = opened(two_formats_report())
    with page.expect_download() as saving:
        page.click('[data-png="plot-frontier"]')
    assert saving.value.suggested_filename == "plot-frontier.png"
    with PIL.Image.open(saving.value.path()) as picture:
        assert picture.size[1] == 880
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    button = page.locator('[data-copy="plan-recipe"]')
    button.click()
    page.wait_for_function(
        "['copied', 'selected'].includes(document.querySelector('[data-copy=plan-recipe]').innerText)"
    )


def test_a_keyboard_reaches_points_and_hears_them(opened):
    page = opened(report_with())
    point = page.locator("#plot-frontier .scheme").first
    point.focus()
    tip = page.locator("#tip")
    assert tip.inner_text().startswith("top25: 14.40 bits")
    assert "KL 2.8 × 10⁻³ nats a token" in tip.inner_text()
    assert point.get_attribute("aria-label") == tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


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
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert rows.first.locator("td").first.inner_text() == first
    page.locator("#group-table th button").first.press("Enter")
    assert rows.first.locator("td").first.inner_text() == "0.mlp.down_proj"


def test_predicted_against_measured_is_drawn(opened):
    report = report_with()
    page = opened(report)
    known = [point for point in report.prediction.points if point.predicted is not None]
    assert known
    for control, selector in ((True, ".arm"), (False, ".scheme")):
        shown = sorted(float(kl) for kl in attributes(page, f"#plot-predicted {selector}", "data-kl"))
        assert shown == sorted(point.measured for point in known if point.is_control == control)


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_dark_and_light_and_the_choice_is_remembered(opened):
    page = opened(report_with(), color_scheme="dark")
    dark = ground(page)
    label = "document.querySelector('#plot-frontier text').getAttribute('fill')"
    before = page.evaluate(label)
    page.emulate_media(color_scheme="light")
    page.wait_for_function("document.documentElement.dataset.theme === 'light'")
    # A change is told when a frame is drawn; two changes between frames would be none.
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.click("#theme")
    assert (dark, ground(page)) == ("rgb(18, 22, 29)", "rgb(255, 255, 255)")
    assert page.evaluate(label) != before
    page.reload()
    assert ground(page) == "rgb(255, 255, 255)"


def test_without_javascript_the_numbers_are_there(opened):
    page = opened(failed_probe_report(), java_script_enabled=False)
    assert "need JavaScript" in page.locator("noscript").inner_text()
    assert "missing_tensor" in page.locator("#runtimes").inner_text()
    assert page.locator("#group-table tbody tr").count() == 8
    assert page.locator("#schemes tbody").count() == 4


def test_it_prints(opened):
    page = opened(report_with())
    assert page.pdf().startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator("#theme").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflow") == "visible"


def test_what_failed_is_said(opened):
    page = opened(failed_probe_report())
    assert "full" in page.locator("#decision").inner_text()
    assert "vLLM: missing_tensor" in page.locator("#schemes").inner_text()
    assert "missing_tensor" in page.locator("#runtimes").inner_text()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'bitladder\[figures\]'"):
        write_figures(report_with(), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
