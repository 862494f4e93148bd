"""FGSM and PGD as the users of other libraries call them, one class a library.

A peer gets the plain model: contiguous, float32, in eval mode, its parameters as training leaves them. What a library
says of its own success is not used; but where its call returns that (`told`), its user need not ask the model again.

| peer         | restarts                                   | decides                                |
|--------------|--------------------------------------------|----------------------------------------|
| torchattacks | `MultiAttack`, each on what still stands   | the final iterate                      |
| foolbox      | `.repeat(n)`, each on all images           | the final iterate                      |
| art          | `num_random_init`, each on all images      | the final iterate                      |
| adv-lib      | `restarts`, each on what still stands      | any iterate but the final one          |
| advertorch   | none: a loop of its user's, on all images  | the final iterate                      |

adv-lib has no FGSM: three lines of its user's stand for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Peer:
    """A library's attacks on one model: images `(b, c, h, w)` and labels `(b,)` to adversarial images."""

    name: ClassVar[str]
    #: what is imported, and what is installed for it
    module: ClassVar[str]
    package: ClassVar[str]
    #: which iterate decides
    success: ClassVar[str] = "last"
    #: whether the call returns which images are broken
    told: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, shape: Sequence[int], classes: int, batch_size: int) -> None:
        self.model, self.shape, self.classes, self.batch_size = model, tuple(shape), classes, batch_size
        self.device = next(model.parameters()).device

    def fgsm(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        raise NotImplementedError

    def pgd(
        self, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int, restarts: int = 1
    ) -> Tensor:
        raise NotImplementedError

    def eot_pgd(self, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int) -> Tensor:
        """PGD on gradients averaged over one pass; without an attack of that name it is PGD."""
        return self.pgd(x, y, eps, step_size, steps)


class Torchattacks(Peer):
    name, module, package = "torchattacks", "torchattacks", "torchattacks"

    def fgsm(self, x, y, eps):
        import torchattacks

        return torchattacks.FGSM(self.model, eps=eps)(x, y)

    def pgd(self, x, y, eps, step_size, steps, restarts=1):
        import torchattacks

        runs = [torchattacks.PGD(self.model, eps=eps, alpha=step_size, steps=steps) for _ in range(restarts)]
        attack = runs[0] if restarts == 1 else torchattacks.MultiAttack(runs)
        return attack(x, y)

    def eot_pgd(self, x, y, eps, step_size, steps):
        import torchattacks

        return torchattacks.EOTPGD(self.model, eps=eps, alpha=step_size, steps=steps, eot_iter=1)(x, y)


class Foolbox(Peer):
    name, module, package = "foolbox", "foolbox", "foolbox"
    told = True

    def __init__(self, model, **about):
        super().__init__(model, **about)
        import foolbox

        self.bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=self.device)

    def fgsm(self, x, y, eps):
        import foolbox

        _, x_adv, _ = foolbox.attacks.LinfFastGradientAttack()(self.bounded, x, y, epsilons=eps)
        return x_adv

    def pgd(self, x, y, eps, step_size, steps, restarts=1):
        import foolbox

        attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
        _, x_adv, _ = attack.repeat(restarts)(self.bounded, x, y, epsilons=eps)
        return x_adv


class Art(Peer):
    name, module, package = "art", "art.attacks.evasion", "adversarial-robustness-toolbox"

    def __init__(self, model, **about):
        super().__init__(model, **about)
        from art.estimators.classification import PyTorchClassifier

        self.classifier = PyTorchClassifier(
            model,
            loss=nn.CrossEntropyLoss(),
            input_shape=self.shape,
            nb_classes=self.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if self.device.type == "cuda" else "cpu",
        )

    def fgsm(self, x, y, eps):
        from art.attacks.evasion import FastGradientMethod

        attack = FastGradientMethod(self.classifier, eps=eps, batch_size=self.batch_size)
        return self._generate(attack, x, y)

    def pgd(self, x, y, eps, step_size, steps, restarts=1):
        from art.attacks.evasion import ProjectedGradientDescent

        attack = ProjectedGradientDescent(
            self.classifier,
            eps=eps,
            eps_step=step_size,
            max_iter=steps,
            num_random_init=restarts,
            batch_size=self.batch_size,
            verbose=False,
        )
        return self._generate(attack, x, y)

    def _generate(self, attack, x, y):
        x_adv = attack.generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(x_adv).to(self.device)


class AdvLib(Peer):
    name, module, package = "adv-lib", "adv_lib.attacks", "adv-lib"
    success = "any"

    def fgsm(self, x, y, eps):
        point = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(point), y, reduction="sum"), point)
        return (x + eps * gradient.sign()).clamp(0, 1)

    def pgd(self, x, y, eps, step_size, steps, restarts=1):
        from adv_lib.attacks import pgd_linf

        options = {"steps": steps, "restarts": restarts, "absolute_step_size": step_size}
        return pgd_linf(self.model, x, y, eps, **options)


class Advertorch(Peer):
    name, module, package = "advertorch", "advertorch.attacks", "advertorch"

    def fgsm(self, x, y, eps):
        from advertorch.attacks import GradientSignAttack

        return GradientSignAttack(self.model, eps=eps).perturb(x, y)

    def pgd(self, x, y, eps, step_size, steps, restarts=1):
        from advertorch.attacks import LinfPGDAttack

        attack = LinfPGDAttack(self.model, eps=eps, nb_iter=steps, eps_iter=step_size)
        x_adv = attack.perturb(x, y)
        for _ in range(restarts - 1):
            with torch.no_grad():
                standing = self.model(x_adv).argmax(1) == y
            x_adv = torch.where(standing[:, None, None, None], attack.perturb(x, y), x_adv)
        return x_adv


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Torchattacks, Foolbox, Art, AdvLib, Advertorch)}


def installed(names: Sequence[str]) -> tuple[dict[str, type[Peer]], dict[str, str]]:
    """The peers of these names that can be imported, and why the others cannot."""
    found, missing = {}, {}
    for name in names:
        try:
            importlib.import_module(PEERS[name].module)
        except Exception as error:
            # another's package may fail to import in any way; a benchmark of the others goes on
            missing[name] = f"{type(error).__name__}: {error}".split(" (")[0].splitlines()[0]
        else:
            found[name] = PEERS[name]
    return found, missing


def version(peer: type[Peer]) -> str:
    return metadata.version(peer.package)
