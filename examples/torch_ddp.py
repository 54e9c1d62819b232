r"""Train on several processes or machines: a character model, DistributedDataParallel over gloo.

    torchrun --nproc-per-node 2 examples/torch_ddp.py --steps 200 --checkpoint run.pt
    python examples/torch_ddp.py --steps 200    # the same in one process

The model learns which byte comes next in sources of Python's own standard library. Every rank reads
files of its own, so that none has as many batches as another: DDP's `join` lets the others go on.

With --checkpoint, a job that died goes on where it last saved when the same command is given again,
or by itself with `torchrun --max-restarts 3 ...`. The latter needs the environment variable
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which torchrun of PyTorch 2.13 may hand the addresses
of dead ranks to new ones. For two machines, give

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        examples/torch_ddp.py ...

on both, where HOST is one of them. Only rank 0 reads and writes the checkpoint.
"""

import argparse
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import rnnfast.torch

LIBRARY = Path(argparse.__file__).parent
NAMES = """argparse calendar configparser csv difflib fractions heapq optparse pickle plistlib
    random shutil statistics textwrap""".split()


class Model(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256] of the byte after each."""

    def __init__(self, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.rnn = rnnfast.torch.LSTM(32, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


def start_process_group() -> tuple[int, int]:
    """This process's rank and how many there are; a machine's ranks share its cores."""
    launched = "RANK" in os.environ
    alone = dict(store=dist.HashStore(), rank=0, world_size=1)
    # A rank that dies closes its connections, which the others notice at once; the timeout is for
    # a machine or a network that falls silent.
    dist.init_process_group("gloo", timeout=timedelta(minutes=2), **({} if launched else alone))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # rnnfast takes as many threads as PyTorch.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    return dist.get_rank(), dist.get_world_size()


def of_rank_0(value):
    """What rank 0 passes, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def read_shard(files: list[Path], rank: int, ranks: int, length: int) -> torch.Tensor:
    """This rank's files as rows of bytes [rows, length + 1].

    Dealt out by falling size, so that no shard is longer than rank 0's: rank 0 takes part in every
    step, and so may save after any of them.
    """
    files = sorted(files, key=lambda path: (-path.stat().st_size, path))
    text = b"".join(path.read_bytes() for path in files[rank::ranks])
    if len(text) <= length:
        raise SystemExit(f"rank {rank}: got {len(text)} bytes of text; needs {length + 1}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, length + 1, length)


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A whole file or the one before: never half a file under this name, whoever dies when."""
    state = dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def train(options: argparse.Namespace) -> None:
    rank, ranks = start_process_group()
    rows = read_shard(options.text, rank, ranks, options.length)
    longest = of_rank_0(math.ceil(len(rows) / options.batch))  # batches in an epoch of rank 0

    torch.manual_seed(0)
    model = Model(options.hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step, path = 0, options.checkpoint
    found = rank == 0 and path and path.exists()
    saved = of_rank_0(torch.load(path, weights_only=True) if found else None)
    if saved:
        step = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    parallel = nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        print(f"{ranks} ranks of {torch.get_num_threads()} threads, from step {step}", flush=True)

    while step < options.steps:
        # Of the step alone, so that a job that goes on reads what it would have read.
        epoch, done = divmod(step, longest)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        end = min(options.steps, (epoch + 1) * longest)
        with parallel.join():  # ranks without batches answer the others until all are through
            for batch in order.split(options.batch)[done : done + end - step]:
                x, target = rows[batch, :-1], rows[batch, 1:]
                loss = nn.functional.cross_entropy(parallel(x).flatten(0, 1), target.flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                if rank == 0 and (step % options.every == 0 or step == options.steps):
                    print(f"step {step:5}: {loss.item() / math.log(2):.3f} bits a byte", flush=True)
                    if path:
                        save(path, step, model, optimizer)
        # `join` has made the parameters equal, but knows nothing of the optimizer: its moments
        # stood still where a rank had no batch.
        optimizer.load_state_dict(of_rank_0(optimizer.state_dict()))
        step = end


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="in all, those of earlier runs too")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to go on from")
    parser.add_argument("--every", type=int, default=20, help="steps from one save to the next")
    parser.add_argument("--batch", type=int, default=32, help="rows of each rank in a step")
    parser.add_argument("--length", type=int, default=64, help="bytes in a row")
    parser.add_argument("--hidden", type=int, default=128, help="units of each layer")
    files = [LIBRARY / f"{name}.py" for name in NAMES]
    help = "files to learn from, at least one for each rank"
    parser.add_argument("--text", type=Path, nargs="+", default=files, help=help)
    train(parser.parse_args())
    # After `train`, so that its DDP is gone: as the group's last owner, PyTorch 2.13's would hold
    # the interpreter's lock while it waits for gloo's threads, one of which may wait for that lock.
    dist.destroy_process_group()
