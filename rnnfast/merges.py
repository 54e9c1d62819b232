"""How the two directions of a layer become its y: side by side, or number by number.

Knows arrays [..., 2*N], which hold both directions side by side as the kernels write them.

N numbers of h.
"""

from __future__ import annotations

import numpy as np

CONCAT = "concat"
MERGES = (CONCAT, "sum", "mean", "mul")


def merge(kind: str, both: np.ndarray, y: np.ndarray) -> None:
    """y [..., N] from both directions' [..., 2*N], of any kind but concat.

    >>> y = np.empty((1, 1, 1))
    >>> merge("mean", np.array([[[1.0, 4.0]]]), y)
    >>> y.tolist()
    [[[2.5]]]
    """
    ahead, back = _halves(both)
    with np.errstate(all="ignore"):  # NaN and inf are results
        if kind == "mul":
            np.multiply(ahead, back, out=y)
            return
        np.add(ahead, back, out=y)
        if kind == "mean":
            y *= 0.5


def merge_backward(kind: str, dy: np.ndarray, both: np.ndarray | None, out: np.ndarray) -> None:
    """The gradient by both directions' y [..., 2*N] from that by the merged one, dy [..., N].

    Of "mul" alone it depends on what both were.

    >>> out = np.empty((1, 1, 2))
    >>> merge_backward("mul", np.array([[[10.0]]]), np.array([[[1.0, 4.0]]]), out)
    >>> out.tolist()
    [[[40.0, 10.0]]]
    """
    d_ahead, d_back = _halves(out)
    with np.errstate(all="ignore"):
        if kind == "mul":
            assert both is not None
            ahead, back = _halves(both)
            np.multiply(dy, back, out=d_ahead)
            np.multiply(dy, ahead, out=d_back)
            return
        if kind == "mean":
            np.multiply(dy, 0.5, out=d_ahead)
            d_back[...] = d_ahead
            return
        d_ahead[...] = d_back[...] = dy


def _halves(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    N = both.shape[-1] // 2
    return both[..., :N], both[..., N:]
