"""What an installed wheel must do, run from outside the tree in an environment with NumPy alone.

Knows the public API and the reference. Leaves everything exact to tests/.
"""

import importlib.metadata
import sys
from pathlib import Path

import numpy as np

import rnnfast
import rnnfast.bench
from rnnfast import _kernels, reference

assert Path(rnnfast.__file__).is_relative_to(sys.prefix), rnnfast.__file__
assert Path(rnnfast.bench.__file__).is_relative_to(sys.prefix), rnnfast.bench.__file__
assert Path(_kernels.__file__).name == "_kernels.abi3.so", _kernels.__file__
assert importlib.metadata.version("rnnfast") == rnnfast.__version__
assert not {"rich", "torch", "matplotlib"} & set(sys.modules), "an extra was imported"

rng = np.random.default_rng(0)
x = rng.standard_normal((7, 3, 5), dtype=np.float32)
dy = rng.standard_normal((7, 3, 11), dtype=np.float32)
for cell, layer in {
    "rnn_tanh": rnnfast.RNN(5, 11, seed=1),
    "lstm": rnnfast.LSTM(5, 11, seed=1),
    "gru": rnnfast.GRU(5, 11, seed=1),
}.items():
    y, _, tape = layer.forward_train(x)
    dx, _ = layer.backward(tape, dy)
    weights = tuple(layer.params.values())
    y_true, _, tape_true = reference.forward(cell, x, None, weights)
    dx_true = reference.backward(cell, x, tape_true, weights, dy, None)["x"]
    for name, got, want in ("y", y, y_true), ("dx", dx, dx_true):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-5, f"{cell}: {name} is off by {error:.1e}"

print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}, isa {rnnfast.isa()}: ok")
