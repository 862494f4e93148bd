"""What the page says of images that fell: each counted once, under the attack, the step and the answer that took it."""

import numpy as np
import pytest
from made_up import paper_columns, run

from bench import report
from bench.report import falls


@pytest.fixture(autouse=True)
def without_vega(monkeypatch):
    monkeypatch.setattr(report, "_vega", lambda: "")


def made(results):
    (entry,) = report.entries(results)
    return entry.falls


def test_images_are_charged_to_the_first_attack_that_breaks_them(tmp_path):
    run(tmp_path, {"clean": 190, "fgsm-0.09": 150, "pgd-10": 120})
    found = made(tmp_path)
    assert [(line.column, line.images) for line in found.lines] == [("fgsm-0.09", 40), ("pgd-10", 30)]
    first = found.listed[0]
    assert (first.image, first.column, first.label, first.prediction) == (150 * 3, "fgsm-0.09", "0", "1")


def test_steps_are_counted_in_spans_that_double(tmp_path):
    steps = [0, 1, 2, 3, 4, 7, 8, 100, 100, -1]
    run(
        tmp_path,
        {"clean": 10, "pgd-50": 0},
        n=10,
        columns=[*paper_columns()[:1], paper_columns()[14]],
        step=steps,
    )
    found = made(tmp_path)
    spans = dict(zip(found.spans, found.lines[0].counts, strict=True))
    assert spans == {"0": 1, "1": 1, "2–3": 2, "4–7": 2, "8–15": 1, "16–31": 0, "32–63": 0, "64–127": 2}
    assert (found.lines[0].untold, found.lines[0].images) == (1, 10)


def test_an_attack_that_tells_no_step_leaves_no_span(tmp_path):
    run(tmp_path, {"pgd-50": 190}, step=-1)
    found = made(tmp_path)
    assert found.spans == () and found.lines[0].untold == found.lines[0].images == 10
    assert "data-bars>" not in report.render(tmp_path)


def test_starts_after_the_first_are_counted(tmp_path):
    run(tmp_path, {"ms-pgd-100": 0}, n=6, restart=[0, 0, 1, 2, 2, 0])
    assert made(tmp_path).lines[0].later == 3


def test_answers_are_counted_by_class(tmp_path):
    taken_for = np.tile([3, 3, 3, 4, 5, 6, 7, 8, 9, 0], 2)
    run(tmp_path, {"pgd-10": 0}, n=20, read_as=taken_for)
    answers = made(tmp_path).answers
    counts = {
        (label, read): n
        for label, row in zip(answers.classes, answers.counts, strict=True)
        for read, n in zip(answers.classes, row, strict=True)
        if n
    }
    # class 3 alone is read as it should be followed: as 4
    assert counts[("0", "3")] == counts[("1", "3")] == counts[("2", "3")] == counts[("3", "4")] == 2
    assert sum(counts.values()) == 20


def test_of_many_classes_the_commonest_mistakes_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(falls, "FIT", 9)
    run(tmp_path, {"pgd-10": 0}, n=23)
    answers = made(tmp_path).answers
    assert answers.counts == () and answers.commonest[:3] == (("0", "1", 3), ("1", "2", 3), ("2", "3", 3))
    assert answers.commonest[3] == ("3", "4", 2)


def test_an_answer_beyond_the_classes_is_shown_by_its_number(tmp_path):
    run(tmp_path, {"pgd-10": 0}, n=10, read_as=[999] * 10)
    assert made(tmp_path).listed[0].prediction == "999"


def test_where_only_final_iterates_were_seen_the_page_says_so(tmp_path):
    said = "Only final iterates were looked at"
    run(tmp_path / "last", {"pgd-10": 0}, protocol={"name": "mine", "success": "last"})
    run(tmp_path / "any", {"pgd-10": 0}, protocol={"name": "mine", "success": "any"})
    assert said in report.render(tmp_path / "last") and said not in report.render(tmp_path / "any")


def test_nothing_fell_where_all_held(tmp_path):
    run(tmp_path)
    assert made(tmp_path) is None and "None that was right clean." in report.render(tmp_path)
