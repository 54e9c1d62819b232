"""Optimisers: how gradients change parameters; in place, on flat buffers.

Knows NumPy vectors alone. Leaves what they mean to the model. The formulas are PyTorch's
(torch.optim.SGD and Adam, torch.nn.utils.clip_grad_norm_): a twin there takes the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Buffers = Sequence[tuple[np.ndarray, np.ndarray]]  # (parameters [n], gradients [n]), one or more


class SGD:
    """Gradient descent: v = momentum·v + g, then p -= lr·v.

    >>> p, g = np.array([1.0]), np.array([0.5])
    >>> SGD([(p, g)], lr=0.1).step()
    >>> p
    array([0.95])
    """

    def __init__(self, buffers: Buffers, lr: float, momentum: float = 0.0) -> None:
        self.lr = lr
        self.momentum = momentum
        self._buffers = list(buffers)
        self._velocity = [np.zeros_like(p) for p, _ in self._buffers]
        self._scratch = [np.empty_like(p) for p, _ in self._buffers]

    def step(self) -> None:
        """Changes all parameters once."""
        for (p, g), v, s in zip(self._buffers, self._velocity, self._scratch, strict=True):
            v *= self.momentum
            v += g
            np.multiply(v, self.lr, out=s)
            p -= s

    def state(self) -> dict[str, np.ndarray]:
        """The arrays that the next step depends on, by name; views, not copies."""
        return {f"velocity.{k}": v for k, v in enumerate(self._velocity)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; raises ValueError if names or shapes differ."""
        _copy_into(self.state(), state)


class Adam:
    """Adam: m and v are running means of g and g²; p -= lr·m̂ / (√v̂ + eps), m̂ and v̂ unbiased.

    >>> p, g = np.array([1.0]), np.array([0.5])
    >>> Adam([(p, g)], lr=0.1).step()
    >>> p.round(6)
    array([0.9])
    """

    def __init__(
        self,
        buffers: Buffers,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self._buffers = list(buffers)
        self._steps = np.zeros(1)  # an array, so that `state` can give a view of it
        self._m = [np.zeros_like(p) for p, _ in self._buffers]
        self._v = [np.zeros_like(p) for p, _ in self._buffers]
        self._scratch = [np.empty_like(p) for p, _ in self._buffers]

    def step(self) -> None:
        """Changes all parameters once."""
        self._steps += 1
        beta1, beta2 = self.betas
        size = self.lr / (1 - beta1 ** self._steps[0])
        scale = 1 / math.sqrt(1 - beta2 ** self._steps[0])
        for (p, g), m, v, s in zip(self._buffers, self._m, self._v, self._scratch, strict=True):
            m *= beta1
            np.multiply(g, 1 - beta1, out=s)
            m += s
            v *= beta2
            np.multiply(g, g, out=s)
            s *= 1 - beta2
            v += s
            np.sqrt(v, out=s)
            s *= scale
            s += self.eps
            np.divide(m, s, out=s)
            s *= size
            p -= s

    def state(self) -> dict[str, np.ndarray]:
        """The arrays that the next step depends on, by name; views, not copies."""
        first = {f"m.{k}": m for k, m in enumerate(self._m)}
        second = {f"v.{k}": v for k, v in enumerate(self._v)}
        return {"steps": self._steps} | first | second

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Takes over what `state` gave; raises ValueError if names or shapes differ."""
        _copy_into(self.state(), state)


OPTIMIZERS = {"sgd": SGD, "adam": Adam}


def _copy_into(mine: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    if mine.keys() != given.keys():
        raise ValueError(f"state must have {sorted(mine)}, got {sorted(given)}")
    for name, array in mine.items():
        if given[name].shape != array.shape or given[name].dtype != array.dtype:
            raise ValueError(
                f"state[{name!r}] must be {array.dtype} {list(array.shape)}, "
                f"got {given[name].dtype} {list(given[name].shape)}"
            )
    for name, array in mine.items():
        array[...] = given[name]


def clip_gradients(gradients: Sequence[np.ndarray], max_norm: float) -> float:
    """Scales all gradients to a common L2 norm of at most `max_norm`; returns the norm before.

    As in torch.nn.utils.clip_grad_norm_, the scale is max_norm / (norm + 1e-6) if that is below 1.

    >>> g = np.array([3.0, 4.0])
    >>> clip_gradients([g], 1.0), g.round(4)
    (5.0, array([0.6, 0.8]))
    """
    norm = math.sqrt(sum(float(np.dot(g, g)) for g in gradients))
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        for g in gradients:
            g *= scale
    return norm


def warm_up_and_cosine(step: int, steps: int, warm_up: int) -> float:
    """The share of the peak learning rate at step 0 <= step < steps.

    It rises in a straight line over the first `warm_up` steps, and falls along a half cosine,
    reaching zero after the last step.

    >>> [round(warm_up_and_cosine(k, 100, 4), 2) for k in (0, 1, 3, 50, 99)]
    [0.25, 0.5, 1.0, 0.5, 0.0]
    """
    rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
