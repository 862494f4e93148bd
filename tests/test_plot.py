"""Figures show the measured points, byte for byte the same each time, and touch nothing but their files."""

import csv

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from made_up import paper_columns, run

from bench.errors import UsageError
from bench.plot import figures
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
