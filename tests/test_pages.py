"""Pages and figures: what people wrote is text in them, never markup."""

from __future__ import annotations

import io
import json
import re

import pytest
from hostile import ALL, elements, names
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as Bare

from vlmattn import pages
from vlmattn.drawing import Figure, svg
from vlmattn.errors import one_line

TEMPLATE = "<p title='{{text}}'>{{text}}</p>{{own}}<script id='data'>{{data}}</script><i>{{last}}</i>"


@settings(max_examples=200, deadline=None)
@given(
    names,
    st.recursive(names, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2)),
    names,
)
def test_a_template_is_filled_in_one_pass(text, data, last):
    page = pages.filled(TEMPLATE, {"text": text, "own": pages.Html("<hr>"), "data": {"is": data}, "last": last})
    benign = pages.filled(TEMPLATE, {"text": "a", "own": pages.Html("<hr>"), "data": {"is": "b"}, "last": "c"})
    assert elements(page) == elements(benign)
    inside = page[page.index("id='data'>") + 10 : page.index("</script>")]
    assert json.loads(inside) == json.loads(json.dumps({"is": data}).replace("\\ud800", "\\ufffd"))
    assert not re.search("[<>&\u2028\u2029]", inside)


def test_a_place_without_a_part_is_an_error():
    with pytest.raises(KeyError):
        pages.filled("{{a}} {{b}}", {"a": "x"})


def test_titles_are_text():
    assert elements(pages.document(ALL, "<p>")) == elements(pages.document("a", "<p>"))


@settings(max_examples=300, deadline=None)
@given(names | st.text(st.sampled_from("\\|`*_~[]()<>&$!# \n-+.1a:"), min_size=1, max_size=12))
def test_a_cell_of_a_table_holds_its_text(text):
    cell = pages.markdown_cell(text)
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"|a|b|\n|-|-|\n|x {cell} y|z|\n")
    kinds = [tag for tag, _ in elements(html)]
    assert kinds == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    shown = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)[0]
    shown = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert shown.split() == f"x {one_line(text)} y".split()


def test_plain_names_stay_readable():
    for name in ("var_official", "pai[alpha=0.3]", "fastv@0.25", "vhr+pai", "none", "faint (300)"):
        assert pages.markdown_cell(name) == name


def drawn_with(text, kind=Figure):
    figure = kind(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], label=text)
    axis.set_title(text)
    axis.set_xlabel(text)
    axis.set_yticks([0, 1], [text, "b"])
    axis.annotate(text, (0, 0))
    figure.suptitle(text)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center")
    return figure


@pytest.mark.filterwarnings("ignore")  # letters that the font lacks, and labels that leave no room
@settings(max_examples=8, deadline=None)
@given(names | st.sampled_from(["a$b$c", "$\\frac{", "$x", "\\$5", "a" * 5000, "$" * 3000, "a\nb\nc\nd"]))
def test_names_are_drawn_as_they_are(text):
    picture = svg(drawn_with(text))
    told = " ".join(re.findall(r"<!-- (.*?) -->", picture, re.DOTALL))
    line = one_line(text.split("\n")[0], 80)
    if re.fullmatch(r"[\w$\\{ ]+", line, re.ASCII) and line.strip():
        assert told.count(line) >= 6
    kinds = {tag for tag, _ in elements(picture, drawn=True)}
    assert kinds <= {
        "svg",
        "metadata",
        "defs",
        "style",
        "g",
        "path",
        "use",
        "clippath",
        "rect",
        "rdf:rdf",
        "cc:work",
        "dc:type",
        "dc:format",
        "dc:creator",
        "cc:agent",
        "dc:title",
        "dc:date",
    }
    drawn_with(text).savefig(io.BytesIO(), format="png", dpi=20)


def test_the_library_itself_would_draw_markup():
    with pytest.raises(ValueError, match="frac"):
        drawn_with("$\\frac{a$", Bare).savefig(io.BytesIO(), format="svg")


def test_a_figure_has_the_same_bytes_every_time():
    assert svg(drawn_with("a")) == svg(drawn_with("a"))
