"""RNNCell, LSTMCell and GRUCell: one step of a layer, as torch.nn's cells have it.

Knows the layers of `modules`: a cell is a layer of which one step is run at a time, and has all of
its options but those of a stack or of a sequence. Leaves parameters, packs and the step itself to
that layer.

B batch, I input size, H hidden size, as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from . import checks, storage
from .modules import GRU, LSTM, RNN
from .parameters import Arrays
from .recurrent import Recurrent
from .tapes import StackTape

# What a layer has, and a single step of one layer has no use for; as a cell's layer has it.
STRUCTURE = {
    "num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False,
    "variational": False, "padding": "zeros",
    "merge": "concat", "learn_initial": False, "drop_connect": 0.0,
}  # fmt: skip
END = "_l0"  # of the parameters' names in a layer, which a cell's are without


class SingleStep:
    """What RNNCell, LSTMCell and GRUCell have in common: all but the first arguments.

    `params` and `grads` map PyTorch's names to views of `flat` and `flat_grads`, one buffer each.
    """

    _kind: ClassVar[type[Recurrent]]
    _options: ClassVar[tuple[str, ...]]
    _layer: Recurrent

    def __init_subclass__(cls) -> None:
        taken = list(inspect.signature(cls._kind.__init__).parameters)[1:]  # without self
        cls._options = tuple(name for name in taken if name not in STRUCTURE)

    def _build(self, arguments: dict[str, Any]) -> None:
        name = type(self).__name__
        for option in arguments:
            if option not in self._options:
                got = f"an argument {checks.describe(option)}"
                checks.fail(TypeError, name, got, f"those of one step: {', '.join(self._options)}")
        self._own(self._kind(**arguments))

    def _own(self, layer: Recurrent) -> None:
        if "_layer" in self.__dict__:  # a call may be under way, as of a layer
            checks.fail(ValueError, type(self).__name__, "a module that is built", "a new one")
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        """The arguments, as the layer has them."""
        if name in type(self)._options:
            return self._layer._arguments[name]
        if name == "_layer":
            checks.fail(TypeError, "module", "one that was never built", "its class called")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def dropout_calls(self) -> int:
        """Completed calls of `forward_train`; with `seed` it decides what the next one drops."""
        return self._layer.dropout_calls

    @dropout_calls.setter
    def dropout_calls(self, value: int) -> None:
        self._layer.dropout_calls = value

    # ------------------------------------------------------------------------------ parameters

    @property
    def params(self) -> Arrays:
        """Parameters by PyTorch's names, in PyTorch's order: views of `flat`."""
        return _short(self._layer.params)

    @property
    def grads(self) -> Arrays:
        """Gradients by the names of the parameters: views of `flat_grads`."""
        return _short(self._layer.grads)

    @property
    def flat(self) -> np.ndarray:
        """All parameters in one buffer. Assigning writes into it: `cell.flat -= lr * g` works."""
        return self._layer.flat

    @flat.setter
    def flat(self, value: Any) -> None:
        self._layer.flat = value

    @property
    def flat_grads(self) -> np.ndarray:
        """All gradients in one buffer, in the order of `flat`."""
        return self._layer.flat_grads

    @flat_grads.setter
    def flat_grads(self, value: Any) -> None:
        self._layer.flat_grads = value

    def zero_grad(self) -> None:
        """Sets all gradients to zero."""
        self._layer.zero_grad()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, by PyTorch's names.

        >>> list(LSTMCell(2, 3, bias=False).state_dict())
        ['weight_ih', 'weight_hh']
        """
        return {name: view.copy() for name, view in self.params.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Takes all parameters from a dict of arrays or tensors, such as PyTorch's `state_dict()`.

        As a layer does, with the cell's names.

        >>> a, b = GRUCell(2, 3, seed=1), GRUCell(2, 3, seed=2)
        >>> b.load_state_dict(a.state_dict())
        >>> bool((a.flat == b.flat).all())
        True
        """
        self._layer._load_state_dict(state_dict, prefix, _short(self._layer._shapes))

    def freeze(self) -> None:
        """Makes the parameters read-only and keeps the kernels' packs of them, until `unfreeze`.

        Calls are then spared the packing, which is most of a step's time where B is small.
        """
        self._layer.freeze()

    def unfreeze(self) -> None:
        """Makes the parameters writable again and drops the packs."""
        self._layer.unfreeze()

    # ------------------------------------------------------------------------------------ calls

    def __call__(self, x: Any, state: Any = None) -> Any:
        """One step, without a tape.

        x [B, I], or [I] unbatched; state: (h, c) for the LSTM, h for others, each [B, H] ([H]
        unbatched), or None for zeros. Returns the state after the step, in the same form; h is what
        comes out, too. A projected h has proj_size numbers. Raises TypeError, ValueError or
        MemoryError, and KeyboardInterrupt when interrupted.

        >>> cell = LSTMCell(3, 5)
        >>> h, c = cell(np.zeros((2, 3), np.float32))
        >>> h, c = cell(np.ones((2, 3), np.float32), (h, c))
        >>> h.shape, c.shape
        ((2, 5), (2, 5))
        """
        return self._step(x, state, None)[0]

    def forward_train(self, x: Any, state: Any = None) -> tuple[Any, StackTape]:
        """As a plain call, with a tape for `backward`.

        The tape holds a view of x, not a copy, unless one had to be made; neither x nor the
        parameters may be changed before `backward`.

        >>> cell = GRUCell(3, 5)
        >>> h, tape = cell.forward_train(np.zeros((2, 3), np.float32))
        >>> h.shape
        (2, 5)
        """
        state, tape = self._step(x, state, "full")
        assert tape is not None
        return state, tape

    def _step(self, x: Any, state: Any, kind: str | None) -> tuple[Any, StackTape | None]:
        layer = self._layer
        I, H, P, _, _ = layer._sizes
        x, unbatched = checks.step_input("x", x, layer.dtype, I)
        if state is not None:
            sizes = x.shape[1], H
            names, pair, dtype = checks.STEP_STATE, layer._pair, layer.dtype
            h, c = checks.step_states(names, state, pair, dtype, sizes, unbatched, P)
            if unbatched:
                h, c = h[:, 0], None if c is None else c[:, 0]
            state = (h, c) if pair else h
        _, last, tape, _ = layer._forward(
            x[:, 0] if unbatched else x, state, None, kind, None, None, False, None
        )
        return tuple([s[0] for s in last]) if layer._pair else last[0], tape

    def backward(
        self, tape: StackTape, dstate: Any = None, *, need_dx: bool = True, accumulate: bool = True
    ) -> tuple[np.ndarray | None, Any]:
        """Back through the step that made `tape`; adds to `grads`, or replaces them.

        dstate: gradient of the loss by the state after the step, shaped as it was; of several
        steps, by what `backward` of the next one returned, and by what the loss takes of this one,
        added up. None stands for zeros; accumulate: as of a layer's `backward`.

        Returns dx, shaped as x (None without `need_dx`), and the gradient by the state before. The
        errors are those of a call; `grads` are then as they were.

        >>> cell = RNNCell(3, 5)
        >>> h, tape = cell.forward_train(np.zeros((2, 3), np.float32))
        >>> dx, dh_0 = cell.backward(tape, np.ones_like(h))
        >>> dx.shape, dh_0.shape, bool(cell.grads["bias_ih"].any())
        ((2, 3), (2, 5), True)
        """
        layer = self._layer
        if dstate is not None:
            _, H, P, _, _ = layer._sizes
            (own,), _ = layer._own_tapes(tape)
            sizes, names = (own.x.shape[1], H), checks.STEP_DSTATE
            h, c = checks.step_states(
                names, dstate, layer._pair, layer.dtype, sizes, own.unbatched, P
            )
            if own.unbatched:
                h, c = h[:, 0], None if c is None else c[:, 0]
            dstate = (h, c) if layer._pair else h
        dx, first = layer.backward(tape, None, dstate, need_dx=need_dx, accumulate=accumulate)
        dstate_0 = tuple([s[0] for s in first]) if layer._pair else first[0]
        return None if dx is None else dx[0], dstate_0

    # ------------------------------------------------------------------------- files and copies

    def save(self, path: Any) -> None:
        """Writes the module to a file; see `rnnfast.load`, and `save` of a layer."""
        path = checks.path("path", path)
        storage.write(path, {"class": type(self)._file_name, **self._header()}, self.params)

    _file_name: ClassVar[str]

    def _header(self) -> dict[str, Any]:
        header = self._layer._header()
        arguments = header["arguments"]
        return {**header, "arguments": {name: arguments[name] for name in self._options}}

    @classmethod
    def _from_file(cls, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> SingleStep:
        """As a layer's."""
        arguments = _whole(header["arguments"])
        arrays = {name + END: array for name, array in arrays.items()}
        module = cls.__new__(cls)
        module._layer = cls._kind._from_file({**header, "arguments": arguments}, arrays)
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**self._layer.__getstate__(), **self._header()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layer = self._kind.__new__(self._kind)
        if type(state) is dict and type(state.get("arguments")) is dict:
            state = {**state, "arguments": _whole(state["arguments"])}
        layer.__setstate__(state)
        self._own(layer)

    def __repr__(self) -> str:
        return type(self).__name__ + repr(self._layer).removeprefix(self._kind.__name__)


def _short(named: Mapping[str, Any]) -> Any:
    """What a layer has by its parameters' names, by those of the cell."""
    short = {name.removesuffix(END): value for name, value in named.items()}
    return Arrays(short) if type(named) is Arrays else short


def _whole(arguments: dict[str, Any]) -> dict[str, Any]:
    """The layer's arguments from those that a cell has kept."""
    own = [name for name in arguments if name in STRUCTURE]
    if own:
        checks.fail(ValueError, "arguments", checks.describe(own[0]), "those of one step")
    return {**arguments, **STRUCTURE}


class RNNCell(SingleStep):
    """One step of a simple recurrent layer, h' = tanh (or relu) of W x + b_ih + R h + b_hh.

    Arguments as of torch.nn.RNNCell: input_size, hidden_size, bias, nonlinearity; then dtype, seed
    and all others that `rnnfast.RNN` has for one layer. Raises TypeError or ValueError for an
    argument that is not such.

    >>> cell = RNNCell(3, 5, nonlinearity="relu")
    >>> cell(np.zeros(3, np.float32)).shape
    (5,)
    """

    _kind = RNN
    _file_name = "RNNCell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        **options: Any,
    ) -> None:  # fmt: skip
        self._build(
            dict(
                input_size=input_size, hidden_size=hidden_size, bias=bias,
                nonlinearity=nonlinearity, **options,
            )
        )  # fmt: skip


class LSTMCell(SingleStep):
    """One step of long short-term memory: (h, c) before it to (h, c) after it.

    Arguments as of torch.nn.LSTMCell: input_size, hidden_size, bias; then dtype, seed and all
    others that `rnnfast.LSTM` has for one layer, such as peephole, coupled or proj_size.

    >>> cell = LSTMCell(3, 5, peephole=True)
    >>> list(cell.params)
    ['weight_ih', 'weight_hh', 'bias_ih', 'bias_hh', 'weight_peephole']
    """

    _kind = LSTM
    _file_name = "LSTMCell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, **options: Any
    ) -> None:
        self._build(dict(input_size=input_size, hidden_size=hidden_size, bias=bias, **options))


class GRUCell(SingleStep):
    """One step of a gated recurrent unit.

    Arguments as of torch.nn.GRUCell: input_size, hidden_size, bias; then dtype, seed and all others
    that `rnnfast.GRU` has for one layer, such as reset_after.

    >>> GRUCell(3, 5, reset_after=False)
    GRUCell(3, 5, reset_after=False)
    """

    _kind = GRU
    _file_name = "GRUCell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, **options: Any
    ) -> None:
        self._build(dict(input_size=input_size, hidden_size=hidden_size, bias=bias, **options))
