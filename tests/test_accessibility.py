"""No accessibility error that axe-core knows is in the page, whatever a run holds: wide, narrow, light and dark."""

import pytest

from test_page import DESK, PHONE, REPORTS, big_report, chromium, opened  # noqa: F401

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core comes with bitladder[dev]")

LESS = {**REPORTS, "40 schemes, 80 layers": lambda: big_report(layers=8, count=12)}  # axe-core looks at every cell


def violations(page):
    """Return what axe-core objects to, each with the first element that it names."""
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], one["help"], one["nodes"][0]["html"][:200]) for one in found]


@pytest.mark.parametrize("name", LESS)
@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk-light", "phone-dark"])
def test_axe_finds_nothing(opened, name, size, scheme):  # noqa: F811
    page = opened(LESS[name](), size, color_scheme=scheme)
    page.wait_for_selector("#pictures svg")
    assert violations(page) == []


def test_axe_finds_what_is_wrong(opened):  # noqa: F811
    page = opened(REPORTS["full"]())
    page.evaluate("document.querySelector('#slider').removeAttribute('aria-label')")
    page.evaluate("document.querySelector('.slide').replaceWith(document.querySelector('#slider'))")
    page.evaluate("document.querySelector('h1').style.color = '#eee'")
    page.evaluate("document.documentElement.removeAttribute('lang')")
    assert {one[0] for one in violations(page)} == {"label", "color-contrast", "html-has-lang"}
