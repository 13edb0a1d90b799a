"""Dashboards without a browser: the grid, the budget, what is stored, and that both skins show the same."""
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from llmbook.dashboards import Choice, Dashboard, Html, Slider, Table, Toggle, figure_html, figure_json


def line(n, bold, name):
    figure = go.Figure(go.Scatter(y=np.arange(n) / 3), layout=dict(title=f"{name} {n}"))
    return [figure, Html(f"<b>{bold}</b>"), Table([{"n": n, "half": n / 2}])]


def board(**kw): return Dashboard(line, dict(n=Slider("N", [2, 5, 9], 5), bold=Toggle("Bold"), name=Choice("Name", ["a", "b<"])), title="T", **kw)


def test_every_state_is_what_the_function_gives():
    d = board()
    swept = d.sweep()
    assert len(swept["states"]) == len(d.grid()) == 12
    for values, state in zip(d.grid(), swept["states"]):
        kinds = [part[0] for part in state]
        assert kinds == ["f", "h", "h"]
        figure, html, table = line(**values)
        assert dict(data=[swept["pool"][i] for i in state[0][1]], layout=swept["pool"][state[0][2]]) == figure_json(figure)
        assert [swept["pool"][part[1]] for part in state[1:]] == [html.html, table.html]


def test_equal_pieces_are_stored_once():
    assert len(board().sweep()["pool"]) == 3 + 6 + 2 + 3   # traces by n; layouts by n and name; html by bold; tables by n


def test_a_grid_too_large_blames_the_worst_control():
    with pytest.raises(ValueError, match="'N'"): board(budget=100).sweep()
    huge = Dashboard(lambda **_: Html(""), dict(a=Slider("A", range(100)), b=Slider("B", range(200))), title="Huge")
    with pytest.raises(ValueError, match="'B'"): huge.sweep()


def test_json_can_not_end_its_script():
    page = Dashboard(lambda t: Html(t), dict(t=Choice("T", ["</script><script>alert(1)</script>", "x"])), title="T").to_html()
    data = re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1]
    assert "alert(1)" in json.loads(data)["pool"][0]
    assert "<title>" in board().to_html() or "&lt;" in board().to_html(), "labels and values are escaped"


def test_numpy_and_gaps_are_stored_plain():
    figure = go.Figure(go.Scatter(y=np.array([1.0, float("nan"), 1 / 3])))
    assert figure_json(figure)["data"][0]["y"] == [1, None, 0.3333]
    assert json.loads(re.search(r"json\">(.*)</script>", figure_html(json.loads(figure.to_json())))[1])["data"][0]["y"] == [1, None, 0.3333]


def test_the_live_skin_shows_the_same():
    d = board()
    live = d.live()
    row, shown = live.children[1], live.children[2]
    slider, toggle, choice = row.children
    slider.value, toggle.value, choice.value = 9, True, "b<"
    figure, html, table = shown.children
    assert figure.layout.title.text == "b< 9" and len(figure.data[0].y) == 9
    assert html.value == "<b>True</b>" and table.value == line(9, True, "b<")[2].html


def test_a_fault_in_the_function_is_shown_not_thrown():
    live = Dashboard(lambda n: Html("fine") if n else 1 / 0, dict(n=Slider("N", [1, 0])), title="T").live()
    live.children[1].children[0].value = 0
    assert "ZeroDivisionError" in live.children[2].children[0].value
    live.children[1].children[0].value = 1
    assert live.children[2].children[0].value == "fine"


def test_wrong_definitions_are_sentences():
    for make in (lambda: Choice("C", []), lambda: Choice("C", [1], 2), lambda: Dashboard(lambda n: 3, dict(n=Slider("N", [1])), title="T").sweep()):
        with pytest.raises((ValueError, TypeError)) as e: make()
        assert len(str(e.value)) > 20 and "\n" not in str(e.value)


def test_a_slider_can_be_played_in_both_skins():
    d = Dashboard(lambda n, m: Html(f"{n} {m}"), dict(n=Slider("N", [2, 5, 9], play=True), m=Slider("M", [1, 2])), title="T")
    page = d.to_html()
    assert page.count("<button") == 1 and 'data-play="n" aria-label="Play N"' in page
    live = d.live()
    played, plain = live.children[1].children
    slider, play = played.children
    for index, seen in ((2, "9 1"), (0, "2 1"), (1, "5 1")):
        play.value = index
        assert slider.index == index and live.children[2].children[0].value == seen
    slider.value = 9
    assert play.value == 2 and not hasattr(plain, "children")
