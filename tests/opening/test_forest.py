from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from tersor.opening.forest import forest


def test_marks_stand_where_the_figures_say_and_names_are_text() -> None:
    rows = [
        ("a & <b>", {"value": 10.0, "low": 0.0, "high": 20.0}),
        ("c", {"value": 20.0, "low": 10.0, "high": 30.0}),
        ("nothing", {"value": None, "low": None, "high": None}),
    ]
    svg = forest(rows, 'Of "models"', ".0f")
    ET.fromstring(svg)
    assert "nothing" not in svg and "a &amp; &lt;b&gt;" in svg
    (one, two) = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    low, high = (float(x) for x in re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', svg)[0])
    ends = [float(x) for pair in re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"', svg) for x in pair]
    assert (min(ends), max(ends)) == (190.0, 660.0), "the plot is as wide as its place, whatever the figures"
    assert low < one < high and abs((one - low) - (high - one)) < 0.2
    assert abs((two - one) - (one - low)) < 0.2, "ten units are ten units"


def test_figures_that_are_all_equal_or_none_make_a_plot_too() -> None:
    ET.fromstring(forest([("a", {"value": 1.0, "low": 1.0, "high": 1.0})], "d", ".1f"))
    ET.fromstring(forest([], "d", ".1f"))
