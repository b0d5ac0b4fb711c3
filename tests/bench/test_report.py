import itertools
import re
from html.parser import HTMLParser

import pytest

from tersor.bench.report import Answer, Figure, Sample, Section, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
SVG = '<svg><defs><path id="m" d="M0 0"/></defs><use href="#m"/><g clip-path="url(#m)"/></svg>'


class Page(HTMLParser):
    """Collects texts, attributes and ids, and fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not (self.open and self.open[-1] in {"style"}):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute):
        return [value for _, name, value in self.attributes if name == attribute]


@pytest.fixture
def render(tmp_path):
    def make(records, sections=()):
        path = tmp_path / "report" / "index.html"
        write_report(path, records, sections)
        return path.read_text(encoding="utf-8")

    return make


@pytest.fixture
def page(render, make_record):
    gpu = {"measured": None, "low": None, "high": None, "interval": None, "verdict": "not here: needs a GPU"}
    records = [
        make_record(),
        make_record(item="a detail", verdict=None, command="tersor bench kv --json"),
        make_record(system="zipvl", item="sparse prefill", seed=None, **gpu),
    ]
    sample = Sample(
        "A needle",
        "Call me Ishmael.",
        [Answer("full cache", "7342", True), Answer("recent", "?", False)],
        "Key?",
        "7342",
    )
    section = Section("ZipCache", "What it does.", [Figure(SVG, "One."), Figure(SVG, "Two.")], [sample])
    return render(records, [section])


def test_the_page_shows_every_value(page):
    text = Page(page).text
    for expected in (
        "zipcache", "mixed 4/2 bits, 60 % salient", "4.98x", "Table 3", "4.61x", "[4.58, 4.63]",
        "95% bootstrap", "1.00x", "3.20x uniform 4-bit", "✓ holds", "– not here: needs a GPU",
        "a detail",
        "What it does.", "One.", "Two.", "A needle", "Call me Ishmael.", "Key?", "7342 ✓ right", "? ✗ wrong",
        "tersor demo --only zipcache --json", "tersor bench kv --json", "Imaginary CPU", "2.13.0", "gpu none",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_page_is_whole_and_asks_no_server(page):
    parsed = Page(page)  # asserts nesting
    assert page.startswith("<!doctype html>")
    links = parsed.values("href") + parsed.values("src") + parsed.values("xlink:href")
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "script" not in parsed.tags and "iframe" not in parsed.tags
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page)


def test_ids_are_unique_and_every_reference_meets_one(page):
    parsed = Page(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    used = [link[1:] for link in parsed.values("href") if link.startswith("#")]
    used += parsed.values("aria-labelledby") + re.findall(r"url\(#([^)]+)\)", page)
    assert used and set(used) <= set(ids)


def test_accessible_basics(page):
    parsed = Page(page)
    assert parsed.values("lang") == ["en"]
    assert {"header", "main", "nav", "footer", "table"} <= set(parsed.tags)
    assert set(parsed.values("scope")) == {"row", "col"}
    levels = [int(tag[1]) for tag in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), "a heading is skipped"


def test_all_text_is_escaped(render, make_record):
    evil = "<script>alert('x')</script>&\"<b>"
    record = make_record(
        item=evil, quantity=evil, peer_name=evil, claim=evil, claim_source=evil, command=evil,
        model=evil, shapes=evil, system=evil, unit=evil, machine={evil: evil}, versions={evil: evil},
    )  # fmt: skip
    section = Section(evil, evil, [Figure(SVG, evil)], [Sample(evil, evil, [Answer(evil, evil)], evil, evil)])
    html = render([record], [section])
    parsed = Page(html)
    assert "script" not in parsed.tags and "b" not in parsed.tags
    assert parsed.text.count(" ".join(evil.split())) >= 15


def test_light_and_dark_text_has_contrast(page):
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        pairs = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("accent", "card")]
        pairs += [(name, f"{name}-back") for name in ("good", "fair", "poor", "none")]
        for front, back in pairs:
            assert contrast(colours[front], colours[back]) >= 4.5, (front, back)


def contrast(a, b):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_each_machine_is_named_once(render, make_record):
    other = {"cpu": "Another CPU", "gpu": "Imaginary GPU"}
    text = Page(render([make_record(), make_record(item="b"), make_record(item="c", machine=other)])).text
    assert text.count("Imaginary CPU") == 1
    assert "Another CPU" in text and "Imaginary GPU" in text


def test_a_failure_keeps_the_old_page(tmp_path, make_record):
    path = tmp_path / "index.html"
    write_report(path, [make_record()])
    old = path.read_text()
    with pytest.raises(ValueError, match="no records"):
        write_report(path, [])
    with pytest.raises(Exception, match="no attribute"):
        write_report(path, [make_record()], ["not a section"])
    assert path.read_text() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]


def test_a_figure_must_be_a_picture():
    with pytest.raises(ValueError, match="starts with <svg"):
        Figure("figure.svg", "a path is not a picture")


def test_a_real_plot_goes_in(render, make_record):
    pytest.importorskip("matplotlib")
    from tersor.bench.plots import Point, plot_quality_vs_bytes

    svg = plot_quality_vs_bytes(
        [Point("a", 1, 2, 1, 3, "f"), Point("b", 2, 2, 1, 3, "g")], x_label="x", y_label="y", description="d"
    )
    html = render([make_record()], [Section("s", "i", [Figure(svg, "1"), Figure(svg, "2")])])
    parsed = Page(html)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    uses = [link[1:] for link in parsed.values("xlink:href") + parsed.values("href") if link.startswith("#")]
    assert set(uses) <= set(ids)
