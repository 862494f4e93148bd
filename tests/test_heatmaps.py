"""Heatmaps are drawn with an earlier training's weights, one image a row and one expert a column."""

import csv
import dataclasses

import matplotlib.image
import numpy as np
import pytest
import torch

import bench.weights
from bench.cli import commands
from bench.errors import UsageError
from bench.gradcam import heatmaps
from bench.plot.heatmaps import figure, similarity
from bench.session import prepare
from bench.weights import FILES, weigh

SMALL = {
    "width": 2,
    "epochs": 1,
    "batch_size": 256,
    "variant": "clean",
    "steps": 1,
    "experts": 3,
    "gate_width": 2,
}


def asked(results, name="immunity", **more):
    return prepare(
        name, "digits", settings=SMALL if name == "immunity" else {}, results=results, quiet=True, **more
    )


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Results with a trained mixture, whose weights were then made recognisable."""
    results = tmp_path_factory.mktemp("heatmaps")
    session = asked(results)
    weigh(session, session.jobs[0], 0)
    return results


def test_the_cosine_of_heatmaps_is_1_of_like_ones_0_of_apart_ones_and_the_mean_between():
    here, there, both = ([1.0, 0.0], [0.0, 2.0], [3.0, 3.0])
    heat = torch.tensor([[here, here, there], [here, both, here]])[:, :, None]
    mean, n = similarity(heat)
    half = 0.5**0.5
    np.testing.assert_allclose(
        mean, [[1, (1 + half) / 2, 0.5], [(1 + half) / 2, 1, half / 2], [0.5, half / 2, 1]]
    )
    assert (n == 2).all()


def test_heatmaps_that_are_zero_do_not_count_and_tiny_ones_do():
    nothing, tiny = [0.0, 0.0], [1e-30, 0.0]
    heat = torch.tensor([[tiny, nothing, nothing], [[0.0, 1.0], [1.0, 0.0], nothing]])[:, :, None]
    mean, n = similarity(heat)
    assert n.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert mean[0, 0] == pytest.approx(1) and mean[0, 1] == 0 and np.isnan(mean[2]).all()


def test_a_figure_has_three_forms_and_the_csv_every_pair(place, tmp_path):
    made = figure(asked(place, samples=3), tmp_path / "new")
    assert [path.name for path in made] == [f"digits-immunity-heatmaps.{e}" for e in ("png", "pdf", "csv")]
    assert made[1].read_bytes().startswith(b"%PDF") and b"CreationDate" not in made[1].read_bytes()
    assert [(row["expert"], row["other"]) for row in rows(made[2])] == [("1", "2"), ("1", "3"), ("2", "3")]
    assert [path.read_bytes() for path in figure(asked(place, samples=3), tmp_path)] == [
        path.read_bytes() for path in made
    ]


def test_the_weights_and_the_labels_are_those_of_the_training_and_the_test_images(place, tmp_path):
    session = asked(place, samples=4)
    model = weigh(session, session.jobs[0], 0).model
    mean, n = similarity(heatmaps(model, *session.data.test.batch(slice(0, 4))))
    for row in rows(figure(session, tmp_path)[2]):
        at = int(row["expert"]) - 1, int(row["other"]) - 1
        assert int(row["n"]) == n[at]
        assert row["cosine"] == ("" if n[at] == 0 else f"{round(float(mean[at]), 6)}")


@pytest.mark.parametrize(("samples", "shown"), [(None, 6), (2, 2)])
def test_there_is_a_row_an_image_and_a_column_an_expert(samples, shown, place, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "bench.plot.heatmaps._draw", lambda x, heat, names: seen.append((x.shape, heat.shape, names)) or []
    )
    session = asked(place, samples=samples)
    figure(session, tmp_path)
    ((x, heat, names),) = seen
    labels = session.data.test.batch(slice(0, shown))[1]
    assert (x, heat[:2]) == ((shown, 1, 8, 8), (shown, 3))
    assert names == [session.data.classes[label] for label in labels.tolist()]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("experts", [1, 7])
def test_the_page_is_a_column_wide_and_shows_where_it_is_hot(channels, experts):
    from io import BytesIO

    from bench.plot.heatmaps import _draw

    heat = torch.zeros(2, experts, 4, 4)
    heat[0, :, 0, 0] = 5
    png = dict(_draw(torch.zeros(2, channels, 8, 8), heat, ["a", "b"]))["png"]
    image = matplotlib.image.imread(BytesIO(png))[..., :3].sum(2)
    across = (3.25 - 0.16) / (1 + experts) * 300
    assert image.shape[1] == 975 and image.shape[0] == pytest.approx(0.16 * 300 + 2 * across, abs=1)

    def cell(row, column, down, right):
        return image[int(48 + (row + down) * across), int(48 + (column + right) * across)]

    # black images: warm where the heatmap is, in that row and under that expert alone
    assert cell(0, 0, 0.1, 0.1) == 0
    for column in range(1, 1 + experts):
        assert cell(0, column, 0.1, 0.1) > 1
        assert cell(0, column, 0.8, 0.8) < 0.1
        assert cell(1, column, 0.1, 0.1) < 0.1


def test_nothing_is_trained_for_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.weights, "train", lambda *given, **more: pytest.fail("trained"))
    with pytest.raises(UsageError, match="`bench train --defense immunity --dataset digits` first"):
        figure(asked(tmp_path / "results"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{"seed": 1}, {"settings": {**SMALL, "mi": 0.7}}])
def test_another_training_does_not_stand_in(other, place, tmp_path):
    session = prepare("immunity", "digits", results=place, **{"settings": SMALL, **other})
    with pytest.raises(UsageError, match="was not trained with these settings"):
        figure(session, tmp_path)


def test_a_checkpoint_takes_the_place_of_a_training(place, tmp_path):
    (path,) = (place / "checkpoints").rglob(FILES["best"])
    made = figure(asked(tmp_path / "elsewhere", checkpoint=str(path)), tmp_path / "a")
    assert made[0].read_bytes() == figure(asked(place), tmp_path / "b")[0].read_bytes()


def test_a_model_that_shows_no_activations_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(UsageError, match="'resnet18' has no heatmaps: its model, a .* has no method"):
        figure(asked(tmp_path, "resnet18"), tmp_path)


def test_more_images_than_fit_and_several_defenses_are_refused(place, tmp_path):
    with pytest.raises(UsageError, match="25 images are too many for a figure; --samples must be at most 24"):
        figure(asked(place, samples=25), tmp_path)
    session = asked(place)
    with pytest.raises(UsageError, match="of one defense, not of 2"):
        figure(dataclasses.replace(session, jobs=session.jobs * 2), tmp_path)


def test_a_model_with_nothing_to_train_is_drawn_as_it_is(place, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.plot.network.stages", lambda job, data: ())
    monkeypatch.setattr("bench.weights.stages", lambda job, data: ())
    assert len(figure(asked(tmp_path / "none"), tmp_path)) == 3


def called(*words):
    return commands.main(["plot", *map(str, words)], standalone_mode=False)


def test_the_command_draws_them(place, tmp_path, capsys):
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    called("--heatmaps", "immunity", "--samples", 2, "--results", place, "--out", tmp_path, *settings)
    assert [line.rsplit("-", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "heatmaps.png",
        "heatmaps.pdf",
        "heatmaps.csv",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", 3, "--set", "a=b"], "--samples, --set belong"),
        (["--tradeoff", "--device", "cpu"], "--device belong"),
        (["--tradeoff", "--heatmaps", "immunity"], "one at a time"),
        (["--gates", "dwf", "--gallery", "dwf"], "one at a time"),
        (["--tradeoff", "--lines", "cifar10"], "--lines belongs to --calibration"),
        (["--heatmaps", "immunity", "--eps", "0.1"], "--eps belongs to"),
        (["--tradeoff", "--results", "nowhere"], "no results folder 'nowhere'"),
        (["--heatmaps", "imunity"], "did you mean 'immunity'"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said):
    with pytest.raises(UsageError, match=said):
        called(*words)
