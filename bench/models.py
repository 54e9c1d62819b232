"""Whole models around a shape's layer: their weights and data, and what a step of training gives.

Knows a shape, NumPy's random numbers and the reference. Leaves PyTorch, in which the models run, to
`libraries.pytorch`.

A model of text: embedding [V, I], the layer from zero states, a linear layer [V, D*H] to one score
for each character of the vocabulary; its loss is the mean cross-entropy over the valid steps. T
steps, B batch, D directions, as in `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import reference
from .shapes import VOCABULARY, Shape, layer_weights

LAYER = "layer."  # before the names of its parameters


@dataclass(frozen=True)
class Text:
    """What both sides are given for a model.

    - `tokens` [B, T] int64; 0 past a row's length
    - `targets` [B, T] int64; PADDING past a row's length
    - `lengths` [B], or None
    - `weights`: by the model's names: embedding.weight, layer.weight_ih_l0, linear.bias and so on
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray | None
    weights: dict[str, np.ndarray]


PADDING = -100  # what PyTorch's cross_entropy leaves out of its mean


def text(shape: Shape, seed: int) -> Text:
    """Random weights and data; every process that asks with the same seed gets the same bits.

    >>> from .shapes import shape_of
    >>> text(shape_of("lstm-i3-h5-b2-t7"), 0).weights["linear.weight"].shape
    (96, 5)
    """
    random = np.random.default_rng(seed)
    T, B, I, N = shape.T, shape.B, shape.I, shape.output * shape.directions
    tokens, targets = random.integers(0, VOCABULARY, (2, B, T))
    weights = {"embedding.weight": random.standard_normal((VOCABULARY, I)).astype(shape.dtype)}
    own = layer_weights(shape, random)
    weights |= {f"{LAYER}{name}": array for name, array in own.items()}
    for name, sizes in (("weight", (VOCABULARY, N)), ("bias", (VOCABULARY,))):
        weights[f"linear.{name}"] = (random.uniform(-1, 1, sizes) / np.sqrt(N)).astype(shape.dtype)
    lengths = shape.lengths
    if lengths is not None:
        past = np.arange(T) >= lengths[:, None]
        tokens[past], targets[past] = 0, PADDING
    return Text(tokens, targets, lengths, weights)


def expected(shape: Shape, mode: str, seed: int) -> dict[str, np.ndarray]:
    """By the reference in float64: y, the scores [T, B, V]; or the loss and all gradients of it.

    A gradient's name is d and the parameter's.

    >>> from .shapes import shape_of
    >>> sorted(expected(shape_of("rnn_tanh-i3-h5-b2-t7"), "step", 0))[:3]
    ['dembedding.weight', 'dlayer.bias_hh_l0', 'dlayer.bias_ih_l0']
    """
    given = text(shape, seed)
    weights = {name: array.astype(np.float64) for name, array in given.weights.items()}
    embedding, linear = weights["embedding.weight"], weights["linear.weight"]
    layer = {n.removeprefix(LAYER): w for n, w in weights.items() if n.startswith(LAYER)}
    tokens, targets = given.tokens.T, given.targets.T
    past = targets == PADDING
    x = embedding[tokens]
    x[past] = 0
    h, _, tapes = reference.stack_forward(shape.cell, x, None, layer, lengths=given.lengths)
    y = h @ linear.T + weights["linear.bias"]
    if mode == "predict":
        return {"y": y}

    p = np.exp(y - y.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    of_target = np.where(past, 0, targets)[:, :, None]
    valid = ~past / (~past).sum()  # each step's weight in the mean
    loss = -(valid * np.log(np.take_along_axis(p, of_target, 2)[:, :, 0])).sum()
    dy = p
    np.put_along_axis(dy, of_target, np.take_along_axis(p, of_target, 2) - 1, 2)
    dy *= valid[:, :, None]
    grads = reference.stack_backward(
        shape.cell, tapes, layer, dy @ linear, None, lengths=given.lengths
    )
    dembedding = np.zeros_like(embedding)
    np.add.at(dembedding, tokens, grads["x"])
    found = {"embedding.weight": dembedding}
    found |= {LAYER + name: grads[name] for name in layer}
    found["linear.weight"] = np.einsum("tbv,tbn->vn", dy, h, optimize=True)
    found["linear.bias"] = dy.sum((0, 1))
    return {"loss": np.array(loss), **{f"d{name}": grad for name, grad in found.items()}}
