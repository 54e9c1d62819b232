"""One library in a process of its own, which computes and times what `layers` asks for.

Knows the libraries' public interfaces and the shapes. Judges nothing: results go to a file, times
to the caller. Run by `layers` as `python -m rnnfast.bench.worker LIBRARY THREADS`.

One JSON object per line. The first answer says what this is, or why it cannot be: {"about": {name:
version}} or {"missing": reason}. Then, for each request, one answer; {"unsupported": reason} if the
library has no such layer, {"error": reason} if it failed:

- {"do": "prepare", "shape": name, "mode": mode, "seed": n, "results": path} makes one call, writes
  its arrays to path (.npz) -> {"operations": n or null}: what one call comes to, where the shape
  does not say it
- {"do": "time", "seconds": s, "most": n} makes one call to wake up, then calls until either bound
  -> {"seconds": [...]}, one per call

The arrays are y, h_n and c_n; for training also dx, dh_0 and dc_0, and d + parameter. What is timed
is the very call whose results were written.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from .shapes import Problem, Shape, problem, shape_of

# Class and arguments, the same in rnnfast and in torch.nn but for the last.
MODULES = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}

PEAK_SECONDS = 0.005  # of one call: long beside the start of threads, short beside a disturbance

Results = dict[str, np.ndarray]


class Runner:
    """A library: `about` it, and how it gets ready for a shape."""

    about: dict[str, str]

    def prepare(
        self, shape: Shape, mode: str, given: Problem
    ) -> tuple[Callable[[], Any], Callable[[Any], Results]]:
        """One call, to be timed, and what makes arrays of its value."""
        raise NotImplementedError


class Rnnfast(Runner):
    """This library as a user calls it: a module whose weights may change between two calls."""

    def __init__(self, threads: int) -> None:
        import rnnfast

        rnnfast.set_num_threads(threads)
        self.library = rnnfast
        self.about = {"rnnfast": rnnfast.__version__, "isa": rnnfast.isa()}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> tuple[Callable, Callable]:
        kind, arguments = MODULES[shape.cell]
        module = getattr(self.library, kind)(shape.I, shape.H, dtype=shape.dtype, **arguments)
        module.load_state_dict(given.weights)
        x, dy = given.x, given.dy
        state = given.state if len(given.state) == 2 else given.state[0]

        def infer() -> tuple:
            return module(x, state)

        def train() -> tuple:
            module.zero_grad()
            y, state_n, tape = module.forward_train(x, state)
            return y, state_n, *module.backward(tape, dy)

        def arrays(value: tuple) -> Results:
            return _named(value, module.grads.items() if mode == "training" else ())

        return (train if mode == "training" else infer), arrays


class Torch(Runner):
    """PyTorch at its best: inference_mode for inference; for training no gradient to add to."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.library = torch
        self.about = {"torch": torch.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> tuple[Callable, Callable]:
        if shape.cell == "gru_reset_before":
            raise NotImplementedError("no GRU with the reset before the product")
        torch = self.library
        kind, arguments = MODULES[shape.cell]
        dtype = getattr(torch, shape.dtype)
        module = getattr(torch.nn, kind)(shape.I, shape.H, dtype=dtype, **arguments)
        tensors = {name: torch.from_numpy(array) for name, array in given.weights.items()}
        module.load_state_dict(tensors)
        parameters = list(module.parameters())
        x, dy = torch.from_numpy(given.x), torch.from_numpy(given.dy)
        states = tuple(torch.from_numpy(array) for array in given.state)
        state = states if len(states) == 2 else states[0]
        leaves = [x, *states, *parameters]
        for leaf in leaves:
            leaf.requires_grad_(mode == "training")

        def infer() -> tuple:
            with torch.inference_mode():
                return module(x, state)

        def train() -> tuple:
            for leaf in leaves:
                leaf.grad = None
            y, state_n = module(x, state)
            y.backward(dy)
            dstate = tuple(s.grad for s in states) if len(states) == 2 else states[0].grad
            return y, state_n, x.grad, dstate

        def arrays(value: tuple) -> Results:
            grads = module.named_parameters() if mode == "training" else ()
            return _named(value, [(name, p.grad) for name, p in grads])

        return (train if mode == "training" else infer), arrays


class Peak(Runner):
    """No library but the machine: as many multiply-adds as its registers take."""

    def __init__(self, threads: int) -> None:
        from .. import _kernels, isa

        self.multiply_add, self.threads = _kernels.multiply_add, threads
        self.about = {"isa": isa()}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> tuple[Callable, Callable]:
        dtype, rounds, seconds = given.x.dtype.char, 1000, 0.0
        while seconds < PEAK_SECONDS:
            rounds *= 2
            began = time.perf_counter()
            self.multiply_add(dtype, rounds, self.threads)
            seconds = time.perf_counter() - began
        return lambda: self.multiply_add(dtype, rounds, self.threads), lambda operations: {}


RUNNERS: dict[str, type[Runner]] = {"rnnfast": Rnnfast, "torch": Torch, "peak": Peak}


def _named(value: tuple, grads: Any) -> Results:
    """The arrays of a call's value, (y, state) or (y, state, dx, dstate), and of `grads`."""
    found = {}
    for array, state, (name, *states) in zip(
        value[::2], value[1::2], (("y", "h_n", "c_n"), ("dx", "dh_0", "dc_0")), strict=False
    ):
        found[name] = array
        parts = state if isinstance(state, tuple) else (state,)
        found.update(zip(states, parts, strict=False))
    found.update((f"d{name.removesuffix('_l0')}", array) for name, array in grads)
    return {name: np.asarray(_detached(array)) for name, array in found.items()}


def _detached(array: Any) -> Any:
    return array.detach() if hasattr(array, "detach") else array


def timed(call: Callable[[], Any], seconds: float, most: int) -> list[float]:
    """Seconds of single calls, after one that is not counted: it wakes threads and fills caches.

    Ends after `most` calls, or with the call during which the time is up.

    >>> len(timed(lambda: None, 1.0, 3))
    3
    """
    call()
    times: list[float] = []
    clock = time.perf_counter
    first = clock()
    while len(times) < most:
        began = clock()
        call()
        ended = clock()
        times.append(ended - began)
        if ended - first >= seconds:
            break
    return times


def serve(library: str, threads: int, requests: TextIO, answers: TextIO) -> None:
    """Answers requests, in the form described above, until there are no more."""

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        runner = RUNNERS[library](threads)
    except ImportError as error:
        return answer(missing=str(error))
    answer(about=runner.about)
    call: Callable[[], Any] | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "time":
                if call is None:
                    raise ValueError("nothing is prepared")
                answer(seconds=timed(call, request["seconds"], request["most"]))
                continue
            call = None  # lest the last shape's call be timed for one that failed
            shape, mode = shape_of(request["shape"]), request["mode"]
            prepared, arrays = runner.prepare(shape, mode, problem(shape, request["seed"]))
            value = prepared()
            np.savez(request["results"], **arrays(value))
            call = prepared
            gc.collect()
            answer(operations=value if isinstance(value, float) else None)
        except NotImplementedError as error:
            answer(unsupported=str(error))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Serves on this process's pipes; what a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    gc.disable()  # else it would run within some call, and be counted as that call's
    try:
        serve(sys.argv[1], int(sys.argv[2]), sys.stdin, answers)
    except (BrokenPipeError, KeyboardInterrupt):  # the driver has gone, or was told to go
        pass


if __name__ == "__main__":
    main()
