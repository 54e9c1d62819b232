"""Layers: what stands before and after a recurrent layer, and the loss; forward and backward.

Knows NumPy arrays alone. Leaves the recurrent layer to `rnnfast.modules`, and putting all together
to `language_model`. A layer holds views of its parameters and gradients and owns neither;
`backward` adds to the gradients. V tokens, E embedding size, H hidden size, N = T·B rows.
"""

from __future__ import annotations

import math

import numpy as np

IGNORED = -1  # a target that counts neither in the loss nor in the gradient


class Embedding:
    """A table with a row of E numbers for each of V tokens.

    >>> layer = Embedding(np.eye(3), np.zeros((3, 3)))
    >>> layer.forward(np.array([[2]]))
    array([[[0., 0., 1.]]])
    """

    def __init__(self, weight: np.ndarray, grad: np.ndarray) -> None:
        self.weight = weight  # [V, E]
        self.grad = grad  # [V, E]

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """The rows of the tokens: [T, B] to [T, B, E]."""
        return self.weight.take(tokens, axis=0)

    def backward(self, tokens: np.ndarray, dx: np.ndarray) -> None:
        """Adds each row of dx [T, B, E] to the gradient of its token's row.

        Rows are sorted by token and summed in one pass per token that occurs: exact in its order,
        so that the same batch gives the same bits.
        """
        tokens = tokens.ravel()
        order = np.argsort(tokens, kind="stable")
        found, starts = np.unique(tokens[order], return_index=True)
        rows = dx.reshape(len(tokens), -1).take(order, axis=0)
        self.grad[found] += np.add.reduceat(rows, starts, axis=0)


class OneHot:
    """Tokens as vectors with a single one: an embedding that has nothing to learn.

    >>> OneHot(3).forward(np.array([[2]]))
    array([[[0., 0., 1.]]], dtype=float32)
    """

    def __init__(self, size: int, dtype: type = np.float32) -> None:
        self.size = size
        self.dtype = np.dtype(dtype)

    def forward(self, tokens: np.ndarray) -> np.ndarray:
        """[T, B] to [T, B, V]."""
        x = np.zeros((*tokens.shape, self.size), self.dtype)
        np.put_along_axis(x, tokens[..., None], 1, axis=-1)
        return x


class Linear:
    """y = x Wᵀ + b, on all steps and rows at once.

    >>> layer = Linear(np.array([[1.0, 2.0]]), np.array([0.5]), np.zeros((1, 2)), np.zeros(1))
    >>> layer.forward(np.array([[3.0, 4.0]]))
    array([[11.5]])
    """

    def __init__(
        self, weight: np.ndarray, bias: np.ndarray, dweight: np.ndarray, dbias: np.ndarray
    ) -> None:
        self.weight, self.dweight = weight, dweight  # [V, H]
        self.bias, self.dbias = bias, dbias  # [V]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """[N, H] to [N, V]."""
        y = x @ self.weight.T
        y += self.bias
        return y

    def backward(self, x: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """From x [N, H] and dy [N, V]: adds to dW = dyᵀ x and db = Σ dy, returns dx = dy W."""
        self.dweight += dy.T @ x
        self.dbias += dy.sum(axis=0)
        return dy @ self.weight


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Mean of -log softmax(logits)[target] over all rows whose target is not `IGNORED`.

    logits [N, V] become its gradient in place, (softmax - one-hot) / count: the only copy of what
    is the largest array of a language model. targets [N]. Returns the mean in nats (nan if nothing
    counts) and the count.

    >>> logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> loss, count = cross_entropy(logits, np.array([1, IGNORED]))
    >>> round(loss, 6) == round(-math.log(0.75), 6), count, logits.round(6).tolist()
    (True, 1, [[0.25, -0.25], [0.0, 0.0]])
    """
    losses = _softmax_and_losses(logits, targets)
    counted = targets != IGNORED
    count = int(counted.sum())
    rows = np.arange(len(targets))
    logits[rows, np.where(counted, targets, 0)] -= 1
    if count < len(targets):
        logits[~counted] = 0
    logits *= 1 / max(count, 1)
    return (float(losses.sum()) / count if count else math.nan), count


def total_loss(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Sum of -log softmax(logits)[target] and the count, as `cross_entropy`; overwrites logits.

    >>> total_loss(np.zeros((2, 4)), np.array([0, 3]))[0] == 2 * math.log(4)
    True
    """
    losses = _softmax_and_losses(logits, targets)
    return float(losses.sum()), int((targets != IGNORED).sum())


def _softmax_and_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Turns logits [N, V] into their softmax, and returns the losses [N] in float64.

    The largest logit is taken off first, so that no exp overflows; the loss is made from the logits
    themselves, so that it stays exact where the softmax rounds to 0.
    """
    counted = targets != IGNORED
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(targets)), np.where(counted, targets, 0)].astype(np.float64)
    np.exp(logits, out=logits)
    sums = logits.sum(axis=1, keepdims=True)
    logits /= sums
    return np.where(counted, np.log(sums[:, 0].astype(np.float64)) - chosen, 0.0)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats: among how many equally likely tokens the model hesitates.

    >>> round(perplexity(math.log(10)), 6)
    10.0
    """
    return math.inf if loss > 700 else math.exp(loss)
