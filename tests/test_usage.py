"""Which expert does the work: rows with known weights, the same bytes however a run was cut, sums with known answers."""

import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from made_up import run
from routed_toys import RouteToy
from test_parts import batch

from bench.data import Split
from bench.errors import UsageError
from bench.evaluate import Evaluator
from bench.experts import used
from bench.parts import Parts
from bench.plan import plan
from bench.protocol import Column
from bench.record import read
from bench.usage import ATTACKED, CLEAN, SCHEMA, entropy, usage

SIX = torch.arange(6)


class Thirds:
    """Three experts of the classes 0, 1, 2, each of which says its own number; weights 0.2, 0.3, 0.5."""

    soft = True
    experts_count = 3

    def gate(self, x):
        return torch.tensor([0.2, 0.3, 0.5]).log().expand(len(x), 3)

    def all_outputs(self, x):
        assert len(x), "no empty batch"
        return torch.eye(3).expand(len(x), 3, 3)

    def selected(self, x):
        return self.gate(x).argmax(1)


def rows(at=CLEAN, n=6, at_once=None):
    return used(Thirds(), torch.rand(n, 3, 4, 4), SIX[:n] % 3, np.arange(n), at, at_once).to_pandas()


@pytest.mark.parametrize("at_once", [None, 1, 4, 100])
def test_a_row_says_what_an_expert_weighs_and_whether_it_alone_is_right(at_once):
    table = rows(at_once=at_once)
    assert table["index"].tolist() == [i for i in range(6) for _ in range(3)]
    assert table["expert"].tolist() == [0, 1, 2] * 6
    assert table["weight"].tolist() == pytest.approx([0.2, 0.3, 0.5] * 6)
    assert table["right"].tolist() == [expert == i % 3 for i in range(6) for expert in range(3)]


def test_no_image_gives_no_row():
    assert (
        rows(n=0).empty
        and used(Thirds(), torch.rand(0, 3, 4, 4), SIX[:0], np.arange(0), CLEAN, None).schema == SCHEMA
    )


def test_a_hard_gate_gives_the_chosen_expert_everything():
    x = RouteToy.images(4)
    x[2:, 0] += 0.2
    table = used(RouteToy(), x, torch.zeros(4, dtype=torch.int64), np.arange(4), CLEAN, None).to_pandas()
    assert table["weight"].tolist() == [1, 0, 1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("weights", "share"),
    [([0.25] * 4, 1), ([1, 0, 0, 0], 0), ([0.5, 0.5, 0, 0], 0.5), ([1.0], 0)],
    ids=["all alike", "one", "two of four", "there is but one"],
)
def test_entropy_is_a_share_of_the_largest_there_can_be(weights, share):
    assert entropy(np.array([weights], dtype=float))[0] == pytest.approx(share)


def test_load_and_single_experts_are_means_over_images():
    seen = usage(rows(), CLEAN)
    assert seen.load == pytest.approx([0.2, 0.3, 0.5]) and seen.alone == pytest.approx([1 / 3] * 3)
    assert seen.of_class(2).alone.tolist() == [0, 0, 1]
    assert seen.load_entropy == pytest.approx(seen.entropy.mean())


@pytest.mark.parametrize(
    "batches", [[range(4, 12), range(4)], [[i] for i in range(12)], [range(8), range(4, 12)]]
)
@pytest.mark.parametrize("read_again", [False, True])
def test_experts_are_the_same_bytes_however_the_images_were_cut(tmp_path, batches, read_again):
    def parts(folder, cut):
        made = Parts(folder)
        for index in cut:
            one = batch(index)
            n = len(one.index)
            one.experts = used(
                Thirds(), torch.rand(n, 3, 4, 4), torch.from_numpy(one.labels) % 3, one.index, CLEAN, None
            )
            made.add(one)
        return Parts(folder) if read_again else made

    whole = parts(tmp_path / "whole", [range(12)]).experts()
    assert parts(tmp_path / "cut", batches).experts() == whole
    assert len(pq.read_table(io.BytesIO(whole))) == 36


def test_a_batch_that_tells_nothing_of_experts_leaves_the_run_without(tmp_path):
    made = Parts(tmp_path)
    made.add(batch(range(3)))
    assert made.experts() is None


def test_a_run_asks_about_clean_images_and_about_what_became_of_those_it_attacked():
    x = RouteToy.images(12)
    model = RouteToy(guard=0.02)
    y = model.labels(x)
    y[0] = 1 - y[0]
    split = Split((x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y.numpy())
    clean = Column(name="clean", attack="clean", family="clean")
    route = Column(name="per-route", attack="per-route", family="mixture", eps=0.05, steps=8, step_size=0.02)
    evaluator = Evaluator(model, classes=2, split=split, seed=0, success="any")
    done = evaluator.run(plan([clean, route]), np.arange(12))
    table = done.experts.to_pandas()
    before, after = usage(table, CLEAN), usage(table, ATTACKED)
    # image 0 is misclassified as it stands; all others are sent down the wrong pathway
    assert len(before.labels) == 12 and len(after.labels) == 11
    assert before.load.tolist() == [1, 0] and after.load.tolist() == [0, 1]
    assert not done.outcomes["per-route"].robust.any()


def test_a_mixture_that_fails_when_asked_voids_the_run():
    class Fails(RouteToy):
        def gate(self, x):
            if self.asked:
                raise RuntimeError("no gate today")
            return super().gate(x)

        def selected(self, x):
            return super().gate(x).argmax(1)

    x = RouteToy.images(4)
    model = Fails()
    model.asked = False
    y = model.labels(x)
    split = Split((x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y.numpy())
    evaluator = Evaluator(model, classes=2, split=split, seed=0, success="any")
    columns = [
        Column(name="clean", attack="clean", family="clean"),
        Column(name="fgsm", attack="fgsm", family="fgsm", eps=0.01),
    ]
    evaluator.run(plan(columns), np.arange(4))
    model.soft = model.asked = True
    with pytest.raises(Exception, match=r"asked for its gate and its experts.*no gate today"):
        evaluator.run(plan(columns), np.arange(4))


def kept(results, damage=lambda content: content):
    """A finished run whose experts are known, the file then damaged."""
    record = run(results, defense="dwf", experts=rows())
    path = record._folder / "experts.parquet"
    path.write_bytes(damage(path.read_bytes()))
    return read(record._folder)


def test_a_record_reads_its_experts(tmp_path):
    pd.testing.assert_frame_equal(kept(tmp_path).experts(), rows(), check_dtype=False)


def test_a_record_of_no_mixture_has_none(tmp_path):
    assert run(tmp_path, defense="pgd_at").experts() is None


def test_a_damaged_file_is_no_file_of_this_record(tmp_path):
    with pytest.raises(UsageError, match="not what its record was written with"):
        kept(tmp_path, damage=lambda content: content[:-9] + b"123456789").experts()


def test_a_missing_file_is_named(tmp_path):
    record = kept(tmp_path)
    (record._folder / "experts.parquet").unlink()
    with pytest.raises(UsageError, match=r"experts\.parquet is missing"):
        record.experts()
