"""The long table says what the outcomes say: shares, intervals, seeds, worst cases, and telling names."""

import subprocess
import sys

import numpy as np
import pytest
from made_up import EPS, paper_columns, run

from bench.errors import UsageError
from bench.long import HEADER, groups, load_results, radius
from bench.record import ColumnRecord, Facts, read_all
from bench.stats import wilson

CLEAN = ColumnRecord(name="clean", attack="clean")
FGSM = ColumnRecord(name="fgsm", attack="fgsm", norm="Linf", epsilon=0.05, eot=1)
PGD = ColumnRecord(
    name="pgd", attack="pgd", norm="Linf", epsilon=0.03, step_size=0.01, steps=7, restarts=2, eot=1
)
FEW = [CLEAN, FGSM, PGD]


def labels(results):
    return sorted(group.label for group in groups(read_all(results)))


def test_the_header_is_the_one_that_users_were_promised(tmp_path):
    run(tmp_path)
    asked = "dataset,defense,protocol,attack,epsilon,step_size,steps,restarts,eot"
    promised = asked + ",accuracy,ci_low,ci_high,n,seeds,std"
    assert ",".join(load_results(tmp_path).columns) == promised == ",".join(HEADER)


def test_an_accuracy_is_the_share_of_images_that_held(tmp_path):
    run(tmp_path, {"clean": 180, "fgsm": 90, "pgd": 1}, columns=FEW)
    table = load_results(str(tmp_path)).set_index("attack")
    assert table.accuracy.to_dict() == pytest.approx({"clean": 90, "fgsm": 45, "pgd": 0.5, "worst-case": 0.5})
    assert table.n.tolist() == [200] * 4
    low, high = wilson(90, 200)
    assert table.loc["fgsm", ["ci_low", "ci_high"]].tolist() == pytest.approx([100 * low, 100 * high])


def test_of_a_random_model_an_image_counts_by_its_share_of_right_draws(tmp_path):
    shares = {"clean": [1.0, 1.0], "fgsm": [0.9, 0.6], "pgd": [0.5, 0.8]}
    chosen_by = {"clean": [1.0, 1.0], "fgsm": [0.7, 0.5], "pgd": [0.8, 0.6]}

    def drawn(table):
        for name in shares:
            rows = table.column == name
            table.loc[rows, "share"] = np.float32(shares[name])
            table.loc[rows, "selected"] = np.float32(chosen_by[name])
        return table

    run(tmp_path, columns=FEW, n=2, damage=drawn, model=Facts(randomness="stochastic", draws=100))
    accuracy = load_results(tmp_path).set_index("attack").accuracy
    assert accuracy["fgsm"] == pytest.approx(75) and accuracy["pgd"] == pytest.approx(65)
    # fgsm is the worst for both by the draws that chose; what it is worth the fresh ones say
    assert accuracy["worst-case"] == pytest.approx(75)
    # and no image is right in every draw
    assert accuracy["worst-draw"] == 0


def test_a_void_run_has_no_accuracy(tmp_path):
    from bench.finding import Finding

    why = Finding(code="at-chance", severity="blocks", evidence="one class", advice="look")
    run(tmp_path, columns=FEW, findings=[why])
    table = load_results(tmp_path)
    assert len(table) == 4 and table[["accuracy", "ci_low", "ci_high", "std"]].isna().all(axis=None)


def test_what_the_attack_was_is_told_and_what_does_not_apply_is_missing(tmp_path):
    run(tmp_path, columns=FEW)
    table = load_results(tmp_path).set_index("attack")
    asked = ["epsilon", "step_size", "steps", "restarts", "eot"]
    assert table.loc["pgd", asked].tolist() == [0.03, 0.01, 7, 2, 1]
    assert table.loc["clean", asked].isna().all()
    assert table.loc["fgsm", asked].isna().tolist() == [False, True, True, True, False]
    assert table.dtypes[["steps", "restarts", "eot", "n", "seeds"]].astype(str).unique().tolist() == ["Int64"]
    assert table.dtypes[["epsilon", "step_size", "std"]].astype(str).unique().tolist() == ["float64"]


def test_the_worst_case_is_per_image_where_no_column_alone_has_it(tmp_path):
    held = {"clean": [1, 1, 1, 0], "fgsm": [0, 1, 1, 1], "pgd": [1, 0, 1, 1]}
    run(tmp_path, held, columns=FEW)
    worst = load_results(tmp_path).iloc[-1]
    assert worst.attack == "worst-case"
    assert worst.accuracy == 25
    assert worst.epsilon == 0.05
    assert worst[["step_size", "steps", "restarts", "eot"]].isna().all()


def test_rows_stand_in_the_order_of_dataset_label_protocol_and_column(tmp_path):
    run(tmp_path, dataset="svhn", columns=FEW, protocol="b")
    run(tmp_path, dataset="digits", defense="soe", columns=FEW, protocol="b")
    run(tmp_path, dataset="digits", defense="dwf", columns=FEW, protocol="b")
    run(tmp_path, dataset="digits", defense="dwf", columns=FEW, protocol="a")
    table = load_results(tmp_path)
    order = list(dict.fromkeys(zip(table.dataset, table.defense, table.protocol, strict=True)))
    assert order == [
        ("digits", "dwf", "a"),
        ("digits", "dwf", "b"),
        ("digits", "soe", "b"),
        ("svhn", "dwf", "b"),
    ]
    assert table.attack.tolist() == ["clean", "fgsm", "pgd", "worst-case"] * 4


def test_the_order_of_outcomes_on_disk_does_not_matter(tmp_path):
    held = {"clean": 150, "fgsm": 100, "pgd": 50}
    run(tmp_path / "a", held, columns=FEW)
    run(tmp_path / "b", held, columns=FEW, shuffle=True)
    assert load_results(tmp_path / "a").equals(load_results(tmp_path / "b"))
    a, b = (groups(read_all(tmp_path / name))[0].shares[0] for name in "ab")
    assert np.array_equal(a, b)


def test_trainings_that_differ_in_the_seed_are_one_group(tmp_path):
    for seed, count in enumerate([100, 110, 126]):
        run(tmp_path, {"fgsm": count}, columns=FEW, seed=seed)
    fgsm = load_results(tmp_path).set_index("attack").loc["fgsm"]
    assert fgsm.seeds == 3
    assert fgsm.accuracy == pytest.approx(56)
    assert fgsm["std"] == pytest.approx(np.std([50, 55, 63], ddof=1))
    low, high = wilson(112, 200)
    assert (fgsm.ci_low, fgsm.ci_high) == pytest.approx((100 * low, 100 * high))
    assert fgsm.n == 200


def test_one_seed_has_no_std(tmp_path):
    run(tmp_path, columns=FEW)
    table = load_results(tmp_path)
    assert table["std"].isna().all()
    assert (table.seeds == 1).all()


def test_the_worst_case_over_seeds_is_the_mean_of_each_seeds_worst_case(tmp_path):
    run(tmp_path, {"clean": [1, 1, 1, 1], "fgsm": [0, 1, 1, 1], "pgd": [1, 0, 1, 1]}, columns=FEW, seed=0)
    run(tmp_path, {"clean": [1, 1, 1, 1], "fgsm": [1, 1, 0, 0], "pgd": [1, 0, 0, 0]}, columns=FEW, seed=1)
    assert load_results(tmp_path).iloc[-1].accuracy == pytest.approx((50 + 25) / 2)


def test_two_trainings_of_one_seed_count_as_one_seed(tmp_path):
    run(tmp_path, {"fgsm": 100}, columns=FEW, seed=0, model_hash="a")
    run(tmp_path, {"fgsm": 120}, columns=FEW, seed=0, model_hash="b")
    run(tmp_path, {"fgsm": 150}, columns=FEW, seed=1)
    fgsm = load_results(tmp_path).set_index("attack").loc["fgsm"]
    assert fgsm.seeds == 2
    assert fgsm.accuracy == pytest.approx((55 + 75) / 2)


def test_one_checkpoint_under_two_attack_seeds_is_one_group(tmp_path):
    for seed in (0, 1):
        run(tmp_path, columns=FEW, source="w.pt", model_hash="same", seed=seed)
    assert (load_results(tmp_path).seeds == 2).all()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"recipe": "tiny"}, {"recipe": "fast"}, ["dwf [fast]", "dwf [tiny]"]),
        ({"recipe": "tiny"}, {"recipe": None}, ["dwf [no recipe]", "dwf [tiny]"]),
        ({"n": 100}, {"n": 50}, ["dwf [n=100]", "dwf [n=50]"]),
        (
            {"source": "trained"},
            {"source": "/a/weights.pt"},
            ["dwf [checkpoint weights.pt]", "dwf [trained]"],
        ),
        (
            {"source": "a/w.pt", "model_hash": "1"},
            {"source": "b/w.pt", "model_hash": "2"},
            ["dwf [checkpoint a/w.pt]", "dwf [checkpoint b/w.pt]"],
        ),
        (
            {"source": "w.pt", "model_hash": "1" * 64},
            {"source": "w.pt", "model_hash": "2" * 64},
            ["dwf [weights 11111111]", "dwf [weights 22222222]"],
        ),
        (
            {"columns": paper_columns(1 / 255), "protocol": {"name": "p", "eps": 1 / 255}},
            {"columns": paper_columns(EPS), "protocol": {"name": "p", "eps": EPS}},
            ["dwf [eps=1/255]", "dwf [eps=8/255]"],
        ),
        ({"config": {"width": 8}}, {"config": {"width": 16}}, ["dwf [width=16]", "dwf [width=8]"]),
        (
            {"config": {"gate": {"hidden": 8}}},
            {"config": {"gate": {"hidden": 9}}},
            ["dwf [hidden=8]", "dwf [hidden=9]"],
        ),
        ({"precision": "fp32"}, {"precision": "bf16"}, ["dwf [bf16]", "dwf [fp32]"]),
        ({"data_hash": "a" * 64}, {"data_hash": "b" * 64}, ["dwf [data aaaaaaaa]", "dwf [data bbbbbbbb]"]),
        (
            {"protocol": {"name": "p", "success": "any"}},
            {"protocol": {"name": "p", "success": "last"}},
            ["dwf [success=any]", "dwf [success=last]"],
        ),
    ],
)
def test_namesakes_are_told_apart_by_the_fact_that_differs(tmp_path, first, second, expected):
    run(tmp_path, **first)
    run(tmp_path, **second)
    assert labels(tmp_path) == expected


def test_namesakes_that_differ_in_two_ways_bear_both(tmp_path):
    for recipe, n in (("tiny", 20), ("tiny", 30), ("fast", 20)):
        run(tmp_path, recipe=recipe, n=n)
    assert labels(tmp_path) == ["dwf [fast, n=20]", "dwf [tiny, n=20]", "dwf [tiny, n=30]"]


def test_namesakes_that_no_fact_tells_apart_bear_their_keys(tmp_path):
    columns = [[CLEAN, PGD.model_copy(update={"loss": loss})] for loss in ("ce", "margin")]
    keys = [run(tmp_path, columns=asked, seed=seed).asked.key for seed, asked in enumerate(columns)]
    assert labels(tmp_path) == sorted(f"dwf [{key[:4]}…]" for key in keys)


def test_a_name_that_is_alone_in_its_protocol_stays_bare(tmp_path):
    run(tmp_path, protocol="a", recipe="tiny")
    run(tmp_path, protocol="b", recipe="fast")
    run(tmp_path, dataset="svhn", recipe="fast", protocol="a")
    assert labels(tmp_path) == ["dwf"] * 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table.iloc[:-1],
        lambda table: table.assign(column=table.column.replace("pgd", "fgsm")),
        lambda table: table.assign(column=table.column.replace("pgd", "other")),
        lambda table: table.iloc[:0],
        lambda table: table.iloc[[0, *range(len(table) - 1)]],
    ],
)
def test_incomplete_outcomes_are_no_accuracy(tmp_path, damage):
    run(tmp_path, columns=FEW, damage=damage)
    with pytest.raises(UsageError, match="lacks outcomes of some images; delete it and run again"):
        load_results(tmp_path)


def test_outcomes_that_were_touched_are_refused(tmp_path):
    record = run(tmp_path, columns=FEW)
    file = next(tmp_path.rglob("outcomes.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="is not what its record was written with"):
        record.outcomes()
    file.unlink()
    with pytest.raises(UsageError, match="is missing"):
        load_results(tmp_path)


def test_outcomes_can_be_read_in_part(tmp_path):
    assert run(tmp_path).outcomes(["label", "robust"]).columns.tolist() == ["label", "robust"]
    assert run(tmp_path).outcomes().columns.tolist() == [
        *("index", "label", "column", "prediction", "robust", "restart", "step", "share", "selected")
    ]


def test_a_folder_without_runs_is_an_empty_table_and_no_folder_an_error(tmp_path):
    table = load_results(tmp_path)
    assert len(table) == 0
    assert tuple(table.columns) == HEADER
    with pytest.raises(UsageError, match="no results folder"):
        load_results(tmp_path / "none")


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (0.03, "0.03"),
        (0.2, "0.2"),
        (1.0, "1"),
        (0.5 / 255, "0.00196078431373"),
        (0.0, "0"),
    ],
)
def test_a_radius_is_written_as_people_write_it(eps, text):
    assert radius(eps) == text


@pytest.mark.parametrize("module", ["bench.long", "bench.table"])
def test_tables_start_without_the_heavy_libraries(module):
    heavy = "{'torch', 'matplotlib', 'scipy'}"
    program = f"import sys, {module}; sys.exit(str({heavy} & set(sys.modules)).replace('set()', '') or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
