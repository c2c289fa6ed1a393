"""A name that holds markup is shown as it is, wherever a report, a card, a page or a terminal shows it."""

import html.parser
import json
import re
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from pydantic import BaseModel
from rich.console import Console

from bitladder import report as package
from bitladder.report import closing_table, compare_runs, render_card, render_html, render_markdown, write_figures
from bitladder.report.escaping import code, fence, prose, text
from test_report import make_report
from test_report_evidence import report_with as report_with_controls
from test_report_runtimes import MISSING, make_probe
from test_report_runtimes import report_with as report_with_probes

MARKS = (
    "</code></details></script><script>bad()</script><!--<b onclick=x>",
    "x|y `q| <img src=x onerror=bad()> ` z",
    "[here](javascript:bad()) ![p](http://bad.example/p.png) <http://bad.example> http://bad.example www.bad.example",
    "a\n\n# heading\n\n- item\n\n````\n\n<div>\n---\nb",
    "**bold** __init__ *it* ~~gone~~ $x$ &amp; \\| \\` [red]no[/red] [/x]",
    "# first",
    "\x1b[31m\u202etxt",
)
# What a report's own files may hold.
OWN_TAGS = {"html", "head", "meta", "title", "link", "style", "body", "header", "p", "h1", "h2", "h3", "ul", "li", "b"}
OWN_TAGS |= {"nav", "a", "main", "section", "div", "table", "thead", "tbody", "tr", "th", "td", "code", "em", "details"}
OWN_TAGS |= {"summary", "pre", "noscript", "label", "select", "option", "input", "span", "button", "sup", "script"}
OWN_TAGS |= {"strong", "hr", "small", "i", "dl", "dt", "dd", "figure", "figcaption", "ol"}


class Tags(html.parser.HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.comments: list[str] = []
        self._in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in_script = tag in ("script", "style")
        self.links += [value for name, value in attrs if name in ("href", "src")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        (self.scripts if self._in_script else self.texts).append(data)

    def handle_comment(self, data):
        self.comments.append(data)


def hostile(part, mark, keep=()):
    """A copy of a record with `mark` at the end of every foreign text in it, keys included."""
    fixed = {
        "metric",
        "unit",
        "control",
        "stage",
        "severity",
        "sha256",
        "format",
        "engine",
        "method",
        "carrier",
        "along",
    }
    fixed |= {"damage", "aim", *keep}
    if isinstance(part, BaseModel):
        fields = {
            name: value if name in fixed or name.endswith("sha256") else hostile(value, mark, keep)
            for name, value in ((name, getattr(part, name)) for name in type(part).model_fields)
        }
        return part.model_copy(update=fields)
    if isinstance(part, dict):
        return {hostile(key, mark, keep): hostile(value, mark, keep) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return type(part)(hostile(value, mark, keep) for value in part)
    return part + mark if isinstance(part, str) and part not in ("bf16", "fp8", "ok", "") else part


def reports(mark):
    """Reports whose every name, path and message ends in `mark`."""
    probed = report_with_probes(
        ("top25", lambda m: make_probe(m, findings=(MISSING,), formats=("fp8", "bf16", "bf16"))), ("full", make_probe)
    )
    plain = (make_report(task=True, broken="full"), report_with_controls(), probed)
    return [hostile(one, mark) for one in plain]


def markdown_of(page):
    """The page as HTML: as CommonMark with tables, struck text and bare links, HTML passed on."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return renderer.render(page)


@pytest.mark.parametrize("mark", MARKS)
def test_a_hostile_name_adds_nothing_to_markdown(mark):
    for bad, good in zip(reports(mark), reports(""), strict=True):
        pages = [(render_markdown(bad), render_markdown(good))]
        for one, other in zip(bad.schemes, good.schemes, strict=True):
            cards = render_card(bad, one.name), render_card(good, other.name)
            assert isinstance(yaml.safe_load(cards[0].split("---\n")[1]), dict)
            pages.append(tuple(card.split("---\n", 2)[2] for card in cards))
        pages.append((compare_runs(bad, bad, ("a" + mark, "b" + mark)), compare_runs(good, good, ("a", "b"))))
        for page, plain in pages:
            found, expected = Tags(markdown_of(page)), Tags(markdown_of(plain))
            of = [[tag for tag in tags.tags if tag not in ("code", "strong")] for tags in (found, expected)]
            assert of[0] == of[1]
            assert found.links == expected.links
            assert found.handlers == found.comments == []
            outside = re.sub(r"(?s)````.*````|`[^`\n]*`", "", page)
            assert not re.search(r"https?://|www\.", outside)  # GitHub makes links of these


@pytest.mark.parametrize("mark", MARKS)
def test_a_hostile_name_adds_nothing_to_the_page(mark):
    for bad, good in zip(reports(mark), reports(""), strict=True):
        found, expected = Tags(render_html(bad)), Tags(render_html(good))
        of = [[tag for tag in tags.tags if tag != "code"] for tags in (found, expected)]
        assert of[0] == of[1]
        assert set(found.tags) <= OWN_TAGS
        assert (found.links, found.handlers, found.comments) == (expected.links, [], [])
        (data,) = [script for script in found.scripts if script.startswith("{") and '"schemes"' in script]
        assert "<" not in data
        assert [scheme["name"] for scheme in json.loads(data)["schemes"]] == [s.name for s in bad.schemes]


@pytest.mark.parametrize("mark", MARKS[:5])
def test_the_name_can_still_be_read(mark):
    (report, *_) = reports(mark)
    wanted = " ".join(re.sub("`", "", report.schemes[0].name).split())
    for page in (markdown_of(render_markdown(report)), render_html(report)):
        assert wanted in " ".join(re.sub("`", "", "".join(Tags(page).texts)).split())


@pytest.mark.parametrize("mark", MARKS)
def test_a_terminal_and_a_figure_take_it_for_text(mark, tmp_path):
    for report in reports(mark):
        console = Console(width=400, record=True, file=(tmp_path / "out").open("w"))
        console.print(closing_table(report))
        console.file.close()
    write_figures(reports(mark)[0], tmp_path)
    write_figures(reports("$\\frac{")[0], tmp_path)


def test_front_matter_names_no_base_model_that_no_hub_could_have():
    (report, *_) = reports("\n---\n# x")
    report = report.model_copy(update={"model": report.model.model_copy(update={"revision": "a: b"})})
    card = render_card(report, report.schemes[0].name)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])


def test_no_template_writes_its_own_code_spans_or_trusts_a_text():
    for path in Path(package.__file__).parent.glob("*.jinja"):
        template = path.read_text()
        assert "`{{" not in template, path
        assert "safe }}" not in template, path


def test_ordinary_names_stay_as_they_are():
    for name in ("model.layers.0.self_attn.q_proj", "Qwen2.5-VL-3B", "my data (v2), 10% ± 3 × 10⁻³", "-3.2", "a's: b"):
        assert text(name) == name
        assert code(name) == f"`{name}`"
    assert prose("take `a_b` < `c`") == "take `a_b` &#60; `c`"
    assert text(text("<")) == "&#60;"
    assert text("- a") == "&#45; a"
    assert code("`") == "<code>&#96;</code>"
    assert fence("a\n`````\n") == "``````"
