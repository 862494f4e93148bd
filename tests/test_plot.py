"""Figures show the measured points, byte for byte the same each time, and touch nothing but their files."""

import csv
import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pypdf
import pytest
from made_up import found as doubt
from made_up import paper_columns, run

from bench.errors import UsageError
from bench.plot import draw, figures
from bench.record import ColumnRecord
from bench.stats import wilson

HELD = {column.name: 200 - 10 * i for i, column in enumerate(paper_columns())}


def tradeoff(results, out):
    return draw(results, out, ["tradeoff"])


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
    assert image.shape[1] == 975
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
    from bench.plot.curves import chance
    from bench.record import read_all

    run(tmp_path, n=4)
    assert chance(groups(read_all(tmp_path))) == 25


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

    from bench.plot.tradeoff import _front

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
def test_settings_that_weights_depend_on_make_points_and_no_line(name, tmp_path):
    for alpha in (0.25, 0.5):
        dual(tmp_path, alpha, 150, 100, defense=name)
    dual(tmp_path, 0.5, 150, 100)
    tradeoff(tmp_path, tmp_path)
    rows = points(tmp_path, "digits-dwf-paper-tradeoff")
    assert len(rows) == 3 and "alpha" not in rows[0]


def test_one_run_alone_has_no_front(tmp_path):
    plain(tmp_path, "pgd_at", 150, 100)
    with pytest.raises(UsageError, match="no two finished runs in .* were attacked on the same images"):
        tradeoff(tmp_path, tmp_path)


def test_a_doubted_run_is_not_on_the_front(curve):
    plain(curve, "soe", 199, 199, findings=[doubt("odd")])
    tradeoff(curve, curve)
    rows = by_name(points(curve, "digits-dwf-paper-tradeoff"))
    assert rows["soe", ""]["front"] == "0" and rows["pgd_at", ""]["front"] == "1"


def test_the_tradeoff_is_the_same_bytes_each_time_and_as_wide_as_a_column(curve):
    first, second = tradeoff(curve, curve / "a"), tradeoff(curve, curve / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    image = matplotlib.image.imread(first[0])
    assert image.shape[1] == 975
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


# calibration

RADII = (0.001, 0.002, 0.004, 0.01)


def calibrated(results, name, held, **more):
    """A run of the calibration that holds on so many of 200 images, clean ones first."""
    columns = [ColumnRecord(name="clean", attack="clean")] + [
        ColumnRecord(name=f"pgd-{eps}", attack="pgd", norm="Linf", epsilon=eps, steps=20, restarts=1)
        for eps in RADII
    ]
    counts = dict(zip([c.name for c in columns], held, strict=True))
    given = {"dataset": "cifar10", "defense": name, "protocol": "calibration", "columns": columns}
    return run(results, counts, **{**given, **more})


@pytest.mark.parametrize(
    ("value", "eps"), [(90, 0.0), (80, 0.001), (70, 0.0015), (10, 0.007), (0, 0.01), (95, None)]
)
def test_a_curve_comes_down_to_a_value_where_its_straight_pieces_do(value, eps):
    from bench.plot.calibration import crossing

    found = crossing([0.0, 0.001, 0.002, 0.004, 0.01], [90, 80, 60, 20, 0], value)
    assert found == (None if eps is None else pytest.approx(eps))


def test_the_calibration_says_at_which_radius_a_printed_value_is_left(tmp_path):
    from bench.published import rows as printed

    calibrated(tmp_path, "resnet18", [180, 160, 120, 40, 0])
    calibrated(tmp_path, "pgd_at", [180, 170, 160, 150, 140], published_as="ResNet-18 (PGD-AT)")
    made = draw(tmp_path, tmp_path, ["calibration"])
    assert [path.name for path in made] == [f"cifar10-calibration.{e}" for e in ("png", "pdf", "csv")]
    found = {
        row["defense"]: row for row in points(tmp_path, "cifar10-calibration") if row["source"] == "published"
    }
    assert set(found) == set(printed("cifar10"))
    plain_row, trained = found["ResNet-18"], found["ResNet-18 (PGD-AT)"]
    value = printed("cifar10")["ResNet-18"]["pgd", 20.0].accuracy
    assert float(plain_row["accuracy"]) == value and plain_row["curve"] == "resnet18"
    assert float(plain_row["implied_eps"]) == pytest.approx(0.002 + 0.002 * (60 - value) / 40, abs=1e-6)
    # this one never falls as low as it is printed
    assert (trained["curve"], trained["implied_eps"]) == ("pgd_at", "")
    assert found["DWF"]["curve"] == ""


def test_images_under_another_name_have_the_lines_that_are_asked_for(tmp_path):
    calibrated(tmp_path, "resnet18", [180, 160, 120, 40, 0], dataset="npz:mine")
    draw(tmp_path, tmp_path / "none", ["calibration"], data_only=True)
    draw(tmp_path, tmp_path / "some", ["calibration"], lines="cifar10", data_only=True)
    (none,), (some,) = ((tmp_path / where).glob("*.csv") for where in ("none", "some"))
    assert "published" not in none.read_text() and "published,ResNet-18,," in some.read_text()


# every defense under every attack


def test_the_matrix_has_every_defense_under_every_attack(tmp_path):
    run(tmp_path, HELD)
    run(tmp_path, HELD, defense="soe", findings=[doubt("odd")])
    draw(tmp_path, tmp_path, ["matrix"])
    rows = points(tmp_path, "digits-dwf-paper-matrix")
    names = [column.name for column in paper_columns()] + ["worst-case"]
    assert [(r["defense"], r["column"]) for r in rows] == [(d, n) for d in ("dwf", "soe") for n in names]
    assert [float(row["accuracy"]) for row in rows[:17]] == [HELD[name] / 2 for name in names[:17]]
    assert {row["credible"] for row in rows if row["defense"] == "soe"} == {"0"}


@pytest.mark.parametrize(("columns", "pixels"), [(slice(0, 4), 975), (slice(0, 17), 2025)])
def test_a_matrix_that_is_too_wide_for_a_column_is_as_wide_as_the_page(columns, pixels, tmp_path):
    run(tmp_path, HELD, columns=paper_columns()[columns])
    image = matplotlib.image.imread(draw(tmp_path, tmp_path, ["matrix"])[0])
    assert image.shape[1] == pixels
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


# what all of them share


@pytest.fixture
def every(curve):
    """Every kind of figure that records give."""
    run(curve, HELD, dataset="svhn")
    calibrated(curve, "resnet18", [180, 160, 120, 40, 0])
    return draw(curve, curve / "all")


def test_every_figure_has_its_data_and_the_data_can_be_had_alone(every, curve):
    stems = {path.stem for path in every}
    assert {stem.rsplit("-", 1)[1] for stem in stems} == {"fgsm", "pgd", "calibration", "tradeoff", "matrix"}
    assert {path.name for path in every} == {f"{stem}.{e}" for stem in stems for e in ("png", "pdf", "csv")}
    alone = draw(curve, curve / "alone", data_only=True)
    assert {path.name for path in alone} == {f"{stem}.csv" for stem in stems}
    assert all(path.read_bytes() == (curve / "all" / path.name).read_bytes() for path in alone)


def test_every_pdf_embeds_its_fonts_and_fits_a_column_or_a_page(every):
    for path in every:
        if path.suffix == ".pdf":
            (page,) = pypdf.PdfReader(path).pages
            assert float(page.mediabox.width) in (pytest.approx(3.25 * 72), pytest.approx(6.75 * 72))
            assert float(page.mediabox.height) < 9 * 72
            fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]
            assert fonts
            for font in fonts:
                assert font["/Subtype"] == "/Type0"
                (inner,) = font["/DescendantFonts"]
                assert "/FontFile2" in inner.get_object()["/FontDescriptor"]


def test_lines_are_told_apart_by_the_colour_blind_and_in_grey():
    from bench.plot.style import COLORS, look

    # Machado, Oliveira and Fernandes 2009: no red cones, no green ones, on linear light
    sights = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }  # fmt: skip
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in COLORS])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    for sight in sights.values():
        seen = np.clip(linear @ np.array(sight).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(seen))
        assert apart.min() > 0.12
    shapes = [(look(place)["marker"], str(look(place)["linestyle"])) for place in range(17)]
    assert len(set(shapes)) == 17


def test_drawing_lines_of_records_takes_no_torch():
    code = "import sys, bench.plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
