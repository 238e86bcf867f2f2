"""Reports are read back by an HTML parser and a Markdown parser: what went in must come out."""

import base64
import json
import math
import platform
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llm.evaluation.facts import hardware_facts, version_facts
from llm.evaluation.report import (
    Figure,
    Report,
    Sample,
    Section,
    Table,
    format_cell,
    to_html,
    to_markdown,
    write_report,
)
from llm.evaluation.tables import (
    bits_per_byte_table,
    format_duration,
    format_power,
    model_table,
    wall_time_table,
    write_summary,
)
from llm.models.presets import PRESETS

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1"/></svg>'
NASTY = "<script>alert('a & b')</script> | `x` *y* \\ $1 [z](q) ~~w~~ &amp; 你好"
BITS = {
    "xz": {"prose": 2.5, "code": 1.25, "all": 1.75},
    "model": {"prose": 2.0, "code": 1.5, "all": 1.625},
}


class _Page(HTMLParser):
    """Checks that tags nest, and gathers the text of each kind of element and all attributes."""

    VOID = {"meta", "img", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], {}, []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes.extend(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            self.texts[tag][-1] += data


def _report(text: str) -> Report:
    table = Table(("name", text), ((text, 1234), ("b", None)), text, bold=frozenset({(0, 0)}))
    section = Section(
        text,
        f"{text}\n\nsecond",
        (table,),
        (Figure("f-1", SVG, text, text),),
        (Sample(text, text),),
    )
    return Report(text, {text: text}, (section,))


def test_html_holds_every_text_as_it_was_and_refers_to_nothing_outside():
    page = _Page(to_html(_report(NASTY)))
    for tag in ("title", "h1", "h2", "dt", "dd", "caption", "figcaption", "b"):
        assert page.texts[tag] == [NASTY], tag
    assert page.texts["p"] == [NASTY, "second"]
    assert page.texts["th"] == ["name", NASTY]
    assert page.texts["td"] == [NASTY, "1,234", "b", "–"]
    assert page.texts["strong"] == [NASTY]
    assert "script" not in page.texts
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    kind, data = sources[0].split(",")
    assert len(sources) == 1 and kind == "data:image/svg+xml;base64"
    assert base64.b64decode(data).decode() == SVG
    assert ("alt", NASTY) in page.attributes
    assert not re.search(r"@import|url\(", page.texts["style"][0])


def _text(token) -> str:
    """Return the text of a Markdown token, or the alternative text of an image, without marks."""
    return "".join(map(_text, token.children)) if token.children else token.content


def test_markdown_holds_every_text_as_it_was():
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(_report(NASTY)))
    inline = [_text(token) for token in tokens if token.type == "inline"]
    assert inline == [
        NASTY,  # title
        f"{NASTY}: {NASTY}",
        NASTY,  # section
        NASTY,
        "second",
        *("name", NASTY, NASTY, "1,234", "b", "–", NASTY),
        NASTY,  # alternative text of the figure
        NASTY,
        f"Prompt: {NASTY}",
    ]
    assert [token.content for token in tokens if token.type == "fence"] == [NASTY + "\n"]


@pytest.mark.parametrize("command", ["python -m experiments.fit --csv='a b.csv'", NASTY])
def test_the_command_stands_under_each_figure(command):
    figures = (Figure("f-1", SVG, "one", "Seen."), Figure("f-2", SVG, "two"))
    report = Report("title", {}, (Section("section", figures=figures),), command)
    page = _Page(to_html(report))
    assert page.texts["code"] == [command, command]
    assert page.texts["figcaption"] == ["Seen." + command, command]
    tokens = MarkdownIt("commonmark").parse(to_markdown(report))
    codes = [c for t in tokens for c in t.children or () if c.type == "code_inline"]
    assert [code.content for code in codes] == [command, command]


@given(text=st.text(st.characters(exclude_categories=())))
def test_odd_text_neither_breaks_the_page_nor_a_fence(text):
    report = _report(text)
    page = to_html(report)
    page.encode()
    # What a page cannot hold is one U+FFFD each; HTML reads the line ends as they are.
    shown = "".join(
        "\ufffd"
        if (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000
        or c in "\ufffe\uffff"
        else c
        for c in text
    )  # fmt: skip
    assert _Page(page).texts["pre"] == ["\n" + shown * 2]
    markdown = to_markdown(report)
    markdown.encode()
    fences = [t for t in MarkdownIt("commonmark").parse(markdown) if t.type == "fence"]
    assert len(fences) == 1 and fences[0].content == shown + "\n"


def test_columns_of_numbers_align_right():
    table = Table(("a", "b", "c"), ((1, "1", None), (2.5, "x", None)))
    html = to_html(Report("", {}, (Section("", tables=(table,)),)))
    assert html.count('<th class="number">') == 1
    assert '<td class="number">2.500</td><td>x</td><td>–</td>' in html
    markdown = to_markdown(Report("", {}, (Section("", tables=(table,)),)))
    assert "| a | b | c |\n| --: | :-- | :-- |\n| 1 | 1 | – |" in markdown


def test_cells():
    assert format_cell(1234567) == "1,234,567"
    assert format_cell(1234.5678, 2) == "1,234.57"
    assert format_cell(math.nan) == format_cell(None) == "–"


def test_written_files_and_the_figures_beside_them(tmp_path):
    write_report(_report("a\ud800b"), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    image = re.search(r"\]\((.+\.svg)\)", (tmp_path / "report.md").read_text(encoding="utf-8"))[1]
    ElementTree.parse(tmp_path / image)
    twice = Section("t", figures=(Figure("f", SVG, ""), Figure("f", SVG, "")))
    with pytest.raises(ValueError, match="'f', 2 in the report"):
        write_report(Report("", {}, (twice,)), tmp_path)
    with pytest.raises(ValueError, match=r"'\.\./f'"):
        write_report(Report("", {}, (Section("t", figures=(Figure("../f", SVG, ""),)),)), tmp_path)


def test_bits_per_byte_table_puts_the_model_and_all_domains_first():
    table = bits_per_byte_table(BITS | {"ngram": {"prose": math.nan}})
    assert table.columns == ("Predictor", "all", "prose", "code")
    assert table.rows[0] == ("this model", 1.625, 2.0, 1.5)
    assert [row[0] for row in table.rows] == ["this model", "Kneser–Ney n-gram", "xz"]
    assert table.bold == {(0, 1), (0, 2), (2, 3)}


def test_wall_times_and_numbers():
    table = wall_time_table({"train": 90.0, "evaluate": 30.0, "total": 120.0})
    assert table.rows == (("train", 90.0, 75.0), ("evaluate", 30.0, 25.0))
    assert table.caption == "Together 2 min."
    assert wall_time_table({}).rows == ()
    assert [format_duration(s) for s in (0.2, 59.6, 3725)] == ["0 s", "1 min", "1 h 2 min 5 s"]
    assert [format_power(x) for x in (1.2345e15, 0.05)] == ["1.23 × 10¹⁵", "5.00 × 10⁻²"]


def test_model_table_shows_shape_counts_and_training():
    table = model_table(
        PRESETS["gpt2-124m"],
        num_params=124_439_808,
        num_active_params=123_653_376,
        flops_per_token=7.98e8,
        length_tokens=1024,
        num_tokens=10**9,
    )
    assert dict(table.rows) == {
        "parameters": "124,439,808",
        "of them multiplying each token (head, no lookup tables)": "123,653,376",
        "layers × width": "12 × 768",
        "vocabulary": "50,257",
        "length in tokens": "1,024",
        "training tokens, repeats counted": "1,000,000,000",
        "training FLOPs a token": "7.98 × 10⁸",
        "training FLOPs": "7.98 × 10¹⁷",
    }


def test_summary_has_stable_keys_and_is_strict_json(tmp_path):
    path = tmp_path / "summary.json"
    bits = BITS | {"xz_given_training": {"all": 1.5}, "ngram": {"all": math.inf}}
    write_summary(path, bits=bits, wall_seconds={"train": 2.5}, versions={"python": "3"})
    summary = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert summary == {
        "bits_per_byte": 1.625,
        "bits_per_byte_ngram": None,
        "bits_per_byte_xz": 1.75,
        "bits_per_byte_xz_given_training": 1.5,
        "bits_per_byte_by_domain": {
            "prose": {"model": 2.0, "ngram": None, "xz": 2.5, "xz_given_training": None},
            "code": {"model": 1.5, "ngram": None, "xz": 1.25, "xz_given_training": None},
        },
        "wall_seconds": {"train": 2.5},
        "versions": {"python": "3"},
    }
    with pytest.raises(ValueError, match="bits_per_byte_zip"):
        write_summary(path, bits=BITS, wall_seconds={}, bits_per_byte_zip=1.0)


def test_facts():
    hardware, versions = hardware_facts(), version_facts()
    assert hardware["CPU"] and hardware["accelerator"] == "none"
    assert int(hardware["CPU cores"].split()[0]) >= 1
    assert float(hardware["memory"].removesuffix(" GiB")) > 0.1
    assert versions["python"] == platform.python_version() and versions["jax"] == jax.__version__
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert versions.get("git commit", "")[:12] == head.stdout.strip()[:12]
