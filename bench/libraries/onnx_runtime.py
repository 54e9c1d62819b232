"""ONNX Runtime, on a model with its weights inside.

Knows its sessions and bindings; the model is `onnx_model`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..shapes import Problem, Shape
from . import Library, Prepared, named, onnx_model


class OnnxRuntime(Library):
    """Inputs and outputs are bound beforehand, which spares some 5 us of each call.

    Its kernels (MLAS) follow the CPU's own word alone, so nothing holds them to AVX2.
    """

    holds_isa = False

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.library, self.threads = onnxruntime, threads
        self.about = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        stream = mode == "stream"
        options = self.library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        session = self.library.InferenceSession(
            onnx_model.model(shape, given, mode),
            options,
            providers=["CPUExecutionProvider"],
        )
        return self._streamed(session, given) if stream else self._whole(session, given)

    def _value(self, array: np.ndarray) -> Any:
        return self.library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _whole(self, session: Any, given: Problem) -> Prepared:
        binding = session.io_binding()
        inputs = {name: self._value(array) for name, array in onnx_model.inputs(given).items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        outputs = {
            output.name: self._value(np.empty(output.shape, given.x.dtype))
            for output in session.get_outputs()
        }
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)

        def infer() -> tuple:
            session.run_with_iobinding(binding)
            return inputs, outputs  # kept with this function: the binding has addresses alone

        def arrays(value: tuple) -> dict:
            y, *states = (output.numpy() for output in value[1].values())
            return named(y, states)

        return infer, arrays

    def _streamed(self, session: Any, given: Problem) -> Prepared:
        """Two bindings in turn: each reads the states that the other has written."""
        steps = [self._value(x_t[None]) for x_t in given.x]
        names = onnx_model.STATES[: len(given.state)]
        states = [[self._value(array) for array in given.state] for _ in range(2)]
        y = self._value(np.empty(session.get_outputs()[0].shape, given.x.dtype))
        bindings = []
        for before, after in (states, states[::-1]):
            binding = session.io_binding()
            for name, old, new in zip(names, before, after, strict=True):
                binding.bind_ortvalue_input(f"{name}_0", old)
                binding.bind_ortvalue_output(f"{name}_n", new)
            binding.bind_ortvalue_output("y", y)
            bindings.append(binding)
        done = 0

        def stream() -> tuple:
            nonlocal done
            ys = []
            for x_t in steps:
                binding = bindings[done % 2]
                binding.bind_ortvalue_input("x", x_t)
                session.run_with_iobinding(binding)
                ys.append(y.numpy().copy())  # a view: the next step overwrites it
                done += 1
            return ys, states  # kept with this function: the bindings have addresses alone

        def arrays(value: tuple) -> dict:
            ys, states = value
            return named(np.concatenate(ys), [state.numpy() for state in states[done % 2]])

        return stream, arrays
