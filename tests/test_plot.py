"""Figures show the measured points, byte for byte the same each time, and touch nothing but their files."""

import csv
import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from made_up import found as doubt
from made_up import paper_columns, run

from bench.errors import UsageError
from bench.plot import figures, tradeoff
from bench.record import ColumnRecord
from bench.stats import wilson

HELD = {column.name: 200 - 10 * i for i, column in enumerate(paper_columns())}


def points(folder, name):
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_dataset_has_both_figures_in_three_forms(tmp_path):
    run(tmp_path, dataset="digits")
    run(tmp_path, dataset="cifar10")
    found = figures(tmp_path, tmp_path / "new" / "figures")
    names = [
        f"{d}-{k}.{e}" for d in ("cifar10", "digits") for k in ("fgsm", "pgd") for e in ("png", "pdf", "csv")
    ]
    assert [path.name for path in found] == names
    assert all(path.stat().st_size > 0 for path in found)


def test_the_fgsm_curve_starts_at_the_clean_accuracy(tmp_path):
    run(tmp_path, HELD)
    figures(tmp_path, tmp_path)
    found = points(tmp_path, "digits-fgsm")
    assert [float(row["eps"]) for row in found] == [i / 100 for i in range(10)]
    assert [float(row["accuracy"]) for row in found] == [100 - 5 * i for i in range(10)]


def test_the_pgd_curve_has_the_runs_of_one_start_by_their_steps(tmp_path):
    run(tmp_path, HELD)
    figures(tmp_path, tmp_path)
    found = points(tmp_path, "digits-pgd")
    assert [row["steps"] for row in found] == ["10", "20", "30", "40", "50"]
    assert [float(row["accuracy"]) for row in found] == [50, 45, 40, 35, 30]


def test_the_band_is_wilsons_interval_for_one_seed(tmp_path):
    run(tmp_path, HELD)
    figures(tmp_path, tmp_path)
    row = points(tmp_path, "digits-pgd")[0]
    low, high = wilson(100, 200)
    assert row["band"] == "wilson"
    assert (float(row["low"]), float(row["high"])) == pytest.approx((100 * low, 100 * high), abs=1e-4)


def test_the_band_is_the_std_for_several_seeds(tmp_path):
    for seed, count in enumerate([100, 110, 126]):
        run(tmp_path, {"pgd-10": count}, seed=seed)
    figures(tmp_path, tmp_path)
    row = points(tmp_path, "digits-pgd")[0]
    std = np.std([50, 55, 63], ddof=1)
    assert (row["band"], row["seeds"]) == ("std", "3")
    assert (float(row["low"]), float(row["high"])) == pytest.approx((56 - std, 56 + std), abs=1e-4)


def test_equal_records_give_equal_files_whatever_the_users_settings(tmp_path):
    run(tmp_path, HELD)
    first = figures(tmp_path, tmp_path / "a")
    with matplotlib.rc_context({"lines.linewidth": 9, "savefig.dpi": 20}):
        second = figures(tmp_path, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert not any(b"CreationDate" in path.read_bytes() for path in first)


def test_matplotlibs_settings_are_left_as_they_were(tmp_path):
    run(tmp_path, HELD)
    before = dict(matplotlib.rcParams)
    figures(tmp_path, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_letters_in_the_pdf_stay_letters(tmp_path):
    run(tmp_path, HELD)
    pdf = next(path for path in figures(tmp_path, tmp_path) if path.suffix == ".pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf


@pytest.mark.parametrize("defenses", [1, 2, 8, 17])
def test_a_figure_is_as_wide_as_a_column_and_grows_with_its_legend(tmp_path, defenses):
    for i in range(defenses):
        run(tmp_path, HELD, n=20, defense=f"defense_{i:02}")
    image = matplotlib.image.imread(figures(tmp_path, tmp_path)[0])
    assert image.shape[1] == 1020
    assert image.shape[0] > 720 + 20 * defenses
    # nothing is cut off: the border is white
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


def test_a_dataset_that_is_a_path_does_not_climb(tmp_path):
    run(tmp_path, HELD, dataset="npz:/x/../y")
    found = figures(tmp_path, tmp_path / "out")
    assert {path.parent for path in found} == {tmp_path / "out"}
    assert all(path.is_file() for path in found)


def test_chance_is_one_of_the_classes_that_occur(tmp_path):
    from bench.long import groups
    from bench.plot import _chance
    from bench.record import read_all

    run(tmp_path, n=4)
    assert _chance(groups(read_all(tmp_path))) == 25


def test_runs_of_other_protocols_are_not_drawn(tmp_path):
    run(tmp_path, columns=[ColumnRecord(name="clean", attack="clean")], protocol="standard")
    with pytest.raises(UsageError, match="no finished dwf-paper or sweep runs in"):
        figures(tmp_path, tmp_path)


def test_only_the_datasets_asked_for_are_drawn(tmp_path):
    run(tmp_path, HELD, dataset="digits")
    run(tmp_path, HELD, dataset="svhn")
    found = figures(tmp_path, tmp_path / "out", datasets=["svhn"])
    assert {path.stem for path in found} == {"svhn-fgsm", "svhn-pgd"}
    assert figures(tmp_path, tmp_path / "out", datasets=["cifar10"]) == []


def test_a_run_without_pgd_columns_has_no_pgd_figure(tmp_path):
    run(tmp_path, HELD, columns=paper_columns()[:10])
    assert {path.stem for path in figures(tmp_path, tmp_path)} == {"digits-fgsm"}


def test_a_sweep_counts_an_image_as_fallen_from_where_it_first_fell(tmp_path):
    columns = [ColumnRecord(name="clean", attack="clean")] + [
        ColumnRecord(name=f"{kind}-{eps}", attack=kind, norm="Linf", epsilon=eps, steps=steps, eot=1)
        for eps in (0.1, 0.2)
        for kind, steps in (("fgsm", None), ("pgd", 50))
    ]
    held = {
        "fgsm-0.1": [1, 0, 1, 1],
        "pgd-0.1": [1, 1, 0, 1],
        "fgsm-0.2": [1, 1, 1, 0],
        "pgd-0.2": [1, 1, 1, 1],
    }
    run(tmp_path, held, n=4, columns=columns, protocol="sweep")
    made = {path.name: path for path in figures(tmp_path, tmp_path)}
    assert sorted(made) == ["digits-sweep.csv", "digits-sweep.pdf", "digits-sweep.png"]
    rows = [line.split(",") for line in made["digits-sweep.csv"].read_text().splitlines()]
    found = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["eps"] for row in found] == ["0.0", "0.1", "0.2"]
    assert [float(row["accuracy"]) for row in found] == [100, 50, 25]
    assert [float(row["alone"]) for row in found] == [100, 50, 75]


# SA against RA

KNOB = {"alpha": 0.7, "deployed_alpha": None, "beta": 6}
FEW = [
    ColumnRecord(name="clean", attack="clean"),
    ColumnRecord(name="pgd", attack="pgd", norm="Linf", epsilon=0.1, steps=10),
    ColumnRecord(name="route", attack="pgd", norm="Linf", epsilon=0.3, steps=10, diagnostic=True),
]


def dual(results, alpha, clean, robust, *, config=(), **more):
    """A run of the dual model deployed at this alpha, which holds on so many images of 200."""
    config = {**KNOB, "deployed_alpha": alpha, **dict(config)}
    given = {"columns": FEW, "defense": "jtdmoe", "config": config, **more}
    return run(results, {"clean": clean, "pgd": robust, "route": 0}, **given)


def plain(results, name, clean, robust, **more):
    return run(results, {"clean": clean, "pgd": robust}, columns=FEW[:2], defense=name, **more)


@pytest.fixture
def curve(tmp_path):
    """Three alphas, of which the middle one is dominated by a plain defense, and a second, hopeless one."""
    dual(tmp_path, 0.25, 190, 60)
    dual(tmp_path, 0.5, 170, 100)
    dual(tmp_path, 1, 150, 140)
    plain(tmp_path, "pgd_at", 180, 120)
    plain(tmp_path, "resnet18", 100, 0)
    return tmp_path


def by_name(rows):
    return {(row["defense"], row["alpha"]): row for row in rows}


def test_the_tradeoff_has_a_line_by_alpha_and_the_other_defenses_as_points(curve):
    made = tradeoff(curve, curve / "new" / "figures")
    assert [path.name for path in made] == [f"digits-dwf-paper-tradeoff.{e}" for e in ("png", "pdf", "csv")]
    rows = points(curve / "new" / "figures", "digits-dwf-paper-tradeoff")
    assert [(r["defense"], r["alpha"], float(r["sa"]), float(r["ra"])) for r in rows] == [
        ("jtdmoe", "0.25", 95, 30),
        ("jtdmoe", "0.5", 85, 50),
        ("jtdmoe", "1", 75, 70),
        ("pgd_at", "", 90, 60),
        ("resnet18", "", 50, 0),
    ]
    assert {row["eps"] for row in rows} == {"0.1"}


def test_the_front_is_what_nothing_beats_in_both(curve):
    tradeoff(curve, curve)
    rows = points(curve, "digits-dwf-paper-tradeoff")
    assert [row["front"] for row in rows] == ["1", "0", "1", "1", "0"]


@pytest.mark.parametrize(
    ("at", "front"),
    [
        ([(50, 50), (50, 50)], [0, 1]),
        ([(50, 40), (50, 50)], [1]),
        ([(50, 50), (60, 50)], [1]),
        ([(70, 10), (10, 70), (40, 40), (30, 39)], [1, 2, 0]),
    ],
)
def test_the_front_keeps_ties_and_drops_what_is_beaten_in_one(at, front):
    from types import SimpleNamespace

    from bench.plot import _front

    given = [SimpleNamespace(at=pair, place=place) for place, pair in enumerate(at)]
    assert [point.place for point in _front(given)] == front


def test_both_accuracies_have_their_intervals(curve):
    for seed, clean in ((0, 120), (1, 130)):
        plain(curve, "trades", clean, 100, seed=seed)
    tradeoff(curve, curve)
    rows = by_name(points(curve, "digits-dwf-paper-tradeoff"))
    row = rows["jtdmoe", "0.25"]
    for name, held in (("sa", 190), ("ra", 60)):
        low, high = wilson(held, 200)
        assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == pytest.approx(
            (100 * low, 100 * high), abs=1e-4
        )
    std = np.std([60, 65], ddof=1)
    row = rows["trades", ""]
    assert (row["band"], row["seeds"]) == ("std", "2")
    assert (float(row["sa_low"]), float(row["sa_high"])) == pytest.approx((62.5 - std, 62.5 + std), abs=1e-4)


def test_an_alpha_that_is_not_set_is_that_of_training_and_counts_once(curve):
    dual(curve, None, 160, 130)
    dual(curve, 0.7, 160, 130)
    dual(curve, 0.7, 162, 130, seed=1)
    tradeoff(curve, curve)
    rows = [row for row in points(curve, "digits-dwf-paper-tradeoff") if row["defense"] == "jtdmoe"]
    assert [row["alpha"] for row in rows] == ["0.25", "0.5", "0.7", "1"]
    assert rows[2]["seeds"] == "2"


def test_another_training_is_another_line_and_named_by_what_sets_it_apart(curve):
    dual(curve, 0.25, 188, 50, config={"beta": 0})
    dual(curve, 0.5, 168, 90, config={"beta": 0})
    dual(curve, 0.5, 100, 90, config={"beta": 3})
    tradeoff(curve, curve)
    rows = points(curve, "digits-dwf-paper-tradeoff")
    assert [(row["defense"], row["alpha"]) for row in rows] == [
        *(("jtdmoe [beta=6]", alpha) for alpha in ("0.25", "0.5", "1")),
        *(("jtdmoe [beta=0]", alpha) for alpha in ("0.25", "0.5")),
        ("jtdmoe [beta=3]", "0.5"),
        ("pgd_at", ""),
        ("resnet18", ""),
    ]


@pytest.mark.parametrize("other", [{"data_hash": "e" * 64}, {"n": 100}, {"protocol": "standard"}])
def test_other_images_and_other_protocols_are_not_in_one_figure(other, curve):
    plain(curve, "trades", 90, 80, **other)
    tradeoff(curve, curve)
    assert "trades" not in {row["defense"] for row in points(curve, "digits-dwf-paper-tradeoff")}


def test_two_radii_of_one_protocol_are_two_figures(tmp_path):
    for eps in (0.1, 0.2):
        for alpha in (0, 1):
            dual(tmp_path, alpha, 150, 100, protocol={"name": "standard", "eps": eps})
    made = tradeoff(tmp_path, tmp_path)
    assert len({path for path in made if path.suffix == ".csv"}) == 2
    assert all(path.name.startswith("digits-standard-tradeoff-") for path in made)


def test_suspect_runs_are_told_apart_and_void_ones_left_out(curve):
    dual(curve, 0.75, 160, 160, findings=[doubt("odd")])
    dual(curve, 0.9, 160, 160, findings=[doubt("wrong", "blocks")])
    tradeoff(curve, curve)
    rows = by_name(points(curve, "digits-dwf-paper-tradeoff"))
    assert rows["jtdmoe", "0.75"]["credible"] == "0" and rows["jtdmoe", "0.5"]["credible"] == "1"
    assert ("jtdmoe", "0.9") not in rows


def test_runs_that_were_not_attacked_are_no_points(curve):
    run(curve, {"clean": 200}, columns=FEW[:1], defense="vgg19")
    tradeoff(curve, curve)
    assert "vgg19" not in {row["defense"] for row in points(curve, "digits-dwf-paper-tradeoff")}


@pytest.mark.parametrize("name", ["dwf", "somebodys_plugin"])
def test_settings_that_weights_depend_on_make_no_line(name, tmp_path):
    for alpha in (0.25, 0.5):
        dual(tmp_path, alpha, 150, 100, defense=name)
    dual(tmp_path, 0.5, 150, 100)
    with pytest.raises(UsageError, match=r"bench run --defense jtdmoe --set deployed_alpha=0\.25"):
        tradeoff(tmp_path, tmp_path)


def test_the_tradeoff_is_the_same_bytes_each_time_and_as_wide_as_a_column(curve):
    first, second = tradeoff(curve, curve / "a"), tradeoff(curve, curve / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    image = matplotlib.image.imread(first[0])
    assert image.shape[1] == 1020
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


def test_drawing_lines_of_records_takes_no_torch():
    code = "import sys, bench.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
