"""OpenVINO, on a model with its weights inside.

Knows its compiled models and requests; the model is `onnx_model`'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...cells import CELLS
from ..shapes import Problem, Shape
from . import Library, Prepared, named, onnx_model


class OpenVino(Library):
    """Told to answer one request as soon as it can, and not to round to half precision.

    Its recurrent layers are oneDNN's, which are held to AVX2; of its own kernels, the builds that
    are published may use more.
    """

    @staticmethod
    def environment(threads: int, isa: str | None) -> dict[str, str]:
        # Its threads are TBB's, which count by affinity, as its options do.
        return {"ONEDNN_MAX_CPU_ISA": "AVX2", "OV_CPU_MAX_ISA": "AVX2"} if isa else {}

    def __init__(self, threads: int) -> None:
        import onnx
        import openvino

        self.library = openvino
        self.core = openvino.Core()
        self.options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        version = openvino.__version__.partition("-")[0]
        self.about = {"openvino": version, "onnx": onnx.__version__}

    def prepare(self, shape: Shape, mode: str, given: Problem) -> Prepared:
        stream = mode == "stream"
        row = CELLS[shape.cell]
        if row.peepholes or row.options.get("coupled"):
            raise NotImplementedError("no peepholes and no coupled gates")
        model = self.core.read_model(onnx_model.model(shape, given, mode))
        compiled = self.core.compile_model(model, "CPU", self.options)
        request = compiled.create_infer_request()
        inputs = onnx_model.inputs(given)
        return self._streamed(request, inputs) if stream else self._whole(request, inputs)

    def _tensor(self, array: np.ndarray) -> Any:
        """A view of an array, which has to be kept."""
        return self.library.Tensor(array, shared_memory=True)

    def _whole(self, request: Any, inputs: dict[str, np.ndarray]) -> Prepared:
        tensors = {name: self._tensor(array) for name, array in inputs.items()}
        for name, tensor in tensors.items():
            request.set_tensor(name, tensor)
        outputs = ["y", *(f"{name}_n" for name in onnx_model.STATES if f"{name}_0" in inputs)]

        def infer() -> tuple:
            request.infer()
            return inputs, tensors  # kept with this function: the request has addresses alone

        def arrays(value: tuple) -> dict:
            y, *states = (request.get_tensor(name).data for name in outputs)
            return named(y, states)

        return infer, arrays

    def _streamed(self, request: Any, inputs: dict[str, np.ndarray]) -> Prepared:
        x = inputs.pop("x")
        last = {name[0]: array.copy() for name, array in inputs.items()}
        steps = [self._tensor(x_t[None]) for x_t in x]
        states = {name: self._tensor(array) for name, array in last.items()}
        for name, tensor in states.items():
            request.set_tensor(f"{name}_0", tensor)
        y = request.get_tensor("y").data

        def stream() -> tuple:
            ys = []
            for x_t in steps:
                request.set_tensor("x", x_t)
                request.infer()
                for name, array in last.items():
                    array[...] = request.get_tensor(f"{name}_n").data
                ys.append(y.copy())
            return ys, x, last  # kept with this function: the request has addresses alone

        def arrays(value: tuple) -> dict:
            ys, _, last = value
            return named(np.concatenate(ys), last.values())

        return stream, arrays
