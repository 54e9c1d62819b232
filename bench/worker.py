"""One library in a process of its own, which computes and times what `measure` asks for.

Knows the protocol, clocks and memory; leaves the libraries to `libraries`. Judges nothing: results
go to a file, times to the caller. Run by `measure` as `python -m rnnfast.bench.worker LIBRARY
THREADS`.

One JSON object per line. The first answer says what this is, or why it cannot be: {"about": {name:
version}} or {"missing": reason}. Then, for each request, one answer; {"unsupported": reason} if the
library has no such layer, {"error": reason} if it failed:

- {"do": "prepare", "shape": name, "mode": mode, "seed": n, "results": path} gets ready and makes
  two calls, the first one's arrays written to path (.npz) -> {"counted": number or null, "ready":
  seconds, "first": seconds, "second": seconds, "memory": {"first": bytes, "second": bytes} or null}
- {"do": "time", "seconds": s, "most": n} makes calls until either bound -> {"seconds": [...]}

`counted` is what one call comes to where the shape does not say it. Memory is the most that the
process held beyond what it held before it got ready: up to the end of the first call, during the
second. What is timed is the very call whose results were written.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from .libraries import OURS, Library, library
from .models import text
from .shapes import MODEL_MODES, problem, shape_of

SHORT = 0.02  # s: a call that takes longer wakes the threads for itself
LOOK = 0.005  # s between two looks at whether the threads still spin
SETTLED = 0.5  # s after which nobody waits for them any more


def settle() -> None:
    """Returns when this process computes no more.

    Threads of ONNX Runtime spin for 20 to 40 ms after a call, on all cores, and would take them
    from whoever comes next.
    """
    began, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < SETTLED:
        time.sleep(LOOK)
        now = time.process_time()
        if now - before < 0.1 * LOOK:
            return
        before = now


def timed(call: Callable[[], Any], seconds: float, most: int, wake: bool = True) -> list[float]:
    """Seconds of single calls, after one that is not counted: it wakes threads and fills caches.

    Ends after `most` calls, or with the call during which the time is up.

    >>> len(timed(lambda: None, 1.0, 3))
    3
    """
    if wake:
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


class Memory:
    """The most memory that this process held since `watch`, beyond what it held at the start.

    Linux only, and only where the process may reset its own high-water mark; else it knows nothing.
    """

    def __init__(self) -> None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # or what earlier shapes left would be used again
        except (OSError, AttributeError):  # another C library
            pass
        self._start = self._status("VmRSS:")
        self.watch()

    def watch(self) -> None:
        """Forgets how much it was."""
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:
            self._start = None

    def most(self) -> int | None:
        """Bytes, or None if unknown.

        >>> memory = Memory()
        >>> block = np.ones(1_000_000)
        >>> memory.most() is None or memory.most() > 4_000_000
        True
        """
        peak = self._status("VmHWM:")
        return None if self._start is None or peak is None else max(peak - self._start, 0)

    @staticmethod
    def _status(field: str) -> int | None:
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                lines = [line.split() for line in file]
        except OSError:
            return None
        return next((1024 * int(line[1]) for line in lines if line[0] == field), None)


class Server:
    """Answers requests with one library."""

    def __init__(self, runner: Library) -> None:
        self.runner = runner
        self._call: Callable[[], Any] | None = None
        self._seconds = 0.0  # of one call

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request's answer, as the module describes it."""
        try:
            return self._time(request) if request["do"] == "time" else self._prepare(request)
        except NotImplementedError as error:
            return {"unsupported": str(error)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _time(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._call is None:
            raise ValueError("nothing is prepared")
        wake = self._seconds < SHORT
        seconds = timed(self._call, request["seconds"], request["most"], wake)
        self._seconds = seconds[-1]
        settle()
        return {"seconds": seconds}

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        self._call = None  # lest the last shape's call be timed for one that failed
        shape, mode = shape_of(request["shape"]), request["mode"]
        given = (text if mode in MODEL_MODES else problem)(shape, request["seed"])
        memory, clock = Memory(), time.perf_counter
        began = clock()
        if shape.happens and not isinstance(self.runner, library(OURS)):
            raise NotImplementedError(f"no {shape.happens} inside a layer")
        call, arrays = self.runner.prepare(shape, mode, given)
        ready = clock()
        value = call()
        first = clock()
        held = {"first": memory.most()}
        np.savez(request["results"], **arrays(value))
        counted = value if isinstance(value, float) else None
        del value
        memory.watch()
        again = clock()
        call()
        second = clock()
        held["second"] = memory.most()
        self._call, self._seconds = call, second - again
        gc.collect()
        return {
            "counted": counted,
            "ready": ready - began,
            "first": first - ready,
            "second": second - again,
            "memory": None if None in held.values() else held,
        }


def serve(name: str, threads: int, requests: TextIO, answers: TextIO) -> None:
    """Answers requests, in the form described above, until there are no more."""

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        runner = library(name)(threads)
    except ImportError as error:
        return answer(missing=str(error))
    answer(about=runner.about)
    server = Server(runner)
    for line in requests:
        answer(**server.answer(json.loads(line)))


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
