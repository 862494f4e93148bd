"""The shapes and units that everything else speaks of.

`Images`  float32 `(b, c, h, w)`, pixels in [0,1]
`Labels`  int64 `(b,)`
`Logits`  float32 `(b, k)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Images: TypeAlias = Tensor
Labels: TypeAlias = Tensor
Logits: TypeAlias = Tensor
Model: TypeAlias = Callable[[Images], Logits]
