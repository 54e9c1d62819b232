"""The library as a citizen of its process: threads, forks, Ctrl-C, the host's settings, memory.

Knows the public API and processes: most tests run a program in a fresh interpreter. What calls
return is judged in test_api.
"""

import copy
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_api import bits, in_child, random, training_step

import rnnfast

# -------------------------------------------------------------------------------- threads and forks


def work(module, x):
    """A call and a training step, as bits."""
    module = copy.deepcopy(module)
    return bits([module(x)[0], *training_step(module, x)[:1]]), bits(module.flat_grads)


LARGE = dict(input_size=64, hidden_size=96, num_layers=2)


def large():
    """Enough work for several threads; says so."""
    module, x = rnnfast.LSTM(**LARGE, seed=1), random(20, 64, 64)
    tape = module.forward_train(x)[2]
    return module, x, tape.threads


def test_the_threads_of_these_tests_are_real():
    if rnnfast.get_num_threads() == 1:
        pytest.skip("one core only")
    assert large()[2] > 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same():
    module, x, _ = large()
    want = work(module, x)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if work(module, x) == want else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + 60
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise AssertionError("the child hangs")
            time.sleep(0.005)
        assert os.waitstatus_to_exitcode(status) == 0
        assert work(module, x) == want


FORK_IN_A_HANDLER = """
    import json, os, signal, sys
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads(2)
    module = rnnfast.LSTM(256, 256, seed=1)
    x = np.full((1500, 64, 256), 0.5, np.float32)
    want = module(x)[0][:100].tobytes()
    read, write = os.pipe()
    pids = []

    def handler(*_):
        pids.append(os.fork())

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        y, outcome = module(x)[0], "a result"
    except BaseException as error:
        y, outcome = None, f"{type(error).__name__}: {error}"
    if pids[0] == 0:
        signal.alarm(60)  # a child that hangs is to end
        works = module(x)[0][:100].tobytes() == want
        os.write(write, json.dumps([outcome, works]).encode())
        os._exit(0)
    _, status = os.waitpid(pids[0], 0)
    os.close(write)
    child = json.loads(os.read(read, 10000) or b"null")
    print(json.dumps([y is not None and y[:100].tobytes() == want, status, child]))
"""


FORK_IN_A_HANDLER_OF_A_STACK = (
    FORK_IN_A_HANDLER.replace("LSTM(256, 256, seed=1)", "RNN(256, 256, 4, seed=1)")
    .replace("(1500, 64, 256)", "(20000, 1, 256)")
    .replace("module(x)[0]", "module.forward_train(x)[0]")
    .replace("ITIMER_REAL, 0.1", "ITIMER_REAL, 0.03")
)


@pytest.mark.parametrize(
    ("program", "plan"),
    [(FORK_IN_A_HANDLER, "batch"), (FORK_IN_A_HANDLER_OF_A_STACK, "wavefront")],
)
def test_a_fork_in_a_signal_handler_during_a_call(program, plan):
    """The child has none of the call's other threads: that call fails there, and no later one."""
    parent, status, child = in_child(program, RNNFAST_PLAN=plan)
    assert parent, "the parent's result is another one"
    assert status == 0
    outcome, works = child
    assert outcome.startswith("OSError: the process forked inside this call")
    assert works


FORK_DURING_BACKWARD = """
    import json, os, signal
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads(2)
    module = rnnfast.LSTM(256, 256, seed=1)
    x = np.full((600, 64, 256), 0.5, np.float32)
    y, _, tape = module.forward_train(x)
    module.backward(tape, y)
    want = (1 + module.flat_grads).tobytes()
    module.flat_grads[...] = 1
    read, write = os.pipe()
    pids = []

    def handler(*_):
        pids.append(os.fork())

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        module.backward(tape, y)
        outcome = "a result"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    if pids[0] == 0:
        signal.alarm(60)  # a child that hangs is to end
        same = bool((module.flat_grads == 1).all())
        module.backward(tape, y)
        works = module.flat_grads.tobytes() == want
        os.write(write, json.dumps([outcome, same, works]).encode())
        os._exit(0)
    _, status = os.waitpid(pids[0], 0)
    os.close(write)
    child = json.loads(os.read(read, 10000) or b"null")
    print(json.dumps([module.flat_grads.tobytes() == want, status, child]))
"""


def test_a_fork_during_backward_adds_nothing_in_the_child():
    parent, status, child = in_child(FORK_DURING_BACKWARD)
    assert parent, "the parent's gradients are other ones"
    assert status == 0
    outcome, same, works = child
    assert outcome.startswith("OSError: the process forked inside this call")
    assert same, "the child's gradients have changed"
    assert works


def test_many_threads_at_once():
    module, x, _ = large()
    want = work(module, x)
    shared = bits(module(x)[0])
    results, errors = [], []

    def run():
        try:
            for _ in range(5):
                results.append(work(module, x) == want and bits(module(x)[0]) == shared)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors
    assert results == [True] * 40


def test_backward_of_one_module_from_many_threads_adds_everything():
    module, x, _ = large()
    y, _, tape = module.forward_train(x)
    module.backward(tape, y)
    once = module.flat_grads.copy()
    module.zero_grad()
    threads = [threading.Thread(target=module.backward, args=(tape, y)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Only one of them adds at a time: nothing is lost.
    np.testing.assert_allclose(module.flat_grads, 4 * once, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- Ctrl-C


INTERRUPTED = """
    import json, os, signal, threading, time
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads({threads})
    # Many operations for each number that is stored: some seconds of work without gigabytes.
    module = rnnfast.LSTM(512, 512, 2, bidirectional={bidirectional}, seed=1)
    x = np.broadcast_to(np.full(512, 0.5, np.float32), ({steps}, 8, 512))
    dy = np.broadcast_to(np.ones(1024, np.float32), ({steps}, 8, 1024))
    tape = None
    if {name!r} == "backward":
        _, _, tape = module.forward_train(x)
    elif {name!r} == "backward_forecast":
        first, head = np.ones((8, 2), np.float32), (np.ones((2, 512), np.float32), None)
        known = np.broadcast_to(np.float32(0.5), ({steps}, 8, 510))
        values, _, tape = module.forecast_train(first, {steps}, head, covariates=known)
    elif {name!r} in ("process", "generate"):
        stream = module.stream(8)
        before_state = [a.tobytes() for a in stream.state]
    module.flat_grads += 1
    before = module.flat.tobytes(), module.flat_grads.tobytes()
    calls = {{
        "call": lambda: module(x),
        "forward_train": lambda: module.forward_train(x),
        "backward": lambda: module.backward(tape, dy),
        "process": lambda: stream.process(x),
        "generate": lambda: stream.generate(
            [0] * 8, {steps}, (x[0], None), "sample", table=x[0], seed=1
        ),
        "backward_forecast": lambda: module.backward_forecast(tape, values),
    }}
    sent = []
    own = time.pthread_getcpuclockid(threading.main_thread().ident)

    def clocks():
        return time.clock_gettime(own), time.monotonic()

    def interrupt():
        time.sleep(0.3)
        sent.extend(clocks())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        calls[{name!r}]()
        waited = None
    except KeyboardInterrupt:
        waited = [now - then for now, then in zip(clocks(), sent)]
    same = (module.flat.tobytes(), module.flat_grads.tobytes()) == before
    if {name!r} in ("process", "generate"):
        same = same and [a.tobytes() for a in stream.state] == before_state
    y, _ = module(np.ones((3, 2, 512), np.float32))
    print(json.dumps([waited, same, bool(np.isfinite(y).all())]))
"""


LONG_CALLS = "call", "forward_train", "backward", "process", "generate", "backward_forecast"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LONG_CALLS)
def test_ctrl_c_ends_a_long_call_and_changes_nothing(name, threads):
    program = INTERRUPTED.format(
        name=name,
        threads=threads,
        steps=1000 if name in ("forward_train", "backward", "backward_forecast") else 10_000,
        bidirectional=name in ("call", "forward_train", "backward"),
    )
    waited, same, works = in_child(program)
    assert waited is not None, "the call ended before it was interrupted"
    assert same, "an interrupted call changed weights, gradients or states"
    assert works
    own, wall = waited
    # A quarter second of the thread's own time: others may be using the machine.
    assert own <= 0.25, f"took {own:.3f} s of its own, {wall:.3f} s in all"
    assert wall <= 5, f"took {own:.3f} s of its own, {wall:.3f} s in all"


# Where a call's time does not go into steps: sizes at which one part of it takes longer than the
# bound if it cannot be ended.
PARTS = {
    "pack": """
        module = rnnfast.LSTM(5500, 5500, seed=0)
        x = np.zeros((1, 1, 5500), np.float32)
        def call():
            for _ in range(30):
                module(x)
    """,
    "layers side by side": """
        rnnfast.set_num_threads(2)
        module = rnnfast.LSTM(64, 64, 4, seed=0)
        x = np.zeros((15000, 1, 64), np.float32)
        assert module.forward_train(x)[2].plan == "wavefront"
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

PART_INTERRUPTED = """
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
@pytest.mark.parametrize("name", PARTS)
def test_ctrl_c(name, after):
    took = in_child(PART_INTERRUPTED.format(call=textwrap.dedent(PARTS[name]), after=after))
    assert took is not None, "the call ended before it was interrupted"
    # A quarter second of the thread's own time: others may be using the machine.
    assert took <= 0.25, f"{name} went on for {took:.3f} s"


# ---------------------------------------------------------------------------- the host's settings


HOST = """
    import ctypes, json, signal, sys, threading
    import numpy as np

    libm = ctypes.CDLL(None)

    def mode():
        \"\"\"Rounding, and whether denormals live, in this thread.\"\"\"
        tiny = np.float32(1e-40)
        halves = np.array([tiny, 3e-39], np.float32) * np.array([1.0, 0.25], np.float32)
        return [libm.fegetround(), halves.tolist(), (np.array([5e-324]) * 1.0).tolist()]

    def settings():
        handlers = [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())]
        mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        return [mode(), handlers, mask, np.geterr(), sys.getswitchinterval()]

    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    before = settings()
    import rnnfast
    imported = settings()
    module = rnnfast.LSTM(64, 96, 2, seed=1)
    module.flat *= 1e-3
    x = np.full((20, 64, 64), 1e-39, np.float32)  # denormals, so that flushing would show
    _, _, tape = module.forward_train(x)
    module.backward(tape, np.full((20, 64, 96), 1e-39, np.float32))
    module.stream(64).step(x[0])
    called = settings()
    in_thread = []
    thread = threading.Thread(target=lambda: (module(x), in_thread.append(mode())))
    thread.start()
    thread.join()
    print(json.dumps([before == imported, before == called, in_thread == [before[0]]]))
"""


def test_the_hosts_settings_stay():
    assert in_child(HOST) == [True, True, True]


HANDLER_MODE = """
    import json, signal
    import numpy as np
    import rnnfast

    rnnfast.set_num_threads({threads})
    module = rnnfast.LSTM(512, 512, seed=1)
    x = np.full((600, 8, 512), 0.5, np.float32)
    least, small, least_32 = [5e-324], [2.3e-308], np.array([1e-45], np.float32)
    calling, seen = False, []

    def handler(*_):
        if calling:
            live = least[0] * 1.0 != 0, small[0] / 2 != 0, bool((least_32 * np.float32(1) != 0)[0])
            seen.append(all(live))

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    while len(seen) < 10:
        calling = True
        _, _, tape = module.forward_train(x)
        module.backward(tape, x)
        calling = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(all(seen)))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_handler_during_a_call_sees_the_hosts_floating_point_mode(threads):
    """Kernels flush denormals; Python code that runs in the midst of one must not."""
    assert in_child(HANDLER_MODE.format(threads=threads))


IMPORT = """
    import json, sys, time
    import numpy
    before = set(sys.modules)
    start = time.perf_counter()
    import rnnfast
    took = time.perf_counter() - start
    print(json.dumps([took, sorted(set(sys.modules) - before)]))
"""


WITHOUT_COMPILED = """
    import json, sys
    import numpy
    # Without the finder of an editable install, which would find the module of its own tree.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("_f")
                        or "importlib" in getattr(f, "__module__", "")]
    sys.path.insert(0, {folder!r})
    try:
        import rnnfast
        print(json.dumps("imported"))
    except ImportError as error:
        print(json.dumps(str(error)))
"""


def test_a_tree_that_was_not_built_says_so(tmp_path):
    sources = Path(rnnfast.__file__).parent
    (tmp_path / "rnnfast").mkdir()
    for source in sources.glob("*.py"):
        shutil.copy(source, tmp_path / "rnnfast")
    message = in_child(WITHOUT_COMPILED.format(folder=str(tmp_path)))
    assert "compiled module is missing in" in message
    assert str(tmp_path) in message
    assert "pip install -e ." in message


def test_importing_is_quick():
    """At most 60 ms more than NumPy; the test grants a busy machine the double."""
    took, modules = min(in_child(IMPORT) for _ in range(5))
    print(f"import rnnfast: {1000 * took:.1f} ms above numpy, {len(modules)} modules")
    assert took < 0.12
    heavy = {"zipfile", "json", "tempfile", "pickle", "rich", "torch", "matplotlib", "subprocess"}
    assert not heavy.intersection(modules) - {"json"}  # the program itself imports json


# ------------------------------------------------------------------------------------- no memory


MEMORY = """
    import json, resource
    import numpy as np
    import rnnfast

    module = rnnfast.LSTM(32, 64, 2, seed=1)
    small = np.ones((3, 2, 32), np.float32)
    want = module(small)[0].tobytes()
    _, _, tape = module.forward_train(np.broadcast_to(np.ones(32, np.float32), (1000, 64, 32)))
    stream = module.stream(64)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**23, resource.RLIM_INFINITY))
    x = np.broadcast_to(np.ones(32, np.float32), (1000, 64, 32))
    failed = []
    module.flat_grads += 1
    for call in (
        lambda: module(x),
        lambda: module.forward_train(x),
        lambda: module.backward(tape, np.broadcast_to(np.ones(64, np.float32), (1000, 64, 64))),
        lambda: stream.process(x),
        lambda: rnnfast.LSTM(4096, 4096),
        lambda: module.stream(2**20),
    ):
        try:
            call()
            failed.append("no error")
        except MemoryError:
            failed.append("MemoryError")
        assert module(small)[0].tobytes() == want
        assert stream.step(np.ones((64, 32), np.float32)).shape == (64, 64)
    print(json.dumps([failed, bool((module.flat_grads == 1).all())]))
"""


def test_a_failed_allocation_is_a_memory_error_and_the_next_call_works():
    failed, same = in_child(MEMORY)
    assert failed == ["MemoryError"] * 6
    assert same


# ---------------------------------------------------------------------------------- the environment


SETTINGS = """
    import json, rnnfast
    found = rnnfast.show_config("dicts")
    _, _, tape = rnnfast.LSTM(64, 96).forward_train(__import__("numpy").ones((9, 64, 64), "f"))
    print(json.dumps([rnnfast.isa(), found["plan"], found["threads"], tape.plan, tape.isa]))
"""


def test_the_environment_is_obeyed():
    settings = {"RNNFAST_ISA": "base", "RNNFAST_PLAN": "serial", "RNNFAST_NUM_THREADS": "3"}
    assert in_child(SETTINGS, **settings) == ["base", "serial", 3, "serial", "base"]
    empty = in_child(SETTINGS, **dict.fromkeys(settings, ""))
    assert empty[1] == "auto"
    assert empty[2] == len(os.sched_getaffinity(0))
    forced = in_child(SETTINGS, RNNFAST_PLAN="batch", RNNFAST_NUM_THREADS="2")
    assert forced[3] == "batch"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RNNFAST_ISA", ["avx1024", "AVX2", "neon?", " "]),
        ("RNNFAST_PLAN", ["waves", "Auto", "0"]),
        ("RNNFAST_NUM_THREADS", ["0", "-1", "two", "1.0", "257", "9" * 30, "1e2", "\u0663", "+1"]),
    ],
)
def test_an_impossible_environment_is_a_clear_error(name, values):
    for value in values:
        done = subprocess.run(
            [sys.executable, "-c", "import rnnfast"],
            capture_output=True,
            text=True,
            env={**os.environ, name: value},
        )
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ValueError: {name}: got "), done.stderr
        assert "needs" in last
