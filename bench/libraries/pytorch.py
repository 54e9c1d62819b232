"""PyTorch: its layers as they are, and compiled.

Knows torch.nn. Uneven lengths go by way of a PackedSequence, padded again at the end.
"""

from __future__ import annotations

from typing import Any

from ..shapes import Problem, Shape
from . import Library, Prepared, named
from .ours import CLASSES

# Training is compiled one step after the other: some two seconds for each step of each layer.
COMPILED_STEPS = 16


class PyTorch(Library):
    """PyTorch at its best: inference_mode for inference; for training no gradient to add to."""

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        held = {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "MKL_CBWR": "AVX2",
        }
        return {"OMP_NUM_THREADS": str(threads), **(held if isa else {})}

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.library = torch
        self.about = {"torch": torch.__version__}

    def made(self, module: Any, shape: Shape, mode: str) -> Any:
        """What is called, of a layer."""
        return module

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        if shape.cell == "gru_reset_before":
            raise NotImplementedError("no GRU with the reset before the product")
        torch = self.library
        kind, arguments = CLASSES[shape.cell]
        layer = getattr(torch.nn, kind)(
            shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.directions == 2,
            dtype=getattr(torch, shape.dtype), **arguments,
        )  # fmt: skip
        layer.load_state_dict({name: torch.from_numpy(w) for name, w in given.weights.items()})
        module = self.made(layer, shape, mode)
        x, dy = torch.from_numpy(given.x), torch.from_numpy(given.dy)
        states = tuple(torch.from_numpy(array) for array in given.state)
        pair = len(states) == 2
        state = states if pair else states[0]
        lengths = None if given.lengths is None else torch.from_numpy(given.lengths)
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence

        def forward() -> tuple:
            if lengths is None:
                return module(x, state)
            packed, state_n = module(pack(x, lengths, enforce_sorted=False), state)
            return pad(packed, total_length=shape.T)[0], state_n

        def tuple_of(state: Any) -> tuple:
            return state if pair else (state,)

        def arrays(value: tuple) -> dict:
            y, state_n = value
            return named(y, tuple_of(state_n))

        if mode == "training":
            leaves = [x, *states, *layer.parameters()]
            for leaf in leaves:
                leaf.requires_grad_()

            def train() -> tuple:
                for leaf in leaves:
                    leaf.grad = None
                y, state_n = forward()
                y.backward(dy)
                return y.detach(), state_n

            def gradients(value: tuple) -> dict:
                y, state_n = value
                grads = {name: p.grad for name, p in layer.named_parameters()}
                state_n = [s.detach() for s in tuple_of(state_n)]
                return named(y, state_n, x.grad, [s.grad for s in states], grads)

            return train, gradients

        if mode == "stream":
            steps = [x_t[None] for x_t in x]

            def stream() -> tuple:
                nonlocal state
                ys = []
                with torch.inference_mode():
                    for x_t in steps:
                        y, state = module(x_t, state)
                        ys.append(y)
                return ys, state

            return stream, lambda value: arrays((torch.cat(value[0]), value[1]))

        def infer() -> tuple:
            with torch.inference_mode():
                return forward()

        return infer, arrays


class Compiled(PyTorch):
    """`torch.compile` of the whole layer; without `allow_rnn` it would leave the layer as it is."""

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no processes beside the one that is timed
        return PyTorch.environment(threads, isa) | alone

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import torch._dynamo

        torch._dynamo.config.allow_rnn = True

    def made(self, module: Any, shape: Shape, mode: str) -> Any:
        steps = shape.T * shape.layers * shape.directions
        if mode == "training" and steps > COMPILED_STEPS:
            raise NotImplementedError(
                f"torch.compile takes minutes to unroll more than {COMPILED_STEPS} steps"
            )
        if shape.uneven:
            raise NotImplementedError("torch.compile takes no PackedSequence")
        self.library._dynamo.reset()  # else it gives up after a few shapes
        return self.library.compile(module, fullgraph=True, dynamic=False)
