"""The training loop: what it computes, what it keeps, and that a stopped training ends as an unbroken one."""

import hashlib
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from bench import pipeline
from bench.attacks.pgd import pgd
from bench.crafting import crafting
from bench.data import Dataset, Split
from bench.defense import Defense, Stage, follow
from bench.errors import CheckpointError, Interrupted, UsageError, VoidRun
from bench.held_out import HeldOut, hold_out
from bench.rng import Rng
from bench.threat import Linf
from bench.train import augment, estimate, initial, paces, rate, score, train


class Net(nn.Module):
    """Has a bit of everything: convolution, BatchNorm, dropout, linear."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(4, classes)

    def forward(self, x):
        return self.linear(self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class Made(Defense[None]):
    """A defense of the given stages and network."""

    recipes = {}

    def __init__(self, *given: Stage, net=Net) -> None:
        super().__init__(None)
        self.given, self.net = given, net

    def build(self, data):
        return self.net()

    def stages(self, data):
        return self.given


def clean(model, x, y, rng):
    return F.cross_entropy(model(x), y)


def noisy(model, x, y, rng):
    return F.cross_entropy(model(x + 0.1 * rng.normal(x)), y)


def attacked(model, x, y, rng):
    with crafting(model):
        x_adv = pgd(model, x, y, Linf(0.1), rng=rng, steps=2)
    return F.cross_entropy(model(x_adv), y)


def halves(model):
    return [[*model.conv.parameters(), *model.bn.parameters()], list(model.linear.parameters())]


def in_turn(model, x, y, rng, optimisers):
    """Steps the first optimiser on the loss and then the second on the loss after that."""
    for optimiser in optimisers:
        loss = clean(model, x, y, rng)
        follow(loss, [optimiser])
    return loss


def stage(loss=clean, **settings) -> Stage:
    given = {"name": "only", "epochs": 2, "batch_size": 18, "lr": 0.1} | settings
    return Stage(**given) if "update" in given else Stage(loss=loss, **given)


DATA = dataset(crop=1, flip=True)
#: per epoch, of the 54 images that are not held out
BATCHES = 3
KINDS = {
    "one stage": [stage(epochs=3)],
    "two stages": [stage(noisy, name="first"), stage(name="second", epochs=1, lr=0.05)],
    "average": [stage(ema=0.8), stage(ema=0.5, select="clean")],
    "selection": [stage(select="clean"), stage(noisy, select="robust", warmup=0.5)],
    "crafted images": [stage(attacked)],
    "own update, two groups": [stage(update=in_turn, groups=halves), stage(groups=halves, momentum=0.5)],
}
#: a full training's steps
STEPS = {kind: sum(one.epochs for one in stages) * BATCHES for kind, stages in KINDS.items()}


def run(folder, *stages, data=DATA, seed=0, net=Net, **settings):
    return train(Made(*stages, net=net), data, seed=seed, folder=folder, quiet=True, **settings)


def tripped(stages, at, act):
    """The same stages, but in the `at`-th step counted from now, `act` happens first."""
    left = [at]

    def wrap(one):
        def before():
            if left[0] == 0:
                act()
            left[0] -= 1

        def loss(*given):
            before()
            return one.loss(*given)

        def update(*given):
            before()
            return one.update(*given)

        settings = {name: getattr(one, name) for name in Stage.__dataclass_fields__}
        return Stage(**settings | ({"update": update} if one.update else {"loss": loss}))

    return [wrap(one) for one in stages]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise ZeroDivisionError


def assert_equal(one, two):
    states = one.model.state_dict(), two.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
    assert one.history == two.history
    assert one.last.keys() == two.last.keys()
    assert all(torch.equal(value, two.last[key]) for key, value in one.last.items())
    for cost in ("epoch", "epochs", "passes", "forwards", "checks", "multiply_adds"):
        assert getattr(one, cost) == getattr(two, cost), cost


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return {kind: run(tmp_path_factory.mktemp("unbroken"), *stages) for kind, stages in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signalled", [interrupt, terminate])
def test_a_training_stopped_by_a_signal_at_any_step_ends_with_the_same_weights(
    kind, signalled, unbroken, tmp_path
):
    for step in range(STEPS[kind]):
        folder = tmp_path / str(step)
        with pytest.raises(Interrupted, match="the same command goes on from there"):
            run(folder, *tripped(KINDS[kind], step, signalled))
        torch.manual_seed(step)
        assert_equal(run(folder, *KINDS[kind]), unbroken[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_crashed_at_any_step_goes_on_from_its_last_epoch(kind, unbroken, tmp_path):
    for step in range(STEPS[kind]):
        folder = tmp_path / str(step)
        with pytest.raises(ZeroDivisionError):
            run(folder, *tripped(KINDS[kind], step, crash))
        assert (folder / "state.pt").exists() == (step >= BATCHES)
        assert_equal(run(folder, *KINDS[kind]), unbroken[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_stopped_after_every_single_step_ends_with_the_same_weights(kind, unbroken, tmp_path):
    for _ in range(STEPS[kind]):
        with pytest.raises(Interrupted):
            run(tmp_path, *tripped(KINDS[kind], 0, interrupt))
    assert_equal(run(tmp_path, *tripped(KINDS[kind], 0, crash)), unbroken[kind])


def test_a_stop_is_obeyed_after_the_step_it_came_in(tmp_path):
    taken = []

    def counted(*given):
        taken.append(1)
        return clean(*given)

    with pytest.raises(Interrupted, match="stopped in only, epoch 2"):
        run(tmp_path, *tripped([stage(counted)], 4, interrupt))
    assert len(taken) == 5


def test_a_second_signal_stops_at_once(tmp_path):
    def twice():
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *tripped([stage()], 1, twice))


def test_handlers_of_signals_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path, stage())
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "other", *tripped([stage()], 0, crash))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_training_in_another_thread_than_the_main_one_is_the_same(unbroken, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, *KINDS["one stage"])))
    thread.start()
    thread.join()
    assert_equal(found[0], unbroken["one stage"])


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = run(tmp_path, stage())
    assert_equal(run(tmp_path, *tripped([stage()], 0, crash)), first)


def test_other_seeds_give_other_initial_weights_orders_and_results(tmp_path):
    seen = {}

    def recorded(seed):
        def loss(model, x, y, rng):
            seen.setdefault(seed, x.clone())
            return clean(model, x, y, rng)

        return loss

    results = [run(tmp_path / str(seed), stage(recorded(seed)), seed=seed) for seed in (0, 1)]
    assert not torch.equal(seen[0], seen[1])
    weights = [initial(Made(stage()), DATA, seed).linear.weight for seed in (0, 1)]
    assert not torch.equal(*weights)
    assert not torch.equal(*(result.model.linear.weight for result in results))


# ---------------------------------------------------------------------------------------------------------------------
# what a step is


class Flat(nn.Module):
    """Softmax regression."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("warmup", [0, 1])
def test_training_is_sgd_with_momentum_weight_decay_and_a_cosine_as_written_by_hand(warmup, tmp_path):
    data, epochs, size, lr, momentum, decay = dataset(), 3, 18, 0.2, 0.8, 0.01
    found = []

    def recorded(model, x, y, rng):
        found.append((model.linear.weight.detach().clone(), model.linear.bias.detach().clone()))
        return clean(model, x, y, rng)

    made = Made(
        stage(recorded, epochs=epochs, lr=lr, momentum=momentum, weight_decay=decay, warmup=warmup), net=Flat
    )
    result = train(made, data, seed=7, folder=tmp_path, quiet=True)
    found.append((result.model.linear.weight.detach(), result.model.linear.bias.detach()))

    kept, _ = hold_out(data.train, data.classes)
    x_all = torch.from_numpy(kept.images).permute(0, 3, 1, 2).flatten(1).float() / 255
    y_all = torch.from_numpy(kept.labels)
    start = initial(made, data, 7)
    w, b = start.linear.weight.detach().clone(), start.linear.bias.detach().clone()
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    total, rise, step = epochs * BATCHES, warmup * BATCHES, 0
    for epoch in range(epochs):
        order = Rng(7, "order", 0, epoch).permutation(len(y_all))
        for batch in order[: BATCHES * size].split(size):
            assert torch.allclose(found[step][0], w, atol=1e-6)
            assert torch.allclose(found[step][1], b, atol=1e-6)
            x, y = x_all[batch], y_all[batch]
            error = (x @ w.T + b).softmax(1) - F.one_hot(y, 3)
            if step < rise:
                now = lr * (step + 1) / rise
            else:
                now = lr * (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2
            vw = momentum * vw + error.T @ x / size + decay * w
            vb = momentum * vb + error.mean(0) + decay * b
            w, b = w - now * vw, b - now * vb
            step += 1
    assert torch.allclose(found[-1][0], w, atol=1e-6)
    assert len(found) == total + 1


@pytest.mark.parametrize(
    ("step", "total", "warmup", "share"),
    [
        (0, 4, 0, 1.0),
        (1, 4, 0, 0.5 + 0.25 * 2**0.5),
        (2, 4, 0, 0.5),
        (3, 4, 0, 0.5 - 0.25 * 2**0.5),
        (0, 6, 2, 0.5),
        (1, 6, 2, 1.0),
        (2, 6, 2, 1.0),
        (4, 6, 2, 0.5),
        (0, 2, 4, 0.25),
        (1, 2, 4, 0.5),
        (0, 1, 0, 1.0),
    ],
)
def test_the_rate_rises_in_a_line_and_falls_along_half_a_cosine(step, total, warmup, share):
    assert rate(step, total, warmup) == pytest.approx(share)


def test_every_optimiser_follows_the_schedule(tmp_path):
    rates = []

    def update(model, x, y, rng, optimisers):
        rates.append([group["lr"] for optimiser in optimisers for group in optimiser.param_groups])
        return in_turn(model, x, y, rng, optimisers)

    run(tmp_path, stage(update=update, groups=halves, epochs=2, lr=0.3))
    assert rates == [pytest.approx([0.3 * rate(i, 2 * BATCHES, 0)] * 2) for i in range(2 * BATCHES)]


def test_only_what_a_stage_names_is_moved(tmp_path):
    before = initial(Made(), DATA, 0)
    after = run(tmp_path, stage(groups=lambda model: [model.linear.parameters()])).model
    assert torch.equal(before.conv.weight, after.conv.weight)
    assert torch.equal(before.bn.weight, after.bn.weight)
    assert not torch.equal(before.linear.weight, after.linear.weight)


def test_the_average_is_the_recursion_over_all_steps(tmp_path):
    seen = []

    def loss(model, x, y, rng):
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return clean(model, x, y, rng)

    plain = run(tmp_path / "plain", stage(loss)).model.state_dict()
    states = [*seen, plain]
    averaged = run(tmp_path / "average", stage(ema=0.7)).model.state_dict()
    for key in ("conv.weight", "bn.running_var", "linear.bias"):
        expected = states[0][key]
        for state in states[1:]:
            expected = 0.7 * expected + 0.3 * state[key]
        assert torch.allclose(averaged[key], expected, atol=1e-6), key
    assert averaged["bn.num_batches_tracked"] == 2 * BATCHES


def test_an_epoch_shows_every_image_at_most_once_and_drops_what_fills_no_batch(tmp_path):
    shown = []

    def loss(model, x, y, rng):
        shown.append(x.clone())
        return clean(model, x, y, rng)

    run(tmp_path, stage(loss, batch_size=16, epochs=2), data=dataset())
    assert [len(x) for x in shown] == [16] * 6
    for epoch in (shown[:3], shown[3:]):
        assert len({x.numpy().tobytes() for batch in epoch for x in batch}) == 48
    assert not torch.equal(shown[0], shown[3])


def test_fewer_images_than_a_batch_are_one_batch(tmp_path):
    shown = []

    def loss(model, x, y, rng):
        shown.append(len(x))
        return clean(model, x, y, rng)

    run(tmp_path, stage(loss, batch_size=500))
    assert shown == [54, 54]


def test_the_history_says_stage_epoch_and_mean_loss(tmp_path):
    values = []

    def loss(model, x, y, rng):
        found = clean(model, x, y, rng)
        values.append(found.item())
        return found

    history = run(tmp_path, stage(loss, name="a"), stage(loss, name="b", epochs=1)).history
    assert [(row["stage"], row["epoch"]) for row in history] == [("a", 1), ("a", 2), ("b", 1)]
    assert [row["loss"] for row in history] == pytest.approx(
        np.reshape(values, (3, BATCHES)).mean(1).tolist()
    )


def test_a_network_without_stages_comes_back_as_built_and_nothing_is_written(tmp_path):
    result = run(tmp_path)
    assert torch.equal(result.model.linear.weight, initial(Made(), DATA, 0).linear.weight)
    assert result.history == [] and list(tmp_path.iterdir()) == []


def test_a_stage_of_no_epochs_changes_nothing(tmp_path):
    result = run(tmp_path, stage(epochs=0, ema=0.9), stage(epochs=0, select="clean"))
    assert torch.equal(result.model.linear.weight, initial(Made(), DATA, 0).linear.weight)


# ---------------------------------------------------------------------------------------------------------------------
# bf16


@pytest.mark.parametrize("where", ["loss", "selection"])
def test_images_are_crafted_with_batchnorm_folded_and_learnt_from_with_batchnorm(where, tmp_path):
    seen = []

    class Watched(Net):
        def forward(self, x):
            # in float64, and with stand-ins for images, it is only looked for what may be folded
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                seen.append(("forward" in vars(self.bn), self.bn.training, x.requires_grad))
            return super().forward(x)

    one = stage(
        attacked if where == "loss" else clean, epochs=1, select="robust" if where == "selection" else "last"
    )
    run(tmp_path, one, net=Watched)
    crafted, learnt, judged = (True, False, True), (False, True, False), (False, False, False)
    assert set(seen) - {judged} == {crafted, learnt}
    assert seen.count(learnt) == BATCHES
    assert where == "loss" or seen.count(crafted) == 10


def test_bf16_trains_float32_weights_to_about_the_same_place(tmp_path):
    one = run(tmp_path / "fp32", stage(), net=Flat).model.linear.weight
    two = run(tmp_path / "bf16", stage(), net=Flat, precision="bf16").model.linear.weight
    assert two.dtype == torch.float32
    assert not torch.equal(one, two)
    assert torch.allclose(one, two, atol=0.02)


def test_losses_run_in_bf16_where_it_is_asked(tmp_path):
    seen = []

    def loss(model, x, y, rng):
        logits = model(x)
        seen.append(logits.dtype)
        return F.cross_entropy(logits, y)

    run(tmp_path / "a", stage(loss, epochs=1))
    run(tmp_path / "b", stage(loss, epochs=1), precision="bf16")
    assert set(seen[:BATCHES]) == {torch.float32} and set(seen[BATCHES:]) == {torch.bfloat16}


@pytest.mark.parametrize(("precision", "multiplied"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_a_step_multiplies_as_it_was_asked_and_looking_does_not(precision, multiplied, tmp_path):
    seen, products = [], torch.backends.cuda.matmul
    before = products.fp32_precision

    def loss(model, x, y, rng):
        seen.append(products.fp32_precision)
        return F.cross_entropy(model(x), y)

    def observe(model, held, rows):
        assert products.fp32_precision == before
        return {}

    run(tmp_path, stage(loss, epochs=1, observe=observe), precision=precision)
    paces(Made(stage(loss, epochs=1)), DATA, device="cpu", precision=precision)
    assert len(seen) > BATCHES and set(seen) == {multiplied}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_stage_computes_after_its_own_step_sees_the_weights_after_it(precision, tmp_path):
    def update(model, x, y, rng, optimisers):
        loss = clean(model, x, y, rng)
        follow(loss, optimisers)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            assert not model(x).any()
        return loss

    run(tmp_path, stage(update=update, epochs=1), precision=precision)


def test_a_stopped_bf16_training_ends_with_the_same_weights(tmp_path):
    whole = run(tmp_path / "whole", stage(), precision="bf16")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", *tripped([stage()], 3, interrupt), precision="bf16")
    assert_equal(run(tmp_path / "parts", stage(), precision="bf16"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# randomness


def test_the_global_generator_is_left_where_it_was(tmp_path):
    before = torch.random.get_rng_state()
    run(tmp_path, stage(noisy, select="robust"))
    estimate(Made(stage()), DATA, device="cpu", precision="fp32")
    assert torch.equal(before, torch.random.get_rng_state())


def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    drawn = {}

    def loss(key):
        def dropped(model, x, y, rng):
            drawn.setdefault(key, []).append(F.dropout(torch.ones(64)))
            return clean(model, x, y, rng)

        return dropped

    for key, seed in (("one", 0), ("again", 0), ("other", 1)):
        torch.manual_seed(len(drawn))
        run(tmp_path / key, stage(loss(key)), seed=seed)
    for one, again, other in zip(drawn["one"], drawn["again"], drawn["other"], strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({mask.numpy().tobytes() for mask in drawn["one"]}) == 2 * BATCHES


def test_the_initial_weights_are_a_function_of_the_seed_alone():
    first = initial(Made(), DATA, 3).state_dict()
    torch.rand(5)
    second = initial(Made(), DATA, 3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---------------------------------------------------------------------------------------------------------------------
# what voids a training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_voids_the_training(value, tmp_path):
    def loss(model, x, y, rng):
        return clean(model, x, y, rng) + (value if rng.address[-2:] == (1, 2) else 0)

    with pytest.raises(
        VoidRun, match=rf"the loss of only is {value} in epoch 2, step 3; a smaller lr may help"
    ):
        run(tmp_path, stage(loss))


@pytest.mark.parametrize("key", ["bn.running_var", "linear.bias"])
def test_a_buffer_or_weight_that_is_not_finite_voids_the_training(key, tmp_path):
    def poisoned(model, x, y, rng, optimisers):
        loss = clean(model, x, y, rng)
        follow(loss, optimisers)
        with torch.no_grad():
            model.state_dict()[key][1] = math.inf
        return loss

    with pytest.raises(VoidRun, match=f"{key} is NaN or infinite after epoch 1 of only"):
        run(tmp_path, stage(update=poisoned, batch_size=54))


# ---------------------------------------------------------------------------------------------------------------------
# the kept state


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, *tripped([stage()], 1, interrupt))
    return tmp_path / "state.pt"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "somebody's"])
def test_a_damaged_state_is_refused_and_named(damage, stopped):
    raw = stopped.read_bytes()
    at = len(raw) // 2
    stopped.write_bytes(
        {
            "cut": raw[:-100],
            "flipped": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :],
            "empty": b"",
            "somebody's": raw[64:],
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged; delete it to train from the start"):
        run(stopped.parent, stage())


def test_a_state_of_another_network_is_refused(stopped):
    with pytest.raises(CheckpointError, match="belongs to another network; delete it"):
        run(stopped.parent, stage(), net=Flat)


@pytest.mark.parametrize("groups", [halves, lambda model: [model.linear.parameters()]])
def test_a_state_of_a_training_of_other_parameters_is_refused(groups, stopped):
    with pytest.raises(CheckpointError, match="belongs to a training of other parameters; delete it"):
        run(stopped.parent, stage(groups=groups))


def test_a_state_of_another_version_is_refused(stopped):
    import io

    content = io.BytesIO()
    torch.save({"unheard": 1}, content)
    stopped.write_bytes(hashlib.sha256(content.getvalue()).hexdigest().encode() + content.getvalue())
    with pytest.raises(CheckpointError, match="written by another version; delete it"):
        run(stopped.parent, stage())


def test_a_state_of_before_costs_were_counted_is_refused(stopped):
    import io

    content = io.BytesIO()
    torch.save({"stage": 0, "epoch": 1}, content)
    stopped.write_bytes(hashlib.sha256(content.getvalue()).hexdigest().encode() + content.getvalue())
    with pytest.raises(CheckpointError, match="written by another version; delete it"):
        run(stopped.parent, stage())


def test_a_state_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        run(tmp_path, stage())


# ---------------------------------------------------------------------------------------------------------------------
# held-out images


@pytest.mark.parametrize(("n", "classes", "each"), [(60, 3, 2), (1437, 3, 48), (20_000, 2, 500), (50, 10, 0)])
def test_the_same_share_of_every_class_is_held_out_at_most_a_thousand(n, classes, each):
    images = np.arange(n, dtype=np.int64).view(np.uint8).reshape(n, 8, 1, 1)
    split = Split(images, np.arange(n) % classes)
    kept, held = hold_out(split, [str(i) for i in range(classes)])
    if each == 0:
        assert kept is split and held is split
        return
    assert np.bincount(held.labels).tolist() == [each] * classes
    numbers = [
        set(part.images.reshape(-1, 8).copy().view(np.int64).flatten().tolist()) for part in (kept, held)
    ]
    assert not numbers[0] & numbers[1]
    assert numbers[0] | numbers[1] == set(range(n))


def images_learnt_from(seed, folder):
    shown = set()

    def loss(model, x, y, rng):
        shown.update(one.numpy().tobytes() for one in x)
        return clean(model, x, y, rng)

    run(folder, stage(loss, epochs=1), data=dataset(), seed=seed)
    return shown


def test_the_same_images_are_held_out_whatever_the_seed(tmp_path):
    assert images_learnt_from(0, tmp_path / "0") == images_learnt_from(1, tmp_path / "1")


def test_held_out_images_are_never_learnt_from_and_test_images_never_read(tmp_path):
    data = dataset()
    _, held = hold_out(data.train, data.classes)
    assert not images_learnt_from(0, tmp_path / "a") & {
        x.numpy().tobytes() for x in held.batch(slice(None))[0]
    }

    def guarded(which):
        assert which == "train", "the test images were read"
        return data.read(which)

    fields = {name: getattr(data, name) for name in Dataset.__dataclass_fields__}
    run(
        tmp_path / "b",
        stage(select="robust"),
        stage(select="clean"),
        data=Dataset(**fields | {"read": guarded}),
    )


# ---------------------------------------------------------------------------------------------------------------------
# selection


def telling(wrong: int = 1) -> Dataset:
    """Two classes: one pixel tells them apart widely in all images of four but `wrong`, another barely in all."""

    def read(which):
        labels = np.arange(80) % 2
        sign = 2 * labels - 1
        images = np.full((80, 1, 2, 1), 128, np.uint8)
        images[:, 0, 0, 0] += (64 * np.where(np.arange(80) // 2 % 4 < wrong, -sign, sign)).astype(np.uint8)
        images[:, 0, 1, 0] += (5 * sign).astype(np.uint8)
        return Split(images, labels)

    return Dataset(
        name="telling",
        classes=("0", "1"),
        shape=(1, 1, 2),
        mean=(0.5,),
        std=(1.0,),
        eps=0.1,
        crop=0,
        flip=False,
        read=read,
    )


class Reader(nn.Module):
    """Reads the class from the pixel that `weight` points to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        z = ((x.flatten(1) - 128 / 255) * self.weight).sum(1)
        return torch.stack([-z, z], 1)


WIDE, BARELY, UPSIDE_DOWN = (1.0, 0.0), (0.0, 1.0), (0.0, -1.0)


def told(*epochs, **settings):
    """A stage whose weights after each epoch are given."""

    def update(model, x, y, rng, optimisers):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(epochs[rng.address[3]]))
        return torch.tensor(0.0)

    return stage(update=update, epochs=len(epochs), batch_size=36, **settings)


@pytest.mark.parametrize(
    ("select", "epochs", "kept", "scores"),
    [
        ("last", [BARELY, WIDE, UPSIDE_DOWN], UPSIDE_DOWN, None),
        ("clean", [WIDE, BARELY, UPSIDE_DOWN], BARELY, [0.75, 1, 0]),
        ("clean", [BARELY, UPSIDE_DOWN, WIDE], BARELY, [1, 0, 0.75]),
        ("robust", [BARELY, WIDE, UPSIDE_DOWN], WIDE, [0, 0.75, 0]),
        ("robust", [WIDE, BARELY, BARELY], WIDE, [0.75, 0, 0]),
    ],
)
def test_the_epoch_that_does_best_on_held_out_images_is_kept(select, epochs, kept, scores, tmp_path):
    result = run(tmp_path, told(*epochs, select=select), data=telling(), net=Reader)
    assert tuple(result.model.weight.tolist()) == kept
    if scores is None:
        assert all("held_out" not in row for row in result.history)
    else:
        assert [row["held_out"] for row in result.history] == pytest.approx(scores, abs=0.13)


def test_each_stage_selects_for_itself_and_begins_where_the_last_one_left(tmp_path):
    begun = []

    def loss(model, x, y, rng):
        begun.append(tuple(model.weight.tolist()))
        return 0 * model.weight.sum()

    best_then_bad = told(BARELY, UPSIDE_DOWN, select="clean")
    result = run(tmp_path, best_then_bad, stage(loss, epochs=1, weight_decay=0), data=telling(), net=Reader)
    assert begun[0] == BARELY == tuple(result.model.weight.tolist())
    less = told(WIDE, UPSIDE_DOWN, select="clean")
    result = run(tmp_path / "b", best_then_bad, less, data=telling(), net=Reader)
    assert tuple(result.model.weight.tolist()) == WIDE


def test_with_an_average_it_is_the_average_that_is_scored_and_kept(tmp_path):
    result = run(
        tmp_path, told(BARELY, BARELY, UPSIDE_DOWN, select="clean", ema=0.5), data=telling(), net=Reader
    )
    # two steps an epoch: 0, then 1/2, 3/4, 7/8, 15/16, and down again
    assert result.model.weight.tolist() == pytest.approx([0, 15 / 16])
    assert [row["held_out"] for row in result.history] == [1, 1, 0]


@pytest.mark.parametrize(("select", "weight", "share"), [("clean", BARELY, 1.0), ("robust", BARELY, 0.0)])
def test_a_score_is_the_share_of_images_that_are_right_and_changes_no_mode(select, weight, share):
    data, model = telling(), nn.Sequential(Reader(), nn.Dropout(0.5))
    model[0].weight.data = torch.tensor(weight)
    assert score(model.train(), HeldOut(data.train), data, select) == share
    assert model.training and model[1].training


def test_a_score_counts_the_last_images_of_an_uneven_split_too():
    data = dataset(n=251)
    model = Flat()
    with torch.no_grad():
        x, y = data.train.batch(slice(None))
        expected = (model(x).argmax(1) == y).double().mean()
    assert score(model, HeldOut(data.train), data, "clean") == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("select", "epochs", "kept"), [("clean", [WIDE, BARELY, UPSIDE_DOWN], 2), ("last", [WIDE, BARELY], 2)]
)
def test_the_weights_of_the_last_epoch_are_kept_beside_the_selected_ones(select, epochs, kept, tmp_path):
    def ran():
        return run(tmp_path, told(BARELY), told(*epochs, select=select), data=telling(), net=Reader)

    # trained, and then read from the state that it left
    for result in (ran(), ran()):
        assert tuple(result.last["weight"].tolist()) == epochs[-1]
        assert tuple(result.model.weight.tolist()) == epochs[kept - 1]
        assert (result.epoch, result.epochs) == (kept, len(epochs))


def test_the_last_weights_are_the_average_where_there_is_one(tmp_path):
    result = run(tmp_path, told(BARELY, UPSIDE_DOWN, select="clean", ema=0.5), data=telling(), net=Reader)
    # two steps an epoch: 0, 1/2, 3/4, and down again: -1/8, -9/16
    assert result.last["weight"].tolist() == pytest.approx([0, -9 / 16])
    assert result.model.weight.tolist() == pytest.approx([0, 3 / 4])


# ---------------------------------------------------------------------------------------------------------------------
# what a stage observes and remembers


def test_what_a_stage_observes_joins_its_rows_and_it_is_shown_those_of_its_own(tmp_path):
    shown = []

    def observe(model, held, rows):
        shown.append([dict(row) for row in rows])
        assert len(held.labels) == len(held.right(model)) == 8
        return {"length": len(rows), "odd": len(rows) % 2 == 1}

    first, second = told(BARELY), told(BARELY, WIDE, name="second", select="clean", observe=observe)
    history = run(tmp_path, first, second, data=telling(), net=Reader).history
    assert [set(row) for row in history] == [
        {"stage", "epoch", "loss"},
        *[{"stage", "epoch", "loss", "held_out", "length", "odd"}] * 2,
    ]
    assert [(row["length"], row["odd"]) for row in history[1:]] == [(1, True), (2, False)]
    assert [[row["epoch"] for row in rows] for rows in shown] == [[1], [1, 2]]
    assert shown[1][0] == history[1] and shown[1][1]["held_out"] == history[2]["held_out"]


@pytest.mark.parametrize("value", [math.nan, "0.5", torch.tensor(0.5), None])
def test_a_stage_that_observes_something_other_than_finite_numbers_is_refused(value, tmp_path):
    with pytest.raises(UsageError, match="stage 'only' must observe finite numbers, not odd="):
        run(tmp_path, stage(observe=lambda model, held, rows: {"odd": value}))


def remembering():
    """Two stages whose losses follow a number and a tensor that every step changes; the second goes on from the first's."""
    memory = {"n": 0, "t": torch.ones(2)}

    def loss(model, x, y, rng):
        memory["n"] += 1
        memory["t"] = memory["t"] * 1.1
        return clean(model, x, y, rng) * memory["t"].mean() / (1 + memory["n"])

    return [stage(loss, memory=memory), stage(loss, name="second", epochs=1, memory=memory)]


def test_what_a_stage_remembers_survives_a_stop_at_any_step(tmp_path):
    whole = run(tmp_path / "whole", *remembering())
    for step in range(3 * BATCHES):
        folder = tmp_path / str(step)
        with pytest.raises(Interrupted):
            run(folder, *tripped(remembering(), step, interrupt))
        assert_equal(run(folder, *remembering()), whole)


# ---------------------------------------------------------------------------------------------------------------------
# what a training costs


def crafted_twice(model, x, y, rng):
    """Two gradients of half of the images, a look at the other half, and a step on all."""
    some = x[: len(x) // 2].clone().requires_grad_()
    for _ in range(2):
        torch.autograd.grad(clean(model, some, y[: len(some)], rng), some)
    with torch.no_grad():
        model(x[len(some) :])
    return clean(model, x, y, rng)


def test_passes_and_forwards_are_per_image_learnt_from_and_held_out_images_apart(tmp_path):
    result = run(tmp_path, stage(crafted_twice, epochs=3, select="robust"))
    # 6 of 60 images are held out, 3 epochs of PGD-10
    assert (result.passes, result.forwards) == (3 * 2, 3 * 0.5)
    assert result.checks == pytest.approx(3 * 10 * 6 / 54, abs=1e-3)
    # 4 filters of 3×3 at 6×6 places, and 4×3 weights
    assert result.multiply_adds == 4 * 9 * 36 + 12


def test_images_that_fill_no_batch_cost_nothing(tmp_path):
    assert run(tmp_path, stage(batch_size=40)).passes == pytest.approx(2 * 40 / 54, abs=1e-3)


def test_a_part_of_the_network_costs_its_part(tmp_path):
    def loss(model, x, y, rng):
        with torch.no_grad():
            h = F.relu(model.bn(model.conv(x))).mean((2, 3))
        return F.cross_entropy(model.linear(h), y)

    result = run(tmp_path, stage(loss, epochs=1))
    assert result.passes == pytest.approx(12 / 1308, abs=1e-3)
    assert result.forwards == pytest.approx(1296 / 1308, abs=1e-3)


def test_a_network_without_layers_that_are_counted_says_nothing_of_its_cost(tmp_path):
    result = run(tmp_path, told(BARELY), data=telling(), net=Reader)
    assert (result.passes, result.forwards, result.checks, result.multiply_adds) == (None,) * 4


# ---------------------------------------------------------------------------------------------------------------------
# augmentation


def windows(image, pad, flip):
    """Every image that padding, cropping and perhaps mirroring can make of one, as bytes."""
    c, h, w = image.shape
    padded = torch.zeros(c, h + 2 * pad, w + 2 * pad)
    padded[:, pad : pad + h, pad : pad + w] = image
    found = set()
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, top : top + h, left : left + w]
            found.add(window.contiguous().numpy().tobytes())
            if flip:
                found.add(window.flip(2).contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize(("crop", "flip"), [(0, True), (1, False), (2, True)])
def test_an_augmented_image_is_a_shifted_or_mirrored_copy_and_every_one_occurs(crop, flip):
    data = dataset(crop=crop, flip=flip, channels=3)
    image = torch.rand(3, 5, 4)
    allowed = windows(image, crop, flip)
    assert len(allowed) == (2 * crop + 1) ** 2 * (1 + flip)
    many = augment(image.repeat(2000, 1, 1, 1), data, Rng(0))
    assert many.shape == (2000, 3, 5, 4)
    assert {one.contiguous().numpy().tobytes() for one in many} == allowed


def test_augmentation_keeps_every_image_in_its_row():
    x = torch.rand(40, 2, 5, 5)
    found = augment(x, dataset(crop=2, flip=True, channels=2), Rng(3))
    for image, augmented in zip(x, found, strict=True):
        assert augmented.contiguous().numpy().tobytes() in windows(image, 2, True)


def test_augmentation_is_a_function_of_its_address():
    x, data = torch.rand(40, 1, 8, 8), dataset(crop=2, flip=True)
    assert torch.equal(augment(x, data, Rng(1)), augment(x, data, Rng(1)))
    assert not torch.equal(augment(x, data, Rng(1)), augment(x, data, Rng(2)))


def test_where_the_dataset_allows_neither_nothing_is_augmented():
    x = torch.rand(4, 1, 8, 8)
    assert augment(x, dataset(), Rng(0)) is x


def test_training_augments_as_the_dataset_says(tmp_path):
    def shown(folder, **allowed):
        seen = set()

        def loss(model, x, y, rng):
            seen.update(one.contiguous().numpy().tobytes() for one in x)
            return clean(model, x, y, rng)

        run(folder, stage(loss), data=dataset(**allowed))
        return seen

    stored = {x.numpy().tobytes() for x in dataset().train.batch(slice(None))[0]}
    assert shown(tmp_path / "a") <= stored
    assert not shown(tmp_path / "b", crop=2, flip=True) <= stored


# ---------------------------------------------------------------------------------------------------------------------


def test_an_estimate_counts_all_epochs_and_images_of_all_stages():
    assert estimate(Made(), DATA, device="cpu", precision="fp32") == 0
    assert estimate(Made(stage(epochs=0)), DATA, device="cpu", precision="fp32") == 0
    assert estimate(Made(stage(), stage(ema=0.5)), DATA, device="cpu", precision="bf16") > 0


def test_the_pace_of_a_stage_is_that_of_its_largest_step_that_is_quick(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bench.train.time.perf_counter", lambda: now[0])
    sizes = []

    def takes(start, each, first=0.0):
        """A step of that many seconds, more by `first` where none of its size was before."""

        def loss(model, x, y, rng):
            now[0] += start + each * len(x) + first * (len(x) not in sizes)
            sizes.append(len(x))
            return clean(model, x, y, rng)

        return loss

    def pace(loss, **settings):
        sizes.clear()
        (found,) = paces(Made(stage(loss, batch_size=40, **settings)), DATA, device="cpu", precision="fp32")
        return found

    quick = pace(takes(0.01, 0.001, first=0.2), epochs=3)
    assert sizes == [8, 8, 32, 32, 40, 40]
    assert (quick.stage, quick.epochs) == ("only", 3)
    assert quick.images_per_second == pytest.approx(40 / 0.05)
    assert quick.seconds == pytest.approx(3 * 60 * 0.05 / 40)
    assert pace(takes(0.0, 0.02)).images_per_second == pytest.approx(50) and sizes == [8, 8, 32, 32]
    assert pace(takes(0.0, 1.0)).images_per_second == pytest.approx(1) and sizes == [8]


def test_the_steps_of_a_pace_move_no_weight(tmp_path):
    moved = []

    def loss(model, x, y, rng):
        moved.append([parameter.detach().clone() for parameter in model.parameters()])
        return clean(model, x, y, rng)

    paces(Made(stage(loss)), DATA, device="cpu", precision="fp32")
    assert len(moved) > 1
    assert all(torch.equal(a, b) for a, b in zip(moved[0], moved[-1], strict=True))


@pytest.mark.parametrize(("recipe", "recipes"), [("fast", ["fast"]), (None, ["tiny", "fast", "paper"])])
def test_an_explanation_has_a_row_for_each_recipe_and_trains_nothing(recipe, recipes, tmp_path):
    session = pipeline.prepare("resnet20", results=tmp_path / "results", quiet=True, device="cpu")
    rows = pipeline.explain_training(session, recipe, {"width": 4, "epochs": 7})
    assert [row["recipe"] for row in rows] == recipes
    for row in rows:
        (one,) = row["stages"]
        assert one["epochs"] == 7 and row["seconds"] == one["seconds"] > 0
        assert one["seconds"] == pytest.approx(7 * len(session.data.train) / one["images_per_second"])
    told = pipeline.training_told(rows)
    assert told.count("images/s") == len(recipes) and f"resnet20 ({recipes[0]}) on digits, cpu, fp32" in told
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("stride", "sound"), [(2, False), (1, True)])
def test_a_network_whose_gradients_onednn_would_overrun_learns_without_it(stride, sound, tmp_path):
    seen = []

    def watched(model, x, y, rng):
        seen.append(torch.backends.mkldnn.enabled)
        return F.cross_entropy(model(x), y)

    def net():
        convolutions = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 1, stride)
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    run(tmp_path, stage(watched), net=net)
    paces(Made(stage(watched), net=net), DATA, device="cpu", precision="fp32")
    assert set(seen) == {sound} and torch.backends.mkldnn.enabled
