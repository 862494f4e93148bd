"""What the page says of a mixture's gate: means by class, entropies and experts alone, of images clean and attacked."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from made_up import found, gate, run

from bench import report
from bench.errors import UsageError
from bench.record import Facts

SOFT = Facts(mixture="soft")


@pytest.fixture(autouse=True)
def without_vega(monkeypatch):
    monkeypatch.setattr(report, "_vega", lambda: "")


def made(results):
    (entry,) = report.entries(results)
    return entry.gate


def by_class(n=40, experts=10):
    """Weights of a gate that gives nearly all of an image to the expert of its class."""
    return np.where(np.arange(n)[:, None] % 10 == np.arange(experts), 0.91, 0.01)


def test_the_mean_weight_of_each_class_is_shown_clean_and_attacked(tmp_path):
    weights = {"clean": by_class(), "attacked": np.full((40, 10), 0.1)}
    run(tmp_path, model=SOFT, experts=gate(weights))
    clean, attacked = made(tmp_path).seen
    assert (clean.at, attacked.at) == ("clean", "attacked")
    for place, row in enumerate(clean.classes):
        assert row.name == str(place) and row.images == 4
        assert row.weights == pytest.approx([91.0 if expert == place else 1.0 for expert in range(10)])
    assert all(row.weights == pytest.approx([10.0] * 10) for row in attacked.classes)
    assert clean.whole.weights == pytest.approx([10.0] * 10) and clean.whole.images == 40


def test_entropies_tell_one_expert_from_all_alike(tmp_path):
    alike = np.full((40, 4), 0.25)
    chosen = np.eye(4)[np.arange(40) % 4]
    run(tmp_path, model=SOFT, experts=gate({"clean": chosen, "attacked": alike}))
    one = made(tmp_path)
    clean, attacked = one.seen
    assert one.bits == 2
    assert (clean.entropy, clean.spread) == pytest.approx((0, 2))
    assert (attacked.entropy, attacked.spread) == pytest.approx((2, 2))


def test_images_whose_foremost_expert_changed_are_counted(tmp_path):
    clean = np.eye(4)[np.zeros(40, dtype=int)]
    attacked = np.eye(4)[np.repeat([0, 3], [30, 10])]
    run(tmp_path, model=Facts(mixture="hard"), experts=gate({"clean": clean, "attacked": attacked}))
    one = made(tmp_path)
    assert one.hard and [seen.moved for seen in one.seen] == [None, 25.0]


def test_only_images_that_were_seen_clean_can_have_moved(tmp_path):
    attacked = gate({"attacked": np.eye(2)[[1, 1, 0, 0]]})
    clean = gate({"clean": np.eye(2)[[0, 1]]})
    # in no order that a reader could rely on
    run(tmp_path, model=SOFT, experts=pd.concat([clean, attacked]).sample(frac=1, random_state=0))
    assert made(tmp_path).seen[1].moved == 50.0


def test_each_expert_alone_has_its_accuracy_with_an_interval(tmp_path):
    right = np.arange(40)[:, None] < [40, 30, 0]
    run(tmp_path, model=SOFT, experts=gate({"clean": np.full((40, 3), 1 / 3)}, right))
    alone = made(tmp_path).seen[0].alone
    assert [one.accuracy for one in alone] == [100, 75, 0]
    assert alone[0].ci_high == 100 and alone[2].ci_low == 0
    assert alone[1].ci_low == pytest.approx(59.8, abs=0.1) and alone[1].ci_high == pytest.approx(
        85.8, abs=0.1
    )


def test_the_page_shows_each_number_in_a_table_under_a_heat_map_of_one_scale(tmp_path):
    run(tmp_path, model=SOFT, experts=gate({"clean": by_class(), "attacked": np.full((40, 10), 0.1)}))
    page = report.render(tmp_path)
    scales = [json.loads(said) for said in re.findall(r"data-heat='(.+?)'", page)]
    assert [said["most"] for said in scales] == pytest.approx([91.0, 91.0])
    assert page.count('class="source"') == 2
    assert '<th scope="row">3</th><td>1.0</td><td>1.0</td><td>1.0</td><td>91.0</td>' in page
    assert "do not hold which expert" not in page


def test_a_gate_is_that_of_the_first_seed_that_tells(tmp_path):
    run(tmp_path, model=SOFT)
    run(tmp_path, model=SOFT, seed=1, experts=gate({"clean": by_class()}))
    assert made(tmp_path).seed == 1


def test_of_a_void_run_no_gate_is_shown(tmp_path):
    doubts = [found("NaN", severity="blocks")]
    run(tmp_path, model=SOFT, experts=gate({"clean": by_class()}), findings=doubts)
    assert made(tmp_path) is None and "Gate usage" not in report.render(tmp_path)


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (lambda table: table.iloc[:-1], "does not tell of each of 10 experts for every image of 'clean'"),
        (
            lambda table: table.replace({"at": {"clean": "dirty"}}),
            "tells of neither clean nor attacked images",
        ),
    ],
)
def test_a_table_that_is_not_whole_is_refused(tmp_path, spoilt, said):
    run(tmp_path, model=SOFT, experts=spoilt(gate({"clean": by_class()})))
    with pytest.raises(UsageError, match=said):
        report.entries(tmp_path)
