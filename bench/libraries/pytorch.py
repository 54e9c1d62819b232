"""PyTorch: its layers as they are, and compiled; models with its layers, or with the drop-in.

Knows torch.nn and rnnfast.torch. Uneven lengths go by way of a PackedSequence, padded again at the
end. Where torch.nn has no such layer, an LSTM with layer normalisation is a loop over steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..models import PADDING, Text
from ..shapes import MODEL_MODES, MODES, VOCABULARY, Problem, Shape
from . import Library, Prepared, named
from .ours import Ours

# Class and arguments.
LAYERS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
NORMALISED = "lstm_norm", "lstm_norm_cell"
# Training is compiled one step after the other: some two seconds for each step of each layer.
COMPILED_STEPS = 16


def _normalised(torch: Any, shape: Shape) -> Any:
    """An LSTM with layer normalisation, as PyTorch's users write one: what comes from x is made for
    all steps at once, the rest step by step.
    """
    norm = torch.nn.functional.layer_norm

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtype = getattr(torch, shape.dtype)
            for name, sizes in shape.parameters.items():
                setattr(self, name, torch.nn.Parameter(torch.empty(sizes, dtype=dtype)))

        def forward(self, x: Any, state: tuple) -> tuple:
            (h,), (c,) = state
            W_x, R, ys = x @ self.weight_ih_l0.T, self.weight_hh_l0.T, []
            size, H = W_x.shape[-1:], h.shape[-1:]
            g_hh, b_hh = self.weight_norm_hh_l0, self.bias_hh_l0
            g_c, b_c = self.weight_norm_c_l0, self.bias_norm_c_l0
            for z_x in norm(W_x, size, self.weight_norm_ih_l0, self.bias_ih_l0).unbind():
                i, f, g, o = (z_x + norm(h @ R, size, g_hh, b_hh)).chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                out = norm(c, H, g_c, b_c)
                if shape.cell == "lstm_norm_cell":
                    c = out
                h = torch.sigmoid(o) * torch.tanh(out)
                ys.append(h)
            return torch.stack(ys), (h[None], c[None])

    return Normalised()


class PyTorch(Library):
    """PyTorch at its best: inference_mode for inference; for training no gradient to add to."""

    modes = MODES + MODEL_MODES

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        held = {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "MKL_CBWR": "AVX2",
        }
        return {
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes beside the one that is timed
            **(held if isa else {}),
        }

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.library, self.layers = torch, torch.nn
        self.about = {"torch": torch.__version__}

    def made(self, module: Any, shape: Shape, mode: str) -> Any:
        """What is called, of a layer."""
        return module

    def _layer(self, shape: Shape, batch_first: bool) -> Any:
        plain = replace(shape, layers=1, directions=1, uneven=False, projection=0)
        if shape.cell in NORMALISED and shape == plain and not batch_first:
            return _normalised(self.library, shape)
        if shape.cell not in LAYERS:
            raise NotImplementedError(f"no {shape.cell}")
        kind, arguments = LAYERS[shape.cell]
        if shape.projection:
            arguments = {**arguments, "proj_size": shape.projection}
        return getattr(self.layers, kind)(
            shape.I, shape.H, num_layers=shape.layers, bidirectional=shape.directions == 2,
            dtype=getattr(self.library, shape.dtype), batch_first=batch_first, **arguments,
        )  # fmt: skip

    def prepare(self, shape: Shape, mode: str, given: Problem | Text) -> Prepared:
        torch, layer = self.library, self._layer(shape, batch_first=mode in MODEL_MODES)
        if mode in MODEL_MODES:
            return _model(torch, layer, shape, mode, given)
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

    modes = MODES

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


class DropIn(PyTorch):
    """This library in the place of PyTorch's layers, with as many threads as PyTorch has."""

    modes = MODEL_MODES

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        return PyTorch.environment(threads, isa) | Ours.environment(threads, isa)

    def __init__(self, threads: int) -> None:
        import rnnfast.torch

        super().__init__(threads)
        self.layers = rnnfast.torch
        self.about |= {"rnnfast": rnnfast.__version__, "isa": rnnfast.isa()}


def _model(torch: Any, layer: Any, shape: Shape, mode: str, given: Text) -> Prepared:
    """A call of the model around a layer, written as its users would."""
    nn, rnn = torch.nn, torch.nn.utils.rnn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, shape.I)
            self.layer = layer
            self.linear = nn.Linear(shape.directions * shape.output, VOCABULARY)

        def forward(self, tokens: Any, lengths: Any = None) -> Any:
            x = self.embedding(tokens)
            if lengths is None:
                y, _ = self.layer(x)
            else:
                packed = rnn.pack_padded_sequence(
                    x, lengths, batch_first=True, enforce_sorted=False
                )
                packed, _ = self.layer(packed)
                y, _ = rnn.pad_packed_sequence(packed, batch_first=True)
            return self.linear(y)

    plain = Model().to(getattr(torch, shape.dtype))
    plain.load_state_dict({name: torch.from_numpy(w) for name, w in given.weights.items()})
    model = plain
    if mode == "step-compiled":
        torch._dynamo.reset()  # else it gives up after a few shapes
        model = torch.compile(plain)
    tokens, targets = torch.from_numpy(given.tokens), torch.from_numpy(given.targets)
    inputs = (tokens,) if given.lengths is None else (tokens, torch.from_numpy(given.lengths))
    if mode == "predict":
        plain.eval()

        def predict() -> Any:
            with torch.inference_mode():
                return model(*inputs)

        return predict, lambda y: {"y": y.transpose(0, 1).numpy()}

    optimiser = torch.optim.Adam(plain.parameters())

    def step() -> Any:
        optimiser.zero_grad()
        scores = model(*inputs)
        loss = nn.functional.cross_entropy(
            scores.reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=PADDING
        )
        loss.backward()
        optimiser.step()
        return loss.detach()

    def arrays(loss: Any) -> dict:
        grads = {f"d{name}": p.grad.numpy() for name, p in plain.named_parameters()}
        return {"loss": loss.numpy(), **grads}

    return step, arrays
