import io

import pytest
from rich.console import Console

from tersor.bench.scoreboard import (
    by_system,
    format_number,
    format_peer,
    format_value,
    print_scoreboard,
)


@pytest.fixture
def records(make_record):
    gpu = {"measured": None, "low": None, "high": None, "interval": None, "verdict": "not here: needs a GPU"}
    return [
        make_record(item="a detail that came first", quantity="answers right", verdict=None, unit="%"),
        make_record(item="the headline", verdict="partly"),
        make_record(system="zipvl", item="sparse prefill", claim="2.6x faster", **gpu),
        make_record(item="a late detail", verdict="fails"),
    ]


def render(records, width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_scoreboard(records, console)
    return console.export_text()


def test_groups_keep_order_and_lead_with_the_first_verdict(records):
    groups = by_system(records)
    assert [[row.item for row in group.rows] for group in groups] == [
        ["the headline", "a detail that came first", "a late detail"],
        ["sparse prefill"],
    ]


def test_without_any_verdict_the_first_record_leads(make_record):
    (group,) = by_system([make_record(item=item, verdict=None) for item in ("one", "two")])
    assert (group.headline.item, [row.item for row in group.details]) == ("one", ["two"])


@pytest.mark.parametrize("width", [80, 99, 100, 120, 160])
def test_the_table_fits_and_shows_every_value(records, width):
    text = render(records, width)
    assert max(map(len, text.splitlines())) <= width
    # Each value is looked for in its own column, since neighbours wrap between its lines.
    for value in ("4.61x", "[4.58, 4.63]", "~ partly", "✗ fails", "1.00x"):
        assert value in text
    for word in ("zipcache", "zipvl", "headline", "4.98x", "2.6x", "3.20x", "compression", "GPU", "[4.58,"):
        assert word in text
    assert text.count("zipcache") == 1, "a system is named once, on its headline"
    assert text.index("the headline") < text.index("a detail") < text.index("a late")


def test_a_wide_table_has_the_count_and_a_narrow_one_keeps_the_comparison(make_record):
    record = make_record(n=12345)
    assert "12,345" in render([record], 120)
    narrow = render([record], 80)
    assert "12,345" not in narrow
    assert "paper 4.98x" in narrow and "base 1.00x" in narrow and "3.20x" in narrow


def test_brackets_are_text_and_not_markup(make_record):
    assert "[red]not a colour[/red]" in render([make_record(item="[red]not a colour[/red]", quantity="q")], 140)


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="no records"):
        print_scoreboard([])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (0, "0.000"), (0.00012, "0.00012"), (0.9876, "0.988"), (1, "1.00"), (4.985, "4.99"),
        (12.34, "12.3"), (-12.34, "-12.3"), (100, "100"), (1234567.8, "1,234,568"),
    ],
)  # fmt: skip
def test_numbers_keep_about_three_digits(value, shown):
    assert format_number(value) == shown


def test_units_and_peers(make_record):
    assert format_value(97.5, "%") == "97.5%"
    assert format_value(12, "ms") == "12.0 ms"
    assert format_value(0.5, "") == "0.500"
    assert format_value("41.62 → 41.24", "%") == "41.62 → 41.24"
    assert format_value(None, "x") == "–"
    assert format_peer(make_record()) == "3.20x uniform 4-bit"
    assert format_peer(make_record(peer=None, peer_name=None)) == "–"


def test_a_share_is_shown_in_percent_with_its_interval(make_record):
    record = make_record(unit="share", measured=0.85, low=0.8, high=0.9, interval="95% bootstrap", claim=None)
    assert format_value(record.measured, record.unit) == "85.0%"
    assert "[80.0, 90.0]" in render([record], 120) and "share" not in render([record], 120)


def test_words_that_rows_use_are_explained_below_the_table(make_record):
    text = render([make_record(item="by raster", quantity="images a second")], 120)
    assert "raster: writing an image token after token" in text and "PAR-4X" not in text
