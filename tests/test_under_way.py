"""While it attacks, a run says what is being done and how much is left standing."""

import numpy as np
import pytest
from oracles import Hyperplane, dataset, points

from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Protocol
from bench.under_way import UnderWay, named, passes

SPECS = [
    {"attack": "fgsm", "eps": [1e-6, 2e-6]},
    {"attack": "ms-pgd", "steps": 20, "restarts": 2, "loss": "margin"},
]


class Heard:
    """A meter that keeps what it is under_way."""

    def __init__(self):
        self.amounts, self.notes = [], []

    def advance(self, amount=1, note=""):
        self.amounts.append(amount)
        self.notes.append(note)


@pytest.fixture(scope="module")
def heard():
    """What is heard of two batches, of 10 and of 14 images, of which those with a margin below eps fall."""
    model, data = Hyperplane(), dataset()
    margin = model.margin(points())
    eps = float(margin.median()) * 1.001
    columns = Protocol.model_validate({"name": "t", "column": SPECS}).columns(eps)
    programs = plan(columns)
    evaluator = Evaluator(model, classes=len(data.classes), split=data.test, seed=0, success="any")
    meter = Heard()
    under_way = UnderWay(meter, programs)
    evaluator.begins = under_way.begins
    for index in (np.arange(10), np.arange(10, 24)):
        under_way.ends(evaluator.run(programs, index))
    return meter, margin > eps


def test_the_robust_accuracy_so_far_is_that_of_the_images_so_far(heard):
    meter, stands = heard
    first, last = meter.notes[3], meter.notes[-1]
    assert first == f"batch done, RA so far {100 * stands[:10].float().mean():.1f} % of 10"
    assert last == f"batch done, RA so far {100 * stands.float().mean():.1f} % of 24"
    assert not stands.all()


def test_every_program_is_said_in_words_before_it_begins(heard):
    said = [note.split(", RA")[0] for note in heard[0].notes]
    assert said == 2 * ["clean images", "FGSM at 2 radii", "PGD-20, 2 starts, margin loss", "batch done"]


def test_the_accuracy_of_a_batch_under_way_counts_from_its_first_column_on(heard):
    notes = heard[0].notes
    assert "RA" not in notes[0] and notes[1].endswith(", RA so far 100.0 % of 10")
    assert notes[4].endswith(" of 10") and notes[5].endswith(" of 24")


def test_a_batch_counts_as_its_images_however_its_programs_share_it(heard):
    amounts = heard[0].amounts
    assert sum(amounts[:4]) == pytest.approx(10) and sum(amounts[4:]) == pytest.approx(14)
    assert all(amount > 0 for amount in amounts[1:4] + amounts[5:]) and amounts[0] == amounts[4] == 0


def test_before_any_batch_a_program_weighs_as_many_passes_as_it_takes_at_most(heard):
    # clean: 1; FGSM: one gradient, which counts as three, and two looks; PGD: twice 20 gradients and a look
    assert heard[0].amounts[1:4] == pytest.approx([10 * 1 / 128, 10 * 5 / 128, 10 * 122 / 128])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"attack": "pgd", "steps": [10, 50]}, "PGD-50, cross-entropy"),
        ({"attack": "autoattack"}, "AutoAttack"),
        ({"attack": "transfer:pgd_at", "steps": 5}, "transfer from pgd_at"),
        ({"attack": "8-bit"}, "rounding to 8 bits"),
        ({"attack": "fgsm"}, "FGSM"),
    ],
)
def test_programs_have_names_that_people_know(spec, said):
    columns = Protocol.model_validate({"name": "t", "column": [spec]}).columns(0.1)
    program = plan(columns)[-1]
    assert named(program) == said and passes(program) > 0


def test_an_attack_on_a_mixture_is_named_as_its_column():
    spec = {"attack": "adaptive", "steps": 5}
    programs = plan(Protocol.model_validate({"name": "t", "column": [spec]}).columns(0.1, "hard"))
    assert "on the mixture: frozen-gate" in [named(program) for program in programs]
