"""Finished batches give the same file, however they were cut, whoever wrote them and whatever was lost."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench.judge import Cost
from bench.outcome import Batch, Outcome
from bench.parts import Parts

COLUMNS = ["clean", "fgsm-0.1", "pgd-10"]


def batch(index, columns=COLUMNS):
    """A batch whose outcomes are a function of image and column."""
    index = np.asarray(index)

    def outcome(column):
        image = torch.from_numpy(index)
        place = COLUMNS.index(column)
        robust = (image + place) % 3 != 0
        start = torch.where(robust, -1, place)
        return Outcome((image + ~robust) % 10, robust, start, 2 * start)

    costs = {
        name: Cost(gradients=len(index), forwards=2 * len(index), seconds=0.5) for name in ("clean", "pgd")
    }
    return Batch(index, index % 10, {name: outcome(name) for name in columns}, costs)


def written(folder, *batches):
    parts = Parts(folder)
    for index in batches:
        parts.add(batch(index))
    return parts


def rows(parts):
    return pd.read_parquet(io.BytesIO(parts.outcomes(COLUMNS)))


WHOLE = range(12)


def test_outcomes_hold_a_row_for_every_image_and_column_in_order(tmp_path):
    table = rows(written(tmp_path, [3, 4], [0, 1, 2]))
    assert list(table.columns) == [
        *("index", "label", "column", "prediction", "robust", "restart", "step", "share", "selected")
    ]
    assert table["index"].tolist() == [i for i in range(5) for _ in COLUMNS]
    assert table["column"].tolist() == COLUMNS * 5
    assert (table["label"] == table["index"] % 10).all()
    expected = [(i + COLUMNS.index(c)) % 3 != 0 for i in range(5) for c in COLUMNS]
    assert table["robust"].tolist() == expected
    assert table["restart"].tolist() == [
        -1 if r else COLUMNS.index(c) for r, c in zip(expected, COLUMNS * 5, strict=True)
    ]


@pytest.mark.parametrize(
    "batches",
    [
        [range(0, 5), range(5, 10), range(10, 12)],
        [range(6, 12), range(0, 6)],
        [[0, 11], [5], [1, 2, 3, 4, 6, 7, 8, 9, 10]],
        [[i] for i in reversed(WHOLE)],
        [range(0, 8), range(4, 12)],
        [range(0, 12), range(0, 12)],
    ],
    ids=["in order", "backwards", "scattered", "one by one", "overlapping", "twice"],
)
@pytest.mark.parametrize("read_again", [False, True])
def test_outcomes_are_the_same_bytes_however_the_images_were_cut(tmp_path, batches, read_again):
    expected = written(tmp_path / "whole", WHOLE).outcomes(COLUMNS)
    parts = written(tmp_path / "cut", *batches)
    if read_again:
        parts = Parts(tmp_path / "cut")
    assert parts.outcomes(COLUMNS) == expected


def test_columns_stand_in_the_protocols_order_whatever_the_batches_say(tmp_path):
    other = Parts(tmp_path / "other")
    other.add(batch(WHOLE, columns=COLUMNS[::-1]))
    assert other.outcomes(COLUMNS) == written(tmp_path / "one", WHOLE).outcomes(COLUMNS)


def test_what_is_finished_is_known_to_the_next_process(tmp_path):
    written(tmp_path, [7, 8], [2, 3])
    assert Parts(tmp_path).done().tolist() == [2, 3, 7, 8]


def test_nothing_is_finished_in_a_folder_that_is_not_there(tmp_path):
    parts = Parts(tmp_path / "none")
    assert parts.done().tolist() == [] and parts.done().dtype == int and parts.costs() == {}


def test_costs_are_added_up_over_batches_and_processes(tmp_path):
    written(tmp_path, [0, 1, 2], [3, 4])
    parts = Parts(tmp_path)
    parts.add(batch([5]))
    assert parts.costs() == {name: Cost(gradients=6, forwards=12, seconds=1.5) for name in ("clean", "pgd")}


def test_two_processes_that_do_the_same_images_agree(tmp_path):
    first, second = Parts(tmp_path), Parts(tmp_path)
    first.add(batch(range(0, 6)))
    second.add(batch(range(0, 4)))
    second.add(batch(range(4, 12)))
    first.add(batch(range(6, 12)))
    expected = written(tmp_path / "alone", WHOLE).outcomes(COLUMNS)
    assert (
        first.outcomes(COLUMNS) == second.outcomes(COLUMNS) == Parts(tmp_path).outcomes(COLUMNS) == expected
    )


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PAR1" * 9]
)
def test_a_file_that_cannot_be_read_was_never_finished(tmp_path, damage):
    written(tmp_path, range(0, 6), range(6, 12))
    first, _ = sorted(tmp_path.glob("*.parquet"))
    first.write_bytes(damage(first.read_bytes()))
    parts = Parts(tmp_path)
    assert parts.done().tolist() == list(range(6, 12))
    assert not first.exists()


@pytest.mark.parametrize("metadata", [{}, {"costs": "{}"}])
def test_a_file_of_another_form_was_never_finished(tmp_path, metadata):
    written(tmp_path, [0])
    other = pa.table({"index": np.array([1], np.int32), "robust": [True]}, metadata=metadata)
    pq.write_table(other, tmp_path / "other.parquet")
    assert Parts(tmp_path).done().tolist() == [0]


def test_a_file_that_is_still_being_written_is_left_alone(tmp_path):
    half = tmp_path / ".0000000-0000005-6.parquet.x7y8"
    half.write_bytes(b"PAR1")
    assert Parts(tmp_path).done().tolist() == []
    assert half.read_bytes() == b"PAR1"


def test_a_folder_that_another_process_removed_is_made_anew(tmp_path):
    parts, other = written(tmp_path / "parts", [0]), Parts(tmp_path / "parts")
    other.remove()
    parts.add(batch([1]))
    assert rows(parts)["index"].unique().tolist() == [0, 1]


def test_labels_and_predictions_may_be_larger_than_a_short_integer(tmp_path):
    parts, big = Parts(tmp_path), 40_000
    outcome = Outcome(torch.tensor([big]), torch.tensor([True]), torch.tensor([-1]), torch.tensor([-1]))
    parts.add(Batch(np.array([0]), np.array([big]), {"clean": outcome}, {}))
    table = pd.read_parquet(io.BytesIO(parts.outcomes(["clean"])))
    assert table["label"].tolist() == table["prediction"].tolist() == [big]


def test_removed_parts_are_gone_and_removing_them_again_does_nothing(tmp_path):
    parts = written(tmp_path / "parts", [0])
    parts.remove()
    parts.remove()
    assert not (tmp_path / "parts").exists()
