"""A forecast of many steps, each made of the one before, beside PyTorch's loops that do the same.

Knows the public API and, where it is installed, PyTorch: nn.LSTM and nn.LSTMCell, each with a
linear head, under inference_mode. Results are checked against `rnnfast.reference` first, before
anything is timed. One process, one thread by default: PyTorch does not share out one row. Run as
`python -m rnnfast.bench.closed_loop`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import numpy as np

import rnnfast

from .. import reference
from .measure import machine
from .overhead import call_seconds
from .report import Table, show

I, H = 1, 256
HEAD = "weight", "bias"
BOUND = 1e-3  # of a value, after a thousand steps in float32, each on the ones before


def forecasts(steps: int) -> dict[str, Callable[[], np.ndarray]]:
    """Calls that give the values [steps, 1, I] from zero states, all of the same weights.

    >>> found = {name: call() for name, call in forecasts(3).items()}
    >>> found["rnnfast"].shape
    (3, 1, 1)
    """
    lstm = rnnfast.LSTM(I, H, seed=0)
    lstm.freeze()
    random = np.random.default_rng(0)
    head = random.standard_normal((I, H), dtype=np.float32) / 4, np.ones(I, np.float32)
    first = np.ones((1, I), np.float32)

    def ours() -> np.ndarray:
        return lstm.generate(first, steps, head)[0]

    calls = {"rnnfast": ours}
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(rnnfast.get_num_threads())
        layer, cell = torch.nn.LSTM(I, H), torch.nn.LSTMCell(I, H)
        linear = torch.nn.Linear(H, I)
        given = {name: torch.from_numpy(array.copy()) for name, array in lstm.params.items()}
        layer.load_state_dict(given)
        cell.load_state_dict({name.removesuffix("_l0"): one for name, one in given.items()})
        linear.load_state_dict({n: torch.from_numpy(a) for n, a in zip(HEAD, head, strict=True)})
        start = torch.from_numpy(first)

        @torch.inference_mode()
        def layers() -> np.ndarray:
            x, state, values = start[None], None, []
            for _ in range(steps):
                y, state = layer(x, state)
                x = linear(y)
                values.append(x)
            return torch.cat(values).numpy()

        @torch.inference_mode()
        def cells() -> np.ndarray:
            x, state, values = start, None, []
            for _ in range(steps):
                state = cell(x, state)
                x = linear(state[0])
                values.append(x)
            return torch.stack(values).numpy()

        calls |= {"torch.nn.LSTM": layers, "torch.nn.LSTMCell": cells}
    exact = {name: array.astype(np.float64) for name, array in lstm.params.items()}
    double = tuple(array.astype(np.float64) for array in head)
    want, *_ = reference.closed_loop("lstm", first.astype(float), steps, None, exact, double)
    for name, call in calls.items():
        error = np.abs(call() - want).max() / np.abs(want).max()
        if not error <= BOUND:
            raise SystemExit(f"{name}: off by {error:.2g} of the largest value")
    return calls


def main(argv: list[str] | None = None) -> int:
    """Measures and prints one table."""
    parser = argparse.ArgumentParser(
        prog="python -m rnnfast.bench.closed_loop", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    args = parser.parse_args(argv)
    rnnfast.set_num_threads(args.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"LSTM I{I} H{H} B1, {args.steps} steps, isa {rnnfast.isa()}, threads {args.threads}\n")
    seconds = call_seconds(forecasts(args.steps), args.rounds, 1)
    lines = []
    for name, found in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(found, seconds["rnnfast"], strict=True))
        a_step = [1e6 * value / args.steps for value in (statistics.median(found), min(found))]
        lines.append([name, *(f"{value:.2f}" for value in a_step), f"{ratio:.2f}"])
    show([Table("", ("what", "us a step", "min", "times ours"), lines)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
