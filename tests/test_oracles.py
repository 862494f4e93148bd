"""Networks whose robust accuracy is known: ours from above and from below, and verified ones that others published."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Hyperplane, Sphere, TwoLayer, dataset, points

from bench import protocol as protocols
from bench.data import Split
from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Protocol

#: `standard` with fewer steps, starts and queries, so that it takes seconds
SHORT = [
    {"attack": "pgd", "steps": 30, "restarts": 2},
    {"attack": "pgd", "steps": 30, "restarts": 2, "loss": "margin"},
    {
        "attack": "autoattack",
        "settings": {"attacks": ["apgd-ce", "fab", "square"], "steps": 20, "queries": 100},
    },
]


def worst(model, eps, n, norm="Linf", specs=SHORT):
    data = dataset(n, labels=model.labels(points(n)))
    asked = Protocol.model_validate({"name": "t", "norm": norm, "column": specs, "survivors": True}).columns(
        eps
    )
    one = Evaluator(model, classes=10, split=data.test, seed=0, success="any")
    found = one.run(plan(asked), np.arange(n)).outcomes
    return torch.stack([outcome.robust for outcome in found.values()]).all(0)


def test_an_enumerated_network_is_broken_exactly_where_it_can_be():
    model = TwoLayer()
    x = points(12)
    margin = model.margin(x)
    assert len(set(model.labels(x).tolist())) >= 2 and margin.isfinite().all()
    for eps in np.quantile(margin.numpy(), [0.25, 0.5, 0.75]):
        robust = worst(model, eps * 1.001, 12)
        assert robust[margin > eps * 1.01].all(), "broken where no image of the ball is misclassified"
        assert not robust[margin < eps].any(), "a breakable image was not broken"


def test_the_enumerated_margin_is_that_of_a_hyperplane_where_the_network_is_one():
    model = TwoLayer(hidden=2)
    flat = Hyperplane()
    with torch.no_grad():
        # relu(t) - relu(-t) = t
        model.w.copy_(torch.stack([flat.w.flatten(), -flat.w.flatten()]))
        model.b.copy_(torch.stack([flat.b, -flat.b]))
        model.a.copy_(torch.tensor([1.0, -1.0]))
    x = points(6)
    assert torch.allclose(model.margin(x).float(), flat.margin(x), rtol=1e-3)


def test_a_quadratic_is_broken_exactly_where_it_can_be_in_the_euclidean_norm():
    model = Sphere()
    x = points(24)
    margin = model.margin(x)
    assert len(set(model.labels(x).tolist())) == 2
    eps = float(margin.median())
    robust = worst(model, eps * 1.001, 24, norm="L2", specs=SHORT[:2])
    assert torch.equal(robust, margin > eps * 1.001)


FOLDER = os.environ.get("DWF_BENCH_VERIFIED")
#: network: images, radius, robust accuracy that a verifier proved, and that the best published attack left (percent)
NETWORKS = {
    "cifar_cnn_a_mix": ("images", 2 / 255, 48.0, 53.0),
    "cifar_cnn_a_adv4": ("images", 2 / 255, 48.5, 49.5),
    "mnist_cnn_a_adv": ("mnist_test_index", 0.3, 76.0, 76.5),
}


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="DWF_BENCH_VERIFIED names no folder of verified networks")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_verified_network_lies_between_its_bounds_under_standard(name):
    """The folder has `load.py` with `load(name) -> (net, info)`; the images are in `data/` two folders up."""
    folder = Path(str(FOLDER))
    spec = importlib.util.spec_from_file_location("verified_load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, _ = module.load(name)
    images, eps, verified, published = NETWORKS[name]
    split = verified_images(folder.parent.parent / "data", images)
    one = Evaluator(net, classes=10, split=split, seed=0, success="any")
    asked = protocols.load("standard").columns(eps)
    found = one.run(plan(asked), np.arange(len(split))).outcomes
    robust = {column: outcome.robust.double().mean().item() * 100 for column, outcome in found.items()}
    print(name, robust)
    assert verified <= robust["autoattack"] <= published + 0.5


def verified_images(data, images):
    stored = np.load(data / "cifar10" / "sdp200.npz")
    if images == "images":
        return Split(stored["images"], stored["labels"].astype(np.int64))
    mnist = np.load(data / "mnist" / "test.npz")
    index = stored[images]
    pixels = mnist["images"][index]
    return Split(pixels.reshape(len(pixels), 28, 28, 1), mnist["labels"][index].astype(np.int64))
