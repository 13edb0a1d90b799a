"""The site in a real browser: every page, formulas, search, dashboards by mouse and by keyboard, light and dark, wide and narrow."""
from pathlib import Path

import pytest

from llmbook.corpora import BookError
from llmbook.site import build_site, finish_page, mathml, page_faults, serve

pytestmark = pytest.mark.browser
DASHBOARDS = {"01a_tokenization": "Tokenizers compared", "01b_sentencepiece": "Vocabulary trade-offs", "02aa_residuals": "Gradient flow by depth", "02d_xlnet": "Two-stream masks", "02b_gpt": "Attention by layer and head", "02e_sizing": "Model sizing", "03b_optimizers": "Learning-rate schedules"}
PAGES = sorted(p.stem for p in (Path(__file__).parent.parent / "nbs").glob("*.ipynb"))


def test_pages_are_whole(site):
    folder, _ = site
    assert list(page_faults(folder)) == []
    assert sorted(p.stem for p in folder.glob("*.html")) == PAGES


def test_copies_for_language_models(site):
    folder, _ = site
    listed = (folder / "llms.txt").read_text()
    for name in PAGES:
        copy = folder / f"{name}.llms.md"
        assert copy.name in listed and len(copy.read_text()) > 500
        assert '"pool":' not in copy.read_text()


def brightness(page) -> list[float]:
    "Of the text and of what is behind it."
    colours = page.evaluate("[getComputedStyle(document.querySelector('main p')).color, getComputedStyle(document.body).backgroundColor]")
    return [sum(map(float, c[c.index("(") + 1:-1].split(",")[:3])) for c in colours]


@pytest.mark.parametrize("pages", [PAGES[::2], PAGES[1::2]], ids=["even", "odd"])
def test_every_page_opens_without_a_fault(site, visit, pages):
    "Each page on a narrow light screen, which then becomes a wide dark one."
    _, base = site
    v = visit(base, color_scheme="light", viewport={"width": 390, "height": 900})
    for name in pages:
        v.page.emulate_media(color_scheme="light"), v.page.set_viewport_size({"width": 390, "height": 900})
        page = v.open(f"{name}.html")
        for el in page.locator(".llmbook-plot").all(): el.locator(".main-svg").first.wait_for(state="attached", timeout=15_000)
        for scheme, width in (("light", 390), ("dark", 1400)):
            page.emulate_media(color_scheme=scheme), page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than a window of {width}"
            for _ in range(50):     # the page hears of another scheme a moment later
                ink, paper = brightness(page)
                if (ink > paper) == (scheme == "dark"): break
                page.wait_for_timeout(100)
            assert (ink > paper) == (scheme == "dark"), f"{name}: {ink} on {paper} in {scheme}"
        assert page.locator("span.math:not(:has(math))").count() == 0
    assert v.faults == []


def test_formulas_are_drawn(site, visit):
    _, base = site
    page = visit(base).open("02a_attention.html")
    boxes = page.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect()).map(b => [b.width, b.height])")
    assert len(boxes) > 3 and all(w > 4 and h > 4 for w, h in boxes)


def test_search_finds_a_word(site, visit):
    _, base = site
    v = visit(base)
    page = v.open("index.html")
    page.keyboard.press("/")
    page.keyboard.type("unigram entropy", delay=20)
    page.get_by_role("option").or_(page.locator("[class*=search] a")).first.wait_for(timeout=10_000)
    hrefs = page.evaluate("[...document.querySelectorAll('a')].map(a => a.href)")
    assert any("03c_training" in h for h in hrefs) and v.faults == []


def state_of(page, title):
    "The dashboard with that title, its state's number and what its figure shows."
    board = page.locator(".llmbook-dashboard", has=page.locator(".llmbook-title", has_text=title))
    board.locator(".main-svg").first.wait_for(timeout=15_000)
    figure = board.locator(".llmbook-plot").last
    return board, lambda: (board.get_attribute("data-state"), figure.evaluate("el => JSON.stringify([el.data, el.layout.title])"))


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_move_by_keyboard(site, visit, name):
    _, base = site
    v = visit(base)
    page = v.open(f"{name}.html")
    board, state = state_of(page, DASHBOARDS[name])
    seen = {state()}
    for control in board.locator("[data-control]").all():
        control.focus()
        before = state()
        for key in {"SELECT": ("ArrowDown", "ArrowUp"), "checkbox": ("Space", "Space")}.get(control.evaluate("c => c.tagName === 'SELECT' ? c.tagName : c.type"), ("ArrowRight", "ArrowLeft")):
            page.keyboard.press(key)
            page.wait_for_timeout(250)
            seen.add(state())
        assert any(s[0] != before[0] for s in seen), control.get_attribute("data-control")
    assert len({figure for _, figure in seen}) >= 3 and v.faults == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_move_by_mouse(site, visit, name):
    _, base = site
    v = visit(base)
    page = v.open(f"{name}.html")
    board, state = state_of(page, DASHBOARDS[name])
    before = state()
    slider = board.locator("input[type=range]").first
    if slider.count():
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
        assert board.locator("output").first.inner_text() != ""
    else: board.locator("select").first.select_option(index=1)
    page.wait_for_timeout(400)
    after = state()
    assert after[0] != before[0] and after[1] != before[1] and v.faults == []


def test_a_slider_plays_to_its_end_and_again_from_the_start(site, visit):
    v = visit(site[1])
    page = v.open("03b_optimizers.html")
    board, state = state_of(page, "A race on a loss surface")
    button, shown = board.locator("button[data-play]"), board.locator("output").last
    before = state()
    button.focus()
    page.keyboard.press("Enter")
    shown.filter(has_text="4").first.wait_for(timeout=10_000)
    assert state()[1] != before[1]
    page.keyboard.press("Enter")   # pauses
    held = shown.inner_text()
    page.wait_for_timeout(1_000)
    assert shown.inner_text() == held
    slider = board.locator("input[type=range]").last
    slider.focus()
    page.keyboard.press("End")
    assert shown.inner_text() == "80"
    button.click()
    page.wait_for_timeout(200)
    assert shown.inner_text() == "0" and v.faults == []


def test_a_dashboard_follows_the_switch_to_dark(site, visit):
    _, base = site
    page = visit(base, color_scheme="light").open("03b_optimizers.html")
    figure = page.locator(".llmbook-dashboard .llmbook-plot").first
    figure.locator(".main-svg").first.wait_for()
    ink = lambda: figure.evaluate("el => el.layout.template.layout.font.color")
    before = ink()
    page.locator("[class*=color-scheme], [aria-label*=dark i], [title*=dark i]").locator("visible=true").first.click()
    page.wait_for_timeout(600)
    assert ink() != before


def test_faults_are_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call, words in ((lambda: build_site(progress=False), "settings.ini"), (lambda: serve(tmp_path), "llmbook site"),
                        (lambda: mathml("a_b_c"), "formula"), (lambda: finish_page('<img src="https://example.com/a.png">'), "example.com")):
        with pytest.raises(BookError) as e: call()
        assert words in str(e.value) and "\n" not in str(e.value)
