from __future__ import annotations

from collections import Counter

import pytest
from arena_verdicts import drawn, exchanged, verdict

from tersor._errors import TersorError
from tersor.opening.agreement import (
    MODES,
    UNSEEN_OFFICIAL,
    agreement_table,
    confusion,
    halves,
    kappa,
    kendall,
    matched,
    topic_table,
)  # fmt: skip
from tersor.opening.records import Label, Verdict

GPT, ANOLE, EMU, SHOW = "GPT-4o+DALL-E3", "Anole", "Emu2", "Show-o"
#: (a, b, the reference's label, the judge's label); by hand below.
CASES: list[tuple[str, str, Label, Label]] = [
    (GPT, EMU, "A", "A"), (GPT, SHOW, "A", "Tie(A)"), (ANOLE, EMU, "Tie(A)", "Tie(B)"), (ANOLE, SHOW, "B", "B"),
    (EMU, SHOW, "Tie(B)", "B"), (EMU, SHOW, "B", "A"), (SHOW, EMU, "Tie(A)", "Tie(A)"), (GPT, ANOLE, "A", "B"),
]  # fmt: skip


def judged() -> tuple[list[Verdict], list[Verdict]]:
    rows = [(f"01010{n:02d}", *case) for n, case in enumerate(CASES)]
    reference = [verdict(uid, a, b, label) for uid, a, b, label, _ in rows]
    # Stored the other way round: agreement must see through it.
    return [verdict(uid, a, b, label).flipped() for uid, a, b, _, label in rows], reference


def shares(table: dict) -> dict[str, list[float | None]]:
    return {
        mode: [row.average and row.average.value, row.seen and row.seen.value, row.unseen and row.unseen.value,
               row.harmonic] for mode, row in table.items()
    }  # fmt: skip


def test_the_table_is_that_worked_out_by_hand() -> None:
    pairs = matched(*judged())
    table = agreement_table(pairs, [GPT, ANOLE])
    # FDT agrees in cases 0, 1, 3, 4, 6 of 8; seen are 4, 5, 6: 2 of 3, unseen 3 of 5.
    # With ties: 0, 2, 3, 6 of 8; seen 1 of 3, unseen 3 of 5. Without: 0, 3 of 0, 3, 5, 7; seen 0 of 1, unseen 2 of 3.
    assert shares(table) == {
        "fdt": pytest.approx([5 / 8, 2 / 3, 3 / 5, 2 * (2 / 3) * (3 / 5) / (2 / 3 + 3 / 5)]),
        "with_ties": pytest.approx([4 / 8, 1 / 3, 3 / 5, 2 * (1 / 3) * (3 / 5) / (1 / 3 + 3 / 5)]),
        "without_ties": pytest.approx([2 / 4, 0.0, 2 / 3, 0.0]),
    }
    assert [table[mode].n for mode in MODES] == [(8, 3, 5), (8, 3, 5), (4, 1, 3)]


def test_the_misspelt_published_list_is_refused_unless_it_is_asked_for() -> None:
    pairs = matched(*judged())
    with pytest.raises(TersorError, match=r"'GPT-4\+DALL-E3' is in no battle.*--unseen-official"):
        agreement_table(pairs, UNSEEN_OFFICIAL)
    table = agreement_table(pairs, as_published=True)
    # GPT-4o+DALL-E3 counts as seen, so only the battles of Anole are unseen: cases 2, 3, 7.
    assert table["fdt"].n == (8, 5, 3)
    assert shares(table)["fdt"][1:3] == pytest.approx([4 / 5, 1 / 3])


def test_a_judge_agrees_with_itself_in_every_mode_and_agreement_is_symmetric() -> None:
    one, other = drawn(1, 150, ties=0.7), drawn(1, 150, ties=0.7, first=2.0)
    own = agreement_table(matched(one, exchanged(one)))
    assert all(row.average and row.average.value == 1 for row in own.values()) and kappa(matched(one, one)) == 1
    there, back = agreement_table(matched(one, other)), agreement_table(matched(other, one))
    assert shares(there) == shares(back)
    assert kappa(matched(one, other)) == pytest.approx(kappa(matched(other, one)))
    assert shares(agreement_table(matched(exchanged(one), exchanged(other)))) == shares(there)


def test_the_harmonic_mean_lies_between_its_parts() -> None:
    row = agreement_table(matched(drawn(2, 150, ties=0.7), drawn(3, 150, ties=0.7)), ["model 00"])["fdt"]
    assert row.seen is None or row.unseen is None or row.harmonic is None or (
        min(row.seen.value, row.unseen.value) <= row.harmonic <= max(row.seen.value, row.unseen.value)
    )  # fmt: skip
    table = agreement_table(matched(*judged()), [ANOLE])["fdt"]
    assert table.seen and table.unseen and table.harmonic
    assert min(table.seen.value, table.unseen.value) < table.harmonic < max(table.seen.value, table.unseen.value)


def test_kappa_is_that_worked_out_by_hand_and_none_where_chance_explains_all() -> None:
    reference = [verdict(str(n), "x", "y", label) for n, label in enumerate(["A"] * 6 + ["B"] * 4)]  # type: ignore[arg-type]
    judge = [verdict(str(n), "x", "y", label) for n, label in enumerate(["A"] * 8 + ["B"] * 2)]  # type: ignore[arg-type]
    # Both ways round A and B are equally frequent, so chance is a half; they agree in 8 of 10.
    assert kappa(matched(judge, reference)) == pytest.approx((0.8 - 0.5) / 0.5)
    ties = [verdict(str(n), "x", "y", "Tie(A)") for n in range(5)]
    assert kappa(matched(ties, ties)) is None and kappa([]) is None


def test_confusion_counts_every_pair_of_labels() -> None:
    found = confusion(matched(*judged()))
    counts = Counter((reference, judge) for _, _, reference, judge in CASES)
    assert {(r, j): n for r, row in found.items() for j, n in row.items() if n} == dict(counts)


def test_topics_have_their_own_agreement() -> None:
    reference = [verdict(f"{n}", "x", "y", "A", task=f"0{1 + n % 2}.01") for n in range(10)]
    judge = [verdict(f"{n}", "x", "y", "A" if n % 2 else "B", task="?") for n in range(10)]
    found = topic_table(matched(judge, reference))
    assert {topic: (share and share.value, n) for topic, (share, n) in found.items()} == {"01": (0, 5), "02": (1, 5)}


def test_battles_that_only_one_decided_do_not_count() -> None:
    judge, reference = judged()
    assert len(matched(judge[:3], reference)) == 3 and matched([], reference) == []
    empty = agreement_table([])
    assert all(row.average is None and row.harmonic is None for row in empty.values())


def test_rankings_of_two_runs_are_compared() -> None:
    verdicts = drawn(4, 1000)
    first, second = halves(verdicts)
    assert {v.uid for v in first}.isdisjoint(v.uid for v in second) and abs(len(first) - len(second)) < 300
    tau = kendall(first, second)
    assert tau is not None and 0.6 < tau <= 1
    assert kendall(verdicts, verdicts) == 1
    one = [verdict("1", "x", "y", "A")]
    assert kendall(one, [verdict("1", "x", "y", "B")]) == -1 and kendall(one, []) is None
