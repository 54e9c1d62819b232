"""Every pair of options: it works, gradients and all, or it is refused with its reason; and the
page that says so, rnnfast/OPTIONS.md, says what is found here.

`python tests/test_options.py` writes the page anew. What works is judged by central differences of
a loss in float64, what is refused by its error.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnfast

PAGE = Path(__file__).parent.parent / "rnnfast" / "OPTIONS.md"
KINDS = {"RNN": rnnfast.RNN, "LSTM": rnnfast.LSTM, "GRU": rnnfast.GRU}
T, B, I, H, V = 5, 3, 4, 4, 4
LENGTHS = np.array([5, 2, 4])
MASK = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)


@dataclass(frozen=True)
class Option:
    """One row: how it is said, and what it asks of the module, of a call and of backward."""

    name: str
    module: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    backward: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = tuple(KINDS)
    use: str = ""  # other than a call for training: see `judge`


OPTIONS = (
    Option('nonlinearity="relu"', {"nonlinearity": "relu"}, kinds=("RNN",)),
    Option("reset_after=False", {"reset_after": False}, kinds=("GRU",)),
    Option("peephole", {"peephole": True}, kinds=("LSTM",)),
    Option("coupled", {"coupled": True}, kinds=("LSTM",)),
    Option("proj_size", {"proj_size": 3}, kinds=("LSTM",)),
    Option("forget_bias", {"forget_bias": 1.0}, kinds=("LSTM",)),
    Option('layer_norm="gates"', {"layer_norm": "gates"}),
    Option('layer_norm="gates+cell"', {"layer_norm": "gates+cell"}, kinds=("LSTM",)),
    Option("activations", {"activations": ("hardsigmoid", "softsign", "tanh")}, kinds=("LSTM",)),
    Option("activations", {"activations": ("hardsigmoid", "softsign")}, kinds=("GRU",)),
    Option("activations", {"activations": ("softsign",)}, kinds=("RNN",)),
    Option("clip", {"clip": 0.4}),
    Option("cell_clip", {"cell_clip": 0.3}, kinds=("LSTM",)),
    Option("bias=False", {"bias": False}),
    Option("num_layers", {"num_layers": 2}),
    Option("batch_first", {"batch_first": True}),
    Option("dropout", {"dropout": 0.4, "num_layers": 2}),
    Option("bidirectional", {"bidirectional": True}),
    Option("merge", {"merge": "mul", "bidirectional": True}),
    Option("learn_initial", {"learn_initial": True}),
    Option("recurrent_dropout", {"recurrent_dropout": 0.4}),
    Option("variational", {"variational": True, "recurrent_dropout": 0.3}),
    Option("zoneout", {"zoneout": 0.3}),
    Option("drop_connect", {"drop_connect": 0.4}),
    Option('padding="hold"', {"padding": "hold"}),
    Option("lengths", call={"lengths": LENGTHS}),
    Option("mask", call={"mask": MASK}),
    Option("offsets", call={"offsets": [0, 5, 5, 12]}),
    Option("clamp", call={"clamp": True}),
    Option("all_states", call={"all_states": True}),
    Option('tape="light"', call={"tape": "light"}),
    Option("drop=False", call={"drop": False}),
    Option("backward's clip", backward={"clip": 1e-3}),
    Option("norms", backward={"norms": True}),
    Option("freeze", use="freeze"),
    Option("stream", use="stream"),
    Option("generate", use="generate"),
    Option("forecast_train", use="forecast"),
)
ROWS = {kind: [one for one in OPTIONS if kind in one.kinds] for kind in KINDS}
PAIRS = [
    (kind, a, b)
    for kind, rows in ROWS.items()
    for a, b in itertools.combinations_with_replacement(range(len(rows)), 2)
]


class Run:
    """A module with two options, and a call of it."""

    def __init__(self, kind: str, *options: Option) -> None:
        self.uses = [one.use for one in options if one.use]
        rng = np.random.default_rng(1)
        arguments, self.call, self.back = {}, {}, {}
        for one in options:
            for into, what in (
                (arguments, one.module), (self.call, one.call), (self.back, one.backward)
            ):  # fmt: skip
                into.update(what)
        if {"num_layers", "dropout"} <= set(arguments):
            arguments["num_layers"] = 2
        self.module = module = KINDS[kind](I, H, dtype=np.float64, seed=3, **arguments)
        module.flat[...] += 0.3 * rng.standard_normal(module.flat.shape)
        self.batch_first = arguments.get("batch_first", False)
        if "mask" in self.call and self.batch_first:
            self.call["mask"] = np.ascontiguousarray(self.call["mask"].T)
        packed = "offsets" in self.call
        lead = (12,) if packed else (B, T) if self.batch_first else (T, B)
        self.x = rng.standard_normal((*lead, I))
        self.clamp = None
        if self.call.get("clamp"):
            self.clamp = rnnfast.Clamp(rng.standard_normal(1), units=[1])
            self.call["clamp"] = self.clamp
        self.weights: list[np.ndarray] = []

    def weighed(self, arrays: Any) -> float:
        """The sum of all numbers, each times one of its own."""
        total = 0.0
        for i, array in enumerate(arrays):
            if i == len(self.weights):
                self.weights.append(np.random.default_rng(i).standard_normal(array.shape))
            total += (array * self.weights[i]).sum()
        return total

    def results(self) -> list[np.ndarray]:
        self.module.dropout_calls = 0
        y, last, self.tape, *states = self.module.forward_train(self.x, **self.call)
        found = [y, *(last if isinstance(last, tuple) else (last,))]
        return found + [a for one in states for a in one if a is not None]

    def loss(self) -> float:
        return self.weighed(self.results())

    def gradients(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Arrays that the loss depends on, and its gradients by them."""
        self.loss()
        pair = isinstance(self.module, rnnfast.LSTM)
        dy, *rest = self.weights
        dstate, rest = (tuple(rest[:2]), rest[2:]) if pair else (rest[0], rest[1:])
        given = dict(self.back)
        if rest:
            given["dstates"] = (rest[0], rest[1] if pair else None)
        self.module.zero_grad()
        dx, _, *extra = self.module.backward(self.tape, dy, dstate, **given)
        found = [(self.x, dx), (self.module.flat, self.module.flat_grads)]
        if self.clamp is not None:
            found.append((self.clamp.values, extra[0].clamps[0]))
        if given.get("norms"):
            assert extra[0].norms.any()
        return found

    def differences(self, loss: Any, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        rng = np.random.default_rng(2)
        for array, gradient in pairs:
            gradient, step = gradient.copy(), 1e-6
            direction = rng.standard_normal(array.shape)
            array += step * direction
            above = loss()
            array -= 2 * step * direction
            below = loss()
            array += step * direction
            want, scale = (direction * gradient).sum(), np.abs(direction * gradient).sum()
            assert abs((above - below) / (2 * step) - want) < 1e-6 * (1 + scale)

    def judge(self) -> None:
        """By the differences of a call for training; or, of another use, by what it promises."""
        if not self.uses:
            if "clip" in self.back:  # not a gradient any more, unless nothing is large
                limit, self.back["clip"] = self.back["clip"], 1e9
                self.differences(self.loss, self.gradients())
                whole = self.module.flat_grads.copy()
                self.back["clip"] = limit
                self.gradients()
                assert (whole != self.module.flat_grads).any()
            else:
                self.differences(self.loss, self.gradients())
            return
        if len(set(self.uses)) > 1:
            raise Apart
        getattr(self, f"judge_{self.uses[0]}")()

    def judge_freeze(self) -> None:
        want = self.results()
        self.gradients()
        grads = self.module.flat_grads.copy()
        self.module.freeze()
        for one, other in zip(self.results(), want, strict=True):
            assert np.array_equal(one, other)
        self.gradients()
        assert np.array_equal(self.module.flat_grads, grads)

    def alone(self) -> None:
        """Uses that are no call of the module take no arguments of one."""
        if self.call or self.back:
            raise Apart

    def judge_stream(self) -> None:
        stream = self.module.stream(B)
        self.alone()
        y, _ = self.module(self.x)
        y, x = (a.swapaxes(0, 1) if self.batch_first else a for a in (y, self.x))
        assert np.array_equal(np.stack([stream.step(x_t) for x_t in x]), y)

    def head(self) -> tuple[np.ndarray, np.ndarray]:
        N = getattr(self.module, "proj_size", 0) if isinstance(self.module, rnnfast.LSTM) else 0
        rng = np.random.default_rng(5)
        return rng.standard_normal((I, N or H)) / 2, rng.standard_normal(I) / 2

    def judge_generate(self) -> None:
        head = self.head()
        first = np.random.default_rng(4).standard_normal((B, I))
        values, _ = self.module.generate(first, 6, head)
        self.alone()
        if self.batch_first:
            values = values.swapaxes(0, 1)
        stream, x = self.module.stream(B), first
        for value in values:
            x = stream.step(x) @ head[0].T + head[1]
            np.testing.assert_allclose(value, x, rtol=1e-10, atol=1e-12)

    def judge_forecast(self) -> None:
        head = self.head()
        first = np.random.default_rng(4).standard_normal((B, I))

        def loss() -> float:
            values, last, loss.tape = self.module.forecast_train(first, 6, head)
            return self.weighed([values, *(last if isinstance(last, tuple) else (last,))])

        loss()
        self.alone()
        pair = isinstance(self.module, rnnfast.LSTM)
        dvalues, *rest = self.weights
        self.module.zero_grad()
        found = self.module.backward_forecast(loss.tape, dvalues, tuple(rest) if pair else rest[0])
        pairs = [(first, found.first), (self.module.flat, self.module.flat_grads)]
        pairs += [(head[0], found.weight), (head[1], found.bias)]
        self.differences(loss, pairs)


class Apart(Exception):
    """Two things that are never done in one call."""


def verdict(kind: str, a: Option, b: Option) -> str:
    """ "" if the pair works, the reason if it is refused, "apart" if there is no such call.

    What neither works nor is refused raises.
    """
    try:
        Run(kind, a, b).judge()
    except Apart:
        return "apart"
    except ValueError as error:
        message = str(error)
        if " got " not in message or "; needs " not in message:
            raise
        return message
    return ""


def page() -> str:
    """The page as the code has it."""
    lines = [
        "# Options, pair by pair",
        "",
        "What becomes of each two options of a module, of its calls and of its other uses: `+`",
        "they work together, which `tests/test_options.py` sees by their gradients (or, of uses",
        "without gradients, by their results); a number: they are refused, with the reason below;",
        "blank: no call has both. On the diagonal, an option alone. Nothing is ignored in silence.",
        "",
    ]
    for kind, rows in ROWS.items():
        reasons: dict[str, int] = {}
        lines += [f"## {kind}", "", "| | " + " | ".join(map(str, range(1, len(rows) + 1))) + " |"]
        lines.append("| --- |" + " --- |" * len(rows))
        for i, a in enumerate(rows):
            cells = []
            for b in rows[: i + 1]:
                found = verdict(kind, b, a)
                if found not in ("", "apart"):
                    found = str(reasons.setdefault(found, len(reasons) + 1))
                cells.append({"": "+", "apart": " "}.get(found, found))
            cells += [""] * (len(rows) - i - 1)
            lines.append(f"| {i + 1} {a.name} | " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"{number}. {reason}" for reason, number in reasons.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


@pytest.mark.parametrize(("kind", "a", "b"), PAIRS)
def test_pair(kind, a, b):
    """Works or is refused; the page says which."""
    rows = ROWS[kind]
    found = verdict(kind, rows[a], rows[b])
    table = PAGE.read_text(encoding="utf-8").split(f"## {kind}\n")[1].split("\n## ")[0]
    line = next(one for one in table.splitlines() if one.startswith(f"| {b + 1} "))
    said = line.split(" | ")[a + 1].strip(" |")
    if found in ("", "apart"):
        assert said == ("+" if found == "" else "")
    else:
        assert f"\n{said}. {found}\n" in table + "\n"


def test_each_option_of_the_modules_is_in_the_table():
    """Of all arguments but sizes, dtype and seed."""
    import inspect

    for kind, cls in KINDS.items():
        known = {name for one in ROWS[kind] for name in one.module}
        arguments = set(inspect.signature(cls).parameters)
        assert arguments - known == {"input_size", "hidden_size", "dtype", "seed"}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
