"""rnnfast.torch under DistributedDataParallel: real jobs of two processes, by torchrun and gloo.

Knows the drop-in's modules, torchrun's command line and examples/torch_ddp.py as a program; needs
PyTorch, and is skipped without. What one process computes is judged in test_drop_in.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tolerances import assert_close, assert_same_bits

torch = pytest.importorskip("torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch was built without gloo", allow_module_level=True)

EXAMPLE = Path(__file__).parents[1] / "examples" / "torch_ddp.py"
TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GLOO_SOCKET_IFNAME": "lo",  # whatever the machine's name resolves to
    # PyTorch 2.13: else restarted ranks may find the addresses of those before them.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
PATIENCE = 120  # seconds that a job may take on a busy machine; all are done in a fifth of it


# ------------------------------------------------------------------------------------------- jobs


class Job:
    """A command that runs in `folder`, and what it has written so far."""

    def __init__(self, folder, *command):
        self.log = folder / "log"
        self.deadline = time.monotonic() + PATIENCE
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=folder, env={**os.environ, **SETTINGS},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def output(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what, condition):
        """The first true answer of `condition`, while the job still runs."""
        while not (answer := condition()):
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < self.deadline, f"no {what} in time:\n{self.output()}"
            time.sleep(0.02)
        return answer

    def end(self):
        """The exit status, once all is over."""
        try:
            return self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job hangs:\n{self.output()}") from None

    def ranks(self):
        """The pid of each rank's process: of the launcher's children, as /proc tells them."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # which processes that end meanwhile raise
                if not entry.name.isdigit():
                    continue
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) != self.process.pid:
                    continue
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (entry / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(entry.name)
        return found


@contextlib.contextmanager
def job(folder, *command):
    """A Job that leaves no process behind, whatever happens."""
    folder.mkdir(exist_ok=True)
    running = Job(folder, *command)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            ranks = running.ranks().values()
            running.process.kill()
            running.process.wait()
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def run(folder, *command):
    """What a command writes that has to succeed."""
    with job(folder, *command) as running:
        status = running.end()
        assert status == 0, f"exit status {status}:\n{running.output()}"
        return running.output()


# --------------------------------------------------------------------------- gradients, parameters

# Also run here, as the one process that two are compared with.
PREAMBLE = """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import rnnfast.torch

    KINDS = "LSTM", "GRU", "RNN"
    ROWS = 6

    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.rnn = getattr(rnnfast.torch, kind)(5, 19, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(38, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    def loss_of(model, x, target):
        return nn.functional.mse_loss(model(x), target)

    def make(kind, batches):
        torch.manual_seed(KINDS.index(kind))
        model = Model(kind)
        return model, [(torch.randn(ROWS, 11, 5), torch.randn(ROWS, 11, 3)) for _ in range(batches)]

    def values(tensors):
        return {name: t.detach().clone() for name, t in tensors}

    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return values((name, p.grad) for name, p in model.named_parameters())
"""

PROGRAM = """
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for kind in KINDS:
        model, [(x, target)] = make(kind, 1)
        half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        parallel = DistributedDataParallel(model)
        found[kind] = gradients(model, loss_of(parallel, x[half], target[half]))

    model, batches = make("LSTM", 8)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with parallel.join():
        for x, target in batches[:5] if rank == 0 else batches[5:]:
            gradients(model, loss_of(parallel, x, target))
            optimizer.step()
    found["uneven"] = values(model.named_parameters())
    torch.save(found, f"rank-{rank}.pt")
    del parallel  # or the end may hang: see examples/torch_ddp.py
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def alone():
    """The preamble's names, in this process."""
    names = {}
    exec(textwrap.dedent(PREAMBLE), names)
    with torch.random.fork_rng():
        yield names


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "program.py"
    script.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(PROGRAM), encoding="utf-8")
    run(folder, *TORCHRUN, script)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_agree(ranks, want, context):
    """The ranks have the same bits, and `want` but for rounding."""
    first, second = ranks
    assert first.keys() == second.keys() == want.keys()
    for name, tensor in first.items():
        assert_same_bits(name, second[name].numpy(), tensor.numpy(), context=f"{context}, rank 1")
        wanted = want[name].double().numpy()
        assert_close(name, tensor.numpy(), wanted, "float32", "gradient", context=context)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_two_ranks_are_those_of_the_joined_batch(kind, ranks, alone):
    model, [(x, target)] = alone["make"](kind, 1)
    want = alone["gradients"](model, alone["loss_of"](model, x, target))
    assert_agree([found[kind] for found in ranks], want, f"{kind} [6, 11, 5] H=19")


def test_ranks_with_uneven_numbers_of_batches_join(ranks, alone):
    """5 and 3: the last two steps have one batch, whose gradient still counts by half."""
    model, batches = alone["make"]("LSTM", 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        losses = [alone["loss_of"](model, *batches[i]) for i in (step, step + 5) if i < 8]
        alone["gradients"](model, sum(losses) / 2)
        optimizer.step()
    want = alone["values"](model.named_parameters())
    assert_agree([found["uneven"] for found in ranks], want, "LSTM [6, 11, 5] H=19, 5 steps")


# ------------------------------------------------------------------------------------- the example


@pytest.fixture
def options(tmp_path):
    """The example's, for a job that is small, and has epochs of 24 and of 16 batches."""
    text = Path(__file__).read_bytes()
    for name, length in (("long", 6000), ("short", 4000)):
        (tmp_path / name).write_bytes(text[:length])
    sizes = "--hidden", 24, "--batch", 8, "--length", 32, "--every", 5
    return *sizes, "--text", tmp_path / "short", tmp_path / "long"


def losses(output):
    """Step -> loss, as the example prints them."""
    lines = re.findall(r"^step +(\d+): (\d+\.\d+) bits", output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


def first_steps(output):
    """Where the example began, each time that it was started."""
    return [int(step) for step in re.findall(r"^2 ranks .* from step (\d+)$", output, re.MULTILINE)]


def load(path):
    """A checkpoint, as numbers by name, and its step."""
    saved = torch.load(path, weights_only=True)
    moments = {
        f"optimizer.{index}.{name}": value
        for index, state in saved["optimizer"]["state"].items()
        for name, value in state.items()
    }
    return saved["step"], {**saved["model"], **moments}


def test_a_job_with_a_killed_rank_fails_and_goes_on_from_its_checkpoint(tmp_path, options):
    """First by torchrun, which may restart it once, then by hand; to the bits of a job in peace.

    That one learns, too. Bits agree only if all ranks do, after every epoch, in all that is saved.
    """
    path = tmp_path / "checkpoint"
    command = EXAMPLE, *options, "--checkpoint", path
    endless = *TORCHRUN, "--max-restarts", 1, *command, "--steps", 10**9
    with job(tmp_path / "killed", *endless) as running:
        # In the second epoch: what `join` had left unequal would lie in the ranks' moments by now.
        running.wait_for("a checkpoint", lambda: path.exists() and load(path)[0] >= 30)
        first = running.ranks()
        os.kill(first[1], signal.SIGKILL)
        running.wait_for("a second start", lambda: len(first_steps(running.output())) == 2)
        begin, restart = first_steps(running.output())
        assert (begin, restart > 0, restart % 5) == (0, True, 0)
        running.wait_for("its checkpoint", lambda: load(path)[0] > restart)
        second = running.ranks()
        assert first.keys() == second.keys() == {0, 1}
        assert not set(first.values()) & set(second.values())
        os.kill(second[0], signal.SIGKILL)
        assert running.end() != 0, running.output()

    step, numbers = load(path)  # whole: raises otherwise
    assert step > restart
    assert all(value.isfinite().all() for value in numbers.values())
    steps = step + 20
    resumed = run(tmp_path / "resumed", *TORCHRUN, *command, "--steps", steps)
    assert first_steps(resumed) == [step]
    assert min(losses(resumed)) > step
    end, numbers = load(path)
    assert end == max(losses(resumed)) == steps

    peace = tmp_path / "peace"
    command = EXAMPLE, *options, "--checkpoint", peace / "checkpoint", "--steps", steps
    output = run(peace, *TORCHRUN, *command)
    assert first_steps(output) == [0]
    found = losses(output)
    assert found[max(found)] < found[min(found)] - 0.3, found
    end, want = load(peace / "checkpoint")
    assert end == steps
    assert numbers.keys() == want.keys()
    for name, value in numbers.items():
        assert_same_bits(name, value.numpy(), want[name].numpy(), context=f"{steps} steps")


def test_the_example_runs_in_one_process(tmp_path, options):
    found = losses(run(tmp_path / "job", sys.executable, EXAMPLE, *options, "--steps", 10))
    assert list(found) == [5, 10]
    assert found[10] < 9
