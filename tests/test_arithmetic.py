"""What is called float32 is float32; TF32 is used where it was asked for, for gradients alone."""

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset

from bench import arithmetic, session
from bench.arithmetic import ON_CPUS, ON_GPUS, exact_arithmetic, tf32
from bench.errors import UsageError
from bench.evaluate import Evaluator
from bench.judge import Cost, Judge
from bench.plan import plan
from bench.protocol import Protocol

backends = torch.backends


def state():
    """Every switch that decides how float32 is multiplied, the older ones too."""

    def told(read):
        try:
            return read()
        except RuntimeError:
            return "torch does not say"

    older = (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32)
    return [one.fp32_precision for one in (*ON_GPUS, *ON_CPUS)], [told(read) for read in older]


@pytest.fixture(autouse=True)
def put_back():
    new, old = state()
    yield
    backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(old[0])
    backends.cudnn.allow_tf32 = old[1]
    for one, precision in zip((*ON_GPUS, *ON_CPUS), new, strict=True):
        one.fp32_precision = precision


def older(value):
    torch.set_float32_matmul_precision(value)


def newer(value):
    backends.cuda.matmul.fp32_precision = value
    backends.cudnn.conv.fp32_precision = value


def of_all(value):
    backends.fp32_precision = value


SETTINGS = [(older, "high"), (older, "medium"), (older, "highest"), (newer, "tf32"), (newer, "ieee")]


@pytest.mark.parametrize(("turn", "value"), [*SETTINGS, (of_all, "tf32"), (of_all, "bf16")])
def test_whatever_was_turned_before_exact_is_exact_and_all_is_put_back(turn, value):
    turn(value)
    before = state()
    with exact_arithmetic():
        new, old = state()
        assert set(new) == {"ieee"} and old == ["highest", False]
        with tf32():
            assert [one.fp32_precision for one in ON_GPUS] == ["tf32"] * 3
            assert {one.fp32_precision for one in ON_CPUS} == {"ieee"}
            # whoever compiles reads the older switches, and torch refuses where they disagree with the newer
            assert state()[1] == ["high", True]
        assert state() == (new, old)
    assert state()[0] == before[0]
    if "torch does not say" not in before[1]:
        assert state()[1] == before[1]


def test_an_error_inside_puts_all_back_too():
    before = state()
    with pytest.raises(ZeroDivisionError), tf32():
        1 / 0  # noqa: B018
    assert state() == before


def test_a_module_that_asked_for_quick_products_does_not_change_what_is_exact():
    a = torch.randn(64, 64)
    with exact_arithmetic():
        plain = a @ a
    torch.set_float32_matmul_precision("medium")
    with exact_arithmetic():
        assert torch.equal(a @ a, plain)


# ---------------------------------------------------------------------------------------------------------------------
# who sees it

SEEN = []


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        SEEN.append(("backward", backends.cuda.matmul.fp32_precision))
        return gradient


class Noting(Hyperplane):
    """Notes how a GPU would multiply in each of its passes, and cannot be traced."""

    def forward(self, x):
        if x.mean() > -1:
            kind = "forward" if x.requires_grad else "judging"
            SEEN.append((kind, backends.cuda.matmul.fp32_precision))
        return super().forward(_Noted.apply(x))


EVERY_ATTACK = [
    {"attack": "fgsm"},
    {"attack": "pgd", "steps": 3, "step_size": "eps/4"},
    {"attack": "autoattack", "settings": {"attacks": ["apgd-ce"], "steps": 3}},
]


def seen(precision, asked):
    evaluator = Evaluator(
        Noting(), classes=10, split=dataset().test, seed=0, success="any", precision=precision
    )
    SEEN.clear()
    columns = Protocol.model_validate({"name": "t", "success": "any", "column": asked}).columns(0.02)
    before = state()
    evaluator.run(plan(columns), np.arange(8))
    evaluator.unchanged()
    assert state() == before
    return set(SEEN)


@pytest.mark.parametrize("family", range(3))
def test_judging_is_exact_whatever_gradients_are_taken_in(family):
    asked = [EVERY_ATTACK[family]]
    found = seen("tf32", asked)
    quick = {how for kind, how in found if kind != "judging"}
    # the authors' code also asks the copy without wanting a gradient
    assert {how for kind, how in found if kind == "judging"} == (
        {"ieee", "tf32"} if family == 2 else {"ieee"}
    )
    # one gradient of hundreds, from the model itself
    assert quick == ({"ieee"} if family == 0 else {"tf32"})
    assert {how for _, how in seen("fp32", asked)} == {"ieee"}


def test_the_judge_is_exact_even_where_tf32_is_on():
    x, _ = dataset().test.batch(slice(0, 8))
    SEEN.clear()
    with tf32():
        Judge(Noting().eval(), 10, Cost())(x, x, None)
    assert set(SEEN) == {("judging", "ieee")}


def test_on_a_cpu_tf32_finds_what_float32_finds():
    outcomes = []
    for precision in ("fp32", "tf32"):
        evaluator = Evaluator(
            Hyperplane(), classes=10, split=dataset().test, seed=0, success="last", precision=precision
        )
        asked = Protocol.model_validate({"name": "t", "column": EVERY_ATTACK[:2]}).columns(0.02)
        outcomes.append(evaluator.run(plan(asked), np.arange(24)).outcomes["pgd-3"])
        assert evaluator.about.endswith(", tf32") is (precision == "tf32")
    assert torch.equal(outcomes[0].robust, outcomes[1].robust)
    assert torch.equal(outcomes[0].prediction, outcomes[1].prediction)


# ---------------------------------------------------------------------------------------------------------------------
# who may ask


class Gpu:
    type, index = "cuda", 0

    def __str__(self):
        return "cuda:0"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_tf32_is_refused_where_nothing_multiplies_in_it(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arithmetic.multiplies_in_tf32(Gpu()) is (capability >= (8, 0))
    assert not arithmetic.multiplies_in_tf32(torch.device("cpu"))
    for device, there in ((Gpu(), capability >= (8, 0)), (torch.device("cpu"), False)):
        if there:
            session._refuse_precision("tf32", device)
        else:
            with pytest.raises(UsageError, match="from Ampere on .* none of them; choose fp32 or bf16"):
                session._refuse_precision("tf32", device)
        session._refuse_precision("bf16", device)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_gpu_before_ampere_emulates_bf16(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arithmetic.emulates_bf16(Gpu()) is (capability < (8, 0))


def test_a_processor_emulates_bf16_unless_onednn_multiplies_in_it(monkeypatch):
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=supported: there)
        assert arithmetic.emulates_bf16(torch.device("cpu")) is not supported
        assert not arithmetic.emulates_bf16(torch.device("meta"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("emulated", [False, True])
def test_emulated_bf16_is_told_and_not_refused(precision, emulated, monkeypatch):
    monkeypatch.setattr(session, "emulates_bf16", lambda device: emulated)
    said = []
    session.prepare("dwf", "digits", "quick", device="cpu", precision=precision, say=said.append)
    told = [line for line in said if "--precision fp32 is quicker" in line]
    assert len(told) == (emulated and precision == "bf16")
