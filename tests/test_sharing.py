"""A step shared by processes is the step of one: maps and their gradients, BatchNorm, dropout, what cannot be shared."""

import copy
import warnings

import pytest
import torch
from learnable import dataset
from teams import together
from torch import nn
from torch.nn import functional as F

from bench import data as datasets
from bench import processes, registry, sharing
from bench.attacks.pgd import pgd
from bench.crafting import crafting
from bench.defense import Stage, follow
from bench.passes import Work, counting
from bench.threat import Linf
from bench.train import initial, train

# torch has threads of its own; the children use none of them
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


class Net(nn.Module):
    """Has a bit of everything: convolution, BatchNorm, dropout, linear; computes in float64, and says so in float32."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        h = F.relu(self.bn(self.conv(x.double())))
        return self.linear(self.dropout(h.mean((2, 3)))).to(x.dtype)


class RandomNet(Net):
    """Draws random numbers of its own."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class LooksAround(Net):
    """What it says of an image depends on the largest pixel of the batch."""

    def forward(self, x):
        return super().forward(x / x.max())


def net(kind=Net):
    torch.manual_seed(1)
    return kind()


def step(model, x, y):
    """Logits, gradients of parameters and images, and the state after a pass in train mode."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    logits = model(x)
    # no mean of one term an image: the loss of a batch may be anything
    loss = F.cross_entropy(logits, y) + logits.std() + logits.square().mean() ** 2
    (by_x,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + by_x.square().sum()
    grads = torch.autograd.grad(total, [x, *model.parameters()])
    return [logits.detach(), *grads, *(value.clone() for value in model.state_dict().values())]


@pytest.mark.parametrize(("count", "n"), [(2, 6), (3, 7)])
def test_a_shared_pass_has_the_logits_gradients_and_statistics_of_one_process(count, n, tmp_path):
    x, y = torch.rand(n, 1, 8, 8, dtype=torch.float64), torch.arange(n) % 3
    alone = step(net(), x, y)

    def work():
        with processes.joined(), sharing.sharing():
            return step(net(), x, y)

    for shared in together(count, work, tmp_path):
        for one, other in zip(alone, shared, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_each_process_passes_its_share_of_the_images_and_no_more(tmp_path):
    def work():
        seen = []
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        with processes.joined(), sharing.sharing(), counting(Work()) as cost, torch.no_grad():
            for n in (8, 3, 1):
                assert len(model(torch.ones(n, 2))) == n
        return seen, cost.plain

    (first, cost), (second, also) = together(2, work, tmp_path)
    # one image cannot be shared
    assert (first, second) == ([4, 2, 1], [4, 1, 1])
    assert cost == also == (8 + 3 + 1) * 4


def attacked(model, x, y, rng):
    with crafting(model):
        x_adv = pgd(model, x, y, Linf(0.1), rng=rng, steps=3)
    return F.cross_entropy(model(x_adv), y)


def in_turn(model, x, y, rng, optimisers):
    for scale in (1, 2):
        loss = scale * attacked(model, x, y, rng.at(scale))
        follow(loss, optimisers)
    return loss


def stage(**changed):
    given = {
        "name": "at",
        "loss": attacked,
        "epochs": 2,
        "batch_size": 7,
        "lr": 0.1,
        "select": "robust",
    } | changed
    return Stage(**given)


class Made:
    """A defense of the given stages."""

    def __init__(self, *given, kind=Net):
        self.given, self.kind = given, kind

    def build(self, data):
        return self.kind()

    def stages(self, data):
        return self.given


def trained(folder, *stages, kind=Net, said=None):
    made = train(
        Made(*stages, kind=kind),
        dataset(),
        seed=3,
        folder=folder,
        quiet=True,
        together=True,
        say=(said if said is not None else []).append,
    )
    return made.model.state_dict(), made.last, made.history, made.passes, made.checks


def same(one, other, rtol):
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "given",
    [stage(), stage(loss=None, update=in_turn), stage(ema=0.5, warmup=1)],
    ids=["loss", "update", "average"],
)
def test_a_training_of_three_processes_matches_that_of_one(given, tmp_path):
    alone = trained(tmp_path / "alone", given)

    def work():
        with processes.joined():
            return trained(tmp_path / "shared", given)

    for shared in together(3, work, tmp_path):
        same(alone[0], shared[0], 1e-9)
        same(alone[1], shared[1], 1e-9)
        assert [row["held_out"] for row in shared[2]] == [row["held_out"] for row in alone[2]]
        assert shared[2][-1]["loss"] == pytest.approx(alone[2][-1]["loss"], rel=1e-5)
        assert shared[3:] == alone[3:]


@pytest.mark.parametrize("kind", [RandomNet, LooksAround])
def test_a_stage_that_would_not_match_is_trained_by_one_process_bit_for_bit(kind, tmp_path):
    stages = [stage(epochs=1), stage(epochs=1, name="more")]
    alone = trained(tmp_path / "alone", *stages, kind=kind)

    def work():
        said = []
        with processes.joined():
            return *trained(tmp_path / "shared", *stages, kind=kind, said=said), said

    for *shared, said in together(2, work, tmp_path):
        same(alone[0], shared[0], 0)
        assert shared[2:] == list(alone[2:])
        assert said[0].startswith("model: at cannot be shared among processes") and len(said) == 2


def test_a_shared_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = together(2, lambda: joined_training(tmp_path / "whole"), tmp_path)

    def stopped():
        # only one is told, in its fifth step; none goes on without it
        calls = [0]
        before = processes.anyone

        def anyone(holds):
            calls[0] += 1
            return before(holds or (processes.rank() == 1 and calls[0] >= 6))

        monkeypatch.setattr(processes, "anyone", anyone)
        try:
            joined_training(tmp_path / "stopped")
        except processes.Interrupted as error:
            return str(error)
        except processes.Elsewhere:
            return ""

    first, second = together(2, stopped, tmp_path)
    assert sorted([bool(first), bool(second)]) == [False, True]
    assert "the state is kept" in first + second
    again = together(2, lambda: joined_training(tmp_path / "stopped"), tmp_path)
    same(whole[0][0], again[1][0], 0)
    assert whole[0][2] == again[0][2]


def joined_training(folder):
    with processes.joined():
        return trained(folder, stage())


def tried(stages, kind, tmp_path):
    data = dataset()

    def work():
        with processes.joined():
            return [sharing.shareable(one, net(kind), data, "cpu") for one in stages]

    first, second = together(2, work, tmp_path)
    assert first == second
    return first


def test_what_is_tried_leaves_no_trace(tmp_path):
    memory = {"seen": torch.zeros(1)}

    def remembering(model, x, y, rng):
        memory["seen"] += 1
        return F.cross_entropy(model(x), y)

    def work():
        model, before = net(), copy.deepcopy(net().state_dict())
        torch.manual_seed(5)
        with processes.joined():
            held = sharing.shareable(stage(loss=remembering, memory=memory), model, dataset(), "cpu")
        drawn = torch.rand(1)
        torch.manual_seed(5)
        same(before, model.state_dict(), 0)
        return held, float(memory["seen"]), torch.equal(drawn, torch.rand(1))

    assert together(2, work, tmp_path) == [(True, 0.0, True)] * 2


def test_a_loss_that_asks_a_part_of_the_network_by_itself_is_shared_too(tmp_path):
    def parts(model, x, y, rng):
        h = model.bn(model.conv(x.double()))
        return F.cross_entropy(model.linear(h.mean((2, 3))), y) + model(x).square().mean()

    assert tried([stage(loss=parts)], Net, tmp_path) == [True]


class TwoRowsAnImage(Net):
    """Passes every image and its mirror image, one after the other."""

    def forward(self, x):
        both = torch.stack([x, x.flip(3)], 1).flatten(0, 1).double()
        h = F.relu(self.bn(self.conv(both))).mean((2, 3))
        return self.linear(self.dropout(h)).view(len(x), 2, -1).mean(1).to(x.dtype)


def test_rows_that_are_several_to_an_image_share_their_statistics_and_draws(tmp_path):
    assert tried([stage(), stage(batch_size=5)], TwoRowsAnImage, tmp_path) == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, entry in registry.entries().items() if entry.module.startswith("defenses.")]
)
def test_every_stage_of_every_defense_is_the_same_when_shared(name, tmp_path):
    kind = registry.get(name)
    data = datasets.load("digits", None)
    defense = kind(kind.recipes["tiny"])

    def work():
        warnings.simplefilter("error")
        with processes.joined():
            model = initial(defense, data, 0)
            return [sharing.shareable(one, model, data, "cpu") for one in defense.stages(data)]

    assert all(all(found) for found in together(2, work, tmp_path))
