"""What a call costs beside its arithmetic: import, size on disk, a small call, a step of a stream.

Knows the public API, and where PyTorch is installed, what it takes to call the drop-in, and what
autograd takes of that. Results are checked against `rnnfast.reference` before they are timed.
Leaves large shapes and other libraries to `layers`. Run as `python -m rnnfast.bench.overhead`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rnnfast

from .. import functional, reference
from .libraries import Results
from .measure import check, expected, machine
from .report import Table, show, write
from .shapes import Shape, problem, shape_of

IMPORTS = 20  # processes
BLOCK = 200  # calls that are timed as one: the clock itself takes some 50 ns
BLOCKS = 200
SMALL = "lstm-i8-h16-b1-t1"
STREAMS = ("lstm-i8-h16-b1-t100", "lstm-i64-h64-b1-t100")


def import_seconds(times: int = IMPORTS) -> dict[str, list[float]]:
    """Seconds that `import numpy`, and `import rnnfast` after it, take in each of fresh processes.

    Of compiled sources, as an installer leaves them: a process before these writes them to a folder
    that goes again.

    >>> sorted(import_seconds(1))
    ['numpy', 'rnnfast']
    """
    names = ("numpy", "rnnfast")
    found: dict[str, list[float]] = {name: [] for name in names}
    timed = "began = clock(); import {}; print(clock() - began)"
    code = "\n".join(["from time import perf_counter as clock", *map(timed.format, names)])
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for i in range(1 + times):
            command = [sys.executable, "-P", "-c", code]  # not what lies in this folder
            run = subprocess.run(
                command, env=environment, check=True, capture_output=True, encoding="utf-8"
            )
            if i:
                for name, seconds in zip(names, run.stdout.split(), strict=True):
                    found[name].append(float(seconds))
    return found


def installed_bytes() -> int:
    """Bytes of the files of the installed package, caches of compiled sources aside."""
    folder = Path(rnnfast.__file__).parent
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.suffix != ".pyc")


def _module(shape: Shape) -> tuple[rnnfast.LSTM, np.ndarray, tuple]:
    given = problem(shape, 0)
    module = rnnfast.LSTM(shape.I, shape.H)
    module.load_state_dict(given.weights)
    return module, given.x, given.state


def calls() -> dict[str, Callable[[], Any]]:
    """The calls to be timed, by what they are; each was checked."""
    shape = shape_of(SMALL)
    module, x, state = _module(shape)
    frozen, _, _ = _module(shape)
    frozen.freeze()
    for one in (module, frozen):
        y, (h_n, c_n) = one(x, state)
        check({"y": y, "h_n": h_n, "c_n": c_n}, expected(shape, "inference"), shape.dtype)
    found = {
        f"module(x), {SMALL}": lambda: module(x),
        f"module(x, state), {SMALL}": lambda: module(x, state),
        f"frozen module(x), {SMALL}": lambda: frozen(x),
    }
    for name in STREAMS:
        found.update(_stream_calls(shape_of(name)))
    if importlib.util.find_spec("torch"):
        found.update(_torch_calls(shape))
    return found


def _stream_calls(shape: Shape) -> dict[str, Callable[[], Any]]:
    module, x, state = _module(shape)
    want = expected(shape, "inference")
    found = {}
    for with_out in (False, True):
        stream = module.stream()
        stream.state = state
        out = np.empty((1, shape.H), np.float32) if with_out else None
        y = np.stack([stream.step(x_t, out=out).copy() for x_t in x])
        h_n, c_n = stream.state
        got: Results = {"y": y, "h_n": h_n, "c_n": c_n}
        check(got, want, shape.dtype)
        found[f"stream.step(x{', out' * with_out}), i{shape.I} h{shape.H}"] = _step(
            stream.step, x[0], out
        )
    return found


def _step(step: Callable, x: np.ndarray, out: np.ndarray | None) -> Callable[[], Any]:
    return (lambda: step(x)) if out is None else (lambda: step(x, out))


def _torch_calls(shape: Shape) -> dict[str, Callable[[], Any]]:
    """The functional call, the drop-in's, and what PyTorch alone takes of the latter.

    Each as a forward pass that can be followed by a backward pass, and with that, to the weights.
    """
    import torch

    import rnnfast.torch

    given = problem(shape, 0)
    weights = tuple(given.weights.values())
    layer = rnnfast.torch.LSTM(shape.I, shape.H)
    layer.load_state_dict({name: torch.from_numpy(w) for name, w in given.weights.items()})
    x, dy = torch.from_numpy(given.x), torch.from_numpy(given.dy)
    need = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def forward() -> tuple:
        return functional.lstm_forward(given.x, None, weights, train=True)

    def forward_backward() -> tuple:
        y, _, tape = forward()
        grads = functional.lstm_backward(tape, weights, given.dy, None, need=need)
        return y, grads.weights

    theirs = torch.nn.LSTM(shape.I, shape.H)
    theirs.load_state_dict(layer.state_dict())
    own = {module: tuple(module.parameters()) for module in (layer, theirs)}

    def with_gradients(module: torch.nn.Module) -> tuple:
        y, _ = module(x)
        return y, torch.autograd.grad(y, own[module], dy)

    class Nothing(torch.autograd.Function):
        """With as many inputs and outputs as the drop-in's; it saves the weights alone."""

        @staticmethod
        def forward(ctx, call, x, batch_sizes, h_0, c_0, seed, *weights):
            ctx.save_for_backward(*weights)
            ctx.set_materialize_grads(False)
            return torch.empty(dy.shape), torch.empty(0), torch.empty(0)

        @staticmethod
        def backward(ctx, dy, dh_n, dc_n):
            return None, None, None, None, None, None, *ctx.saved_tensors

    def nothing() -> tuple:
        return Nothing.apply(None, x, None, None, None, None, *own[layer])

    def nothing_backward() -> tuple:
        return torch.autograd.grad(nothing()[0], own[layer], dy)

    exact = {name: array.astype(np.float64) for name, array in given.weights.items()}
    y, _, tapes = reference.stack_forward(shape.cell, given.x, None, exact)
    grads = reference.stack_backward(shape.cell, tapes, exact, given.dy, None)
    want = {"y": y, **{f"d{name}": grads[name] for name in exact}}
    for call in (forward_backward, *(partial(with_gradients, module) for module in own)):
        y, grads = call()
        grads = {f"d{name}": np.asarray(g) for name, g in zip(exact, grads, strict=True)}
        check({"y": y if type(y) is np.ndarray else y.detach().numpy(), **grads}, want, shape.dtype)
    name = f"{{}}, {SMALL}".format
    return {
        name("functional.lstm_forward(train=True)"): forward,
        name("the same and lstm_backward"): forward_backward,
        name("rnnfast.torch.LSTM(x)"): lambda: layer(x),
        name("the same and autograd.grad"): lambda: with_gradients(layer),
        name("torch.nn.LSTM(x)"): lambda: theirs(x),
        name("torch.nn.LSTM(x) and autograd.grad"): lambda: with_gradients(theirs),
        name("an autograd.Function of nothing"): nothing,
        name("an autograd.Function of nothing and autograd.grad"): nothing_backward,
    }


def call_seconds(
    calls: dict[str, Callable[[], Any]], blocks: int = BLOCKS, block: int = BLOCK
) -> dict[str, list[float]]:
    """Seconds of one call, the mean of each block of calls; the blocks in random order.

    >>> len(call_seconds({"nothing": lambda: None}, blocks=3)["nothing"])
    3
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, turns = random.Random(0), list(calls)
    for _ in range(blocks):
        order.shuffle(turns)
        for name in turns:
            call = calls[name]
            began = time.perf_counter()
            for _ in range(block):
                call()
            seconds[name].append((time.perf_counter() - began) / block)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(prog="python -m rnnfast.bench.overhead", description=__doc__)
    parser.add_argument("--wheel", metavar="FILE", help="whose size to tell")
    parser.add_argument("--imports", type=int, default=IMPORTS, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="all figures, and the times they come from")
    args = parser.parse_args(argv)

    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print()
    sizes = {"installed package": installed_bytes()}
    if args.wheel:
        sizes["wheel"] = Path(args.wheel).stat().st_size
    imports = import_seconds(args.imports)
    seconds = call_seconds(calls(), args.blocks)

    table = [[name, f"{1e-6 * size:.2f} MB", ""] for name, size in sizes.items()]
    for name, what in (("numpy", "import numpy"), ("rnnfast", "import rnnfast beyond numpy")):
        median, least = 1e3 * statistics.median(imports[name]), 1e3 * min(imports[name])
        table.append([what, f"{median:.1f} ms", f"{least:.1f} ms"])
    for name, found in seconds.items():
        median, least = 1e6 * statistics.median(found), 1e6 * min(found)
        table.append([name, f"{median:.2f} us", f"{least:.2f} us"])
    show([Table("", ("what", "median", "min"), table)])
    if args.json:
        kept = {"machine": about, "bytes": sizes, "imports": imports, "calls": seconds}
        write(args.json, json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
