from bench import protocol as protocols
from bench.plan import explain, plan
from bench.protocol import Protocol


def columns(*specs, **fields):
    return Protocol.model_validate({"name": "t", "column": list(specs), **fields}).columns(0.1)


def programs(*specs, **options):
    return [[c.name for c in program.columns] for program in plan(columns(*specs), **options)]


def test_dwf_paper_is_three_programs():
    protocol = protocols.load("dwf-paper")
    made = plan(protocol.columns(8 / 255))
    assert [len(p.columns) for p in made] == [1, 9, 7]
    assert [p.gradients() for p in made] == [(0, 0), (1, 1), (100, 300)]
    assert [p.forwards() for p in made] == [(1, 1), (9, 9), (6, 8)]


def test_pgd_of_any_length_from_one_start_is_one_trajectory():
    (_, pgd) = plan(
        columns({"attack": "pgd", "steps": [10, 50]}, {"attack": "ms-pgd", "steps": 100, "restarts": 3})
    )
    assert pgd.milestones(0) == [10, 50, 100] and pgd.milestones(1) == pgd.milestones(2) == [100]


def test_what_is_not_the_same_computation_is_not_merged():
    base = {"attack": "pgd", "steps": 10}
    for change in (
        {"step_size": 0.01},
        {"loss": "margin"},
        {"eps": 0.05},
        {"eot": 2},
        {"random_start": False},
    ):
        assert len(plan(columns({**base, "steps": 20}, {**base, **change}))) == 3, change


def test_fgsm_with_another_loss_is_another_gradient():
    assert (
        len(plan(columns({"attack": "fgsm", "eps": [0.1, 0.2]}, {"attack": "fgsm", "loss": "margin"}))) == 3
    )


def test_on_a_random_model_adaptive_pgd_is_a_program_of_its_own():
    specs = {"attack": "pgd", "steps": 10}, {"attack": "a-pgd", "steps": 10}
    assert programs(*specs) == [["clean"], ["pgd-10", "a-pgd-10"]]
    assert programs(*specs, random=True) == [["clean"], ["pgd-10"], ["a-pgd-10"]]


def test_every_column_is_answered_by_exactly_one_program():
    protocol = protocols.load("dwf-paper")
    asked = [c.name for c in protocol.columns(0.1)]
    answered = [c.name for p in plan(protocol.columns(0.1)) for c in p.columns]
    assert sorted(asked) == sorted(answered)


def test_the_explanation_counts_what_merging_saves():
    text = explain(plan(protocols.load("dwf-paper").columns(0.1)), "last")
    assert "101…301" in text and "one by one they would be 559" in text
