"""The parity certificate: AutoAttack through our adapter, and as its authors run it, on the same network and images.

    python tests/parity.py            # write results/parity/autoattack.json
    python tests/parity.py --check    # do it again, and fail where the two part

A small network is trained against PGD on the digits, then attacked in both norms at a radius that leaves some of the
360 test images standing: by `AutoAttack(version="standard").run_standard_evaluation` as the package has it, and by
`bench.attacks.autoattack`. They draw different random numbers, so an image at the edge may fall to one alone; `ALLOWED`
says how many may.
"""

import dataclasses
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from bench.attacks import autoattack, pgd
from bench.attacks.autoattack import source
from bench.data import load
from bench.rng import Rng
from bench.threat import Linf, threat_model

CERTIFICATE = Path(__file__).resolve().parent.parent / "results" / "parity" / "autoattack.json"
EPS = {"Linf": 0.15, "L2": 0.6}
#: the largest difference in robust accuracy, and the largest share of images that only one of the two breaks
ALLOWED = {"points": 0.5, "disagreement": 0.01}


def trained() -> nn.Module:
    """A small network trained on the worst images that PGD-5 finds; the same at each call."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    x, y = load("digits").train.batch(slice(None))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for epoch in range(15):
        for step, rows in enumerate(torch.randperm(len(x)).split(100)):
            x_adv = pgd(net, x[rows], y[rows], Linf(0.1), rng=Rng(0, epoch, step), steps=5)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x_adv), y[rows]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def measured(norm: str, net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict:
    """What both leave standing in a norm."""
    eps = EPS[norm]

    def robust(attack) -> tuple[torch.Tensor, float]:
        started = time.perf_counter()
        with torch.no_grad():
            standing = net(attack()).argmax(1) == y
        return standing, round(time.perf_counter() - started, 1)

    def theirs() -> torch.Tensor:
        package = importlib.import_module(f"{source().name}.autoattack")
        own = {"verbose": False} if source().name == "autoattack" else {}
        ensemble = package.AutoAttack(
            net, norm=norm, eps=eps, version="standard", seed=0, device="cpu", **own
        )
        found = ensemble.run_standard_evaluation(x, y)
        return found[0] if isinstance(found, tuple) else found

    def ours() -> torch.Tensor:
        return autoattack(net, x, y, threat_model(norm, eps), rng=Rng(0, images=range(len(x))))

    (a, a_seconds), (b, b_seconds) = robust(theirs), robust(ours)
    return {
        "norm": norm,
        "eps": eps,
        "accuracy": {"theirs": _percent(a), "ours": _percent(b)},
        "points": round(abs(_percent(a) - _percent(b)), 4),
        "disagreement": round(float((a != b).double().mean()), 6),
        "seconds": {"theirs": a_seconds, "ours": b_seconds},
        "robust": {"theirs": _bits(a), "ours": _bits(b)},
    }


def certificate() -> dict:
    """The certificate, made now."""
    torch.set_num_threads(1)
    net, data = trained(), load("digits")
    x, y = data.test.batch(slice(None))
    weights = hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values()))
    with torch.no_grad():
        clean = net(x).argmax(1) == y
    return {
        "model": weights.hexdigest(),
        "data": data.test.hash,
        "images": len(x),
        "torch": torch.__version__,
        "source": dataclasses.asdict(source()),
        "clean": _percent(clean),
        "norms": [measured(norm, net, x, y) for norm in EPS],
    }


def _percent(outcomes: torch.Tensor) -> float:
    return round(100 * float(outcomes.double().mean()), 4)


def _bits(outcomes: torch.Tensor) -> str:
    return "".join("1" if outcome else "0" for outcome in outcomes.tolist())


def main() -> None:
    """Writes the certificate, or checks that it can be had again."""
    made = certificate()
    for found in made["norms"]:
        print(
            f"{found['norm']} {found['eps']}: clean {made['clean']:.2f} %, theirs {found['accuracy']['theirs']:.2f} % "
            f"({found['seconds']['theirs']} s), ours {found['accuracy']['ours']:.2f} % ({found['seconds']['ours']} s), "
            f"{100 * found['disagreement']:.2f} % of images disagree"
        )
        if not 20 <= found["accuracy"]["theirs"] <= 80:
            sys.exit(
                f"{found['norm']}: {found['accuracy']['theirs']} % robust says little; choose another radius"
            )
        for what, allowed in ALLOWED.items():
            if found[what] > allowed:
                sys.exit(f"{found['norm']}: {what} {found[what]:.4g}, allowed {allowed}")
    if "--check" not in sys.argv:
        CERTIFICATE.parent.mkdir(parents=True, exist_ok=True)
        CERTIFICATE.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
