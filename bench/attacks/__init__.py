"""Attacks: one file each, pure functions of a model, images and labels.

    from bench.attacks import pgd
    from bench.threat import Linf
    from bench.rng import Rng

    x_adv = pgd(model, x, y, Linf(8 / 255), rng=Rng(0), steps=10, step_size=2 / 255)

| function     | what it does                                              | draws | answers                     |
|--------------|-----------------------------------------------------------|-------|-----------------------------|
| `fgsm`       | one step of length eps along the gradient's sign          | no    | one radius; `sweep` many    |
| `pgd`        | many projected steps from a random start                  | start | one; `trajectory` many steps|
| `autoattack` | APGD-CE, APGD-T, FAB-T, Square, by their authors' code    | yes   | one ensemble                |
| `from_torchattacks` | any attack of the torchattacks library             | yes   | whatever that attack does   |

Every attack ascends its loss, summed over the batch; takes gradients with respect to the images alone; draws from the
`rng` it is given; leaves the model as it found it; and returns images without saying whether they succeed.
"""

from bench.attacks.autoattack import autoattack
from bench.attacks.fgsm import fgsm
from bench.attacks.pgd import pgd
from bench.attacks.torchattacks import from_torchattacks

__all__ = ["autoattack", "fgsm", "from_torchattacks", "pgd"]
