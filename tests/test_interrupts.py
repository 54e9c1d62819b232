"""Ctrl-C ends a call also where its time does not go into steps: packs, dropout, padding.

Knows the public modules and processes. The ordinary calls are in test_api.
"""

import json
import subprocess
import sys

import pytest

# Sizes at which one part of a call takes longer than the bound if it cannot be ended.
CALLS = {
    "pack": """
        module = rnnfast.LSTM(5500, 5500, seed=0)
        x = np.zeros((1, 1, 5500), np.float32)
        def call():
            for _ in range(30):
                module(x)
    """,
    "dropout": """
        x = np.broadcast_to(np.zeros((1, 1, 256), np.float32), (2000, 1000, 256))
        out = np.empty(x.shape, np.float32)
        def call():
            for _ in range(10):
                _kernels.dropout(x, out, 0.5, 1, 2, 3, 1, 0)
    """,
    "padding": """
        module = rnnfast.RNN(1, 1024, seed=0)
        x = np.zeros((500, 500, 1), np.float32)
        lengths = [1] * 500
        def call():
            for _ in range(20):
                module(x, lengths=lengths)
    """,
}

INTERRUPTED = """
import json, os, signal, threading, time
import numpy as np
import rnnfast
from rnnfast import _kernels
rnnfast.set_num_threads(1)
{call}
call_clock = time.pthread_getcpuclockid(threading.main_thread().ident)
sent = []
def interrupt():
    time.sleep({after})
    sent.append(time.clock_gettime(call_clock))
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    call()
    print(json.dumps(None))
except KeyboardInterrupt:
    print(json.dumps(time.clock_gettime(call_clock) - sent[0]))
"""


@pytest.mark.parametrize("after", [0.1, 0.25])
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c(name, after):
    lines = [line[8:] for line in CALLS[name].strip("\n").splitlines()]
    program = INTERRUPTED.format(call="\n".join(lines), after=after)
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-2000:]
    took = json.loads(child.stdout)
    assert took is not None, "the call ended before it was interrupted"
    # A quarter second of the thread's own time: others may be using the machine.
    assert took <= 0.25, f"{name} went on for {took:.3f} s"
