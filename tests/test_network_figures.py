"""Gallery and gate weights show what a trained network says of images and of what PGD made of them."""

import csv
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

from bench.cli import commands
from bench.errors import UsageError
from bench.plot import gallery, gates
from bench.plot.network import attacked
from bench.session import prepare
from bench.weights import weigh

#: networks of two weights, that are trained for a moment
SMALL = {
    "resnet18": {"width": 2, "epochs": 1, "batch_size": 256},
    "dwf": {"width": 2, "gate_width": 2, "expert_epochs": 1, "joint_epochs": 0, "batch_size": 256},
    "soe": {"width": 2, "epochs": 1, "batch_size": 256, "experts": 2, "steps": 1},
}


def asked(results, name, **more):
    return prepare(name, "digits", settings=SMALL[name], results=results, quiet=True, **more)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Results with a trained network, a soft mixture and a hard one."""
    results = tmp_path_factory.mktemp("networks")
    for name in SMALL:
        session = asked(results, name)
        weigh(session, session.jobs[0], 0)
    return results


class OfMeans(nn.Module):
    """Two classes, the brighter half of the image: what PGD does to it is known."""

    def forward(self, x):
        half = x.shape[3] // 2
        return 20 * torch.stack([x[..., :half].mean((1, 2, 3)), x[..., half:].mean((1, 2, 3))], 1)


def test_pgd_takes_a_linear_model_to_the_corner_of_the_ball_and_the_box():
    x = torch.full((3, 1, 4, 4), 0.5)
    x[1, ..., 0] = 0.95
    data = SimpleNamespace(
        eps=0.1,
        test=SimpleNamespace(batch=lambda rows, device: (x[rows], torch.zeros(3, dtype=torch.long)[rows])),
    )
    session = SimpleNamespace(eps=None, data=data, batch_size=2, device=torch.device("cpu"), seeds=(0,))
    job = SimpleNamespace(kind=SimpleNamespace(random=False))
    found = attacked(session, job, OfMeans(), 3)
    expected = x + torch.where(torch.arange(4) < 2, -0.1, 0.1)
    torch.testing.assert_close(found.x_adv, expected.clamp(0, 1))
    assert torch.equal(found.x, x) and found.attack == "PGD-50, eps 0.1"


@pytest.mark.parametrize(("eps", "times"), [(8 / 255, 15), (0.1, 5), (0.5, 1), (0.6, 1)])
def test_a_perturbation_is_shown_as_large_as_fits_around_grey(eps, times):
    assert gallery.times(eps) == times
    change = torch.tensor([-eps, 0.0, eps])
    seen = gallery.shown(SimpleNamespace(x=torch.zeros(3), x_adv=change, eps=eps))
    assert seen[1] == 0.5 and 0 <= seen[0] < 0.1 and 0.9 < seen[2] <= 1


def test_the_gallery_tells_what_the_network_says_of_every_image(place, tmp_path):
    session = asked(place, "resnet18", samples=3, eps="0.05")
    made = gallery.figure(session, tmp_path)
    assert [path.name for path in made] == [f"digits-resnet18-gallery.{e}" for e in ("png", "pdf", "csv")]
    model = weigh(session, session.jobs[0], 0).model.eval()
    x, y = session.data.test.batch(slice(0, 3))
    sure, said = model(x).softmax(1).max(1)
    found = rows(made[-1])
    assert [row["label"] for row in found] == [session.data.classes[label] for label in y.tolist()]
    assert [row["clean"] for row in found] == [session.data.classes[label] for label in said.tolist()]
    assert [float(row["clean_confidence"]) for row in found] == pytest.approx((100 * sure).tolist(), abs=1e-3)
    assert all(0 < float(row["largest_change"]) <= 0.05 + 1e-6 and row["times"] == "10" for row in found)


@pytest.mark.parametrize(("samples", "pixels"), [(2, 975), (6, 975), (7, 2025)])
def test_a_gallery_fits_a_column_or_the_page(samples, pixels, place, tmp_path):
    image = matplotlib.image.imread(gallery.figure(asked(place, "resnet18", samples=samples), tmp_path)[0])
    assert image.shape[1] == pixels
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


class Gated(nn.Module):
    """Two experts; the first weighs what the mean of the image says."""

    experts_count = 2

    def __init__(self, soft):
        super().__init__()
        self.soft = soft

    def gate(self, x):
        p = x.mean((1, 2, 3))
        return torch.stack([p.log(), (1 - p).log()], 1)

    def selected(self, x):
        return self.gate(x).argmax(1)

    def all_outputs(self, x):
        raise NotImplementedError


@pytest.mark.parametrize(("soft", "mean"), [(True, [0.6, 0.4]), (False, [2 / 3, 1 / 3])])
def test_usage_is_the_mean_weight_of_a_soft_gate_and_the_share_of_images_of_a_hard_one(soft, mean):
    x = torch.tensor([0.9, 0.6, 0.3])[:, None, None, None].expand(3, 1, 2, 2)
    session = SimpleNamespace(batch_size=2, device=torch.device("cpu"))
    found = gates.usage(Gated(soft), x, session)
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.first.tolist() == [0, 0, 1]
    weights = [0.9, 0.6, 0.3] if soft else [1, 1, 0]
    assert found.reach[0] == pytest.approx(1.96 * np.std(weights, ddof=1) / 3**0.5, abs=1e-6)


@pytest.mark.parametrize(("name", "gate", "experts"), [("dwf", "soft", 9), ("soe", "hard", 2)])
def test_gates_are_told_of_every_expert_clean_and_attacked(name, gate, experts, place, tmp_path):
    made = gates.figure(asked(place, name, samples=12), tmp_path)
    found = rows(made[-1])
    assert [(row["expert"], row["gate"], row["n"]) for row in found] == [
        (str(expert + 1), gate, "12") for expert in range(experts)
    ]
    for column in ("clean", "attacked", "clean_first", "attacked_first"):
        assert sum(float(row[column]) for row in found) == pytest.approx(100, abs=1e-2)
    image = matplotlib.image.imread(made[0])
    assert image.shape[1] == 975
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border[:, :3] == 1).all()


def test_a_network_without_a_gate_is_refused(place, tmp_path):
    with pytest.raises(
        UsageError, match="'resnet18' has no gate to draw: its model, a Normalized, is no mixture"
    ):
        gates.figure(asked(place, "resnet18"), tmp_path)


def test_nothing_is_trained_for_a_figure(tmp_path):
    for figure in (gallery.figure, gates.figure):
        with pytest.raises(UsageError, match="`bench train --defense dwf --dataset digits` first"):
            figure(asked(tmp_path / "results", "dwf"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_more_images_than_fit_are_refused(place, tmp_path):
    with pytest.raises(UsageError, match="13 images are too many for a figure; --samples must be at most 12"):
        gallery.figure(asked(place, "resnet18", samples=13), tmp_path)


@pytest.mark.parametrize("kind", ["gallery", "gates"])
def test_the_command_writes_the_data_alone_if_asked(kind, place, tmp_path, capsys):
    settings = [word for key, value in SMALL["dwf"].items() for word in ("--set", f"{key}={value}")]
    words = ["plot", f"--{kind}", "dwf", "--samples", 2, "--data", "--results", place, "--out", tmp_path]
    commands.main([*map(str, words), *settings], standalone_mode=False)
    assert capsys.readouterr().out.split() == [str(tmp_path / f"digits-dwf-{kind}.csv")]
    assert [path.name for path in tmp_path.iterdir()] == [f"digits-dwf-{kind}.csv"]
