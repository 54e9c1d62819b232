"""The command line: rnnfast train | sample | bench | info.

Knows options, terminals, signals and exit codes. Leaves training to `rnnfast.learn`, measuring and
its options to `rnnfast.bench`. Whatever a
user can get wrong ends in one line on stderr and exit code 2; Ctrl-C, SIGTERM and SIGHUP leave a
checkpoint and end in 128 + the signal's number (Ctrl-C: 130).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import rnnfast

from .learn import (
    Corpus,
    DataError,
    LanguageModel,
    Settings,
    Trainer,
    Vocabulary,
    one_blas_thread,
    perplexity,
    read_settings,
    standard_library,
    text_file,
)
from .learn.batches import SAMPLINGS
from .learn.language_model import CELLS
from .learn.optimizers import OPTIMIZERS
from .learn.vocabulary import UNITS
from .storage import DamagedFileError, read

CHECKPOINT = "checkpoint.npz"
LOG = "log.jsonl"
DEFAULT_OUT = "rnnfast-run"
LEARNING_RATES = {"adam": 4e-3, "sgd": 0.5}
RARE = 100_000  # by default, what makes up less than one in so many characters is unknown
SAVE_EVERY = 30.0  # seconds
PLAIN_LINE_EVERY = 5.0  # seconds
CHECKS = 10  # looks at a part of the held-out text, spread over the run
CHECK_TOKENS = 65_536
SAMPLE_LENGTH = 400
NAMED_AT_MOST = 10  # tokens in a message
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    That is 0, 1 (failed), 2 (cannot be done), or 128 + the number of the signal that ended it.

    >>> main(["sample", "no-such-folder"])
    2
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if "command" not in args:
        parser.print_help(sys.stderr)
        return 2
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # a text may hold what the terminal cannot show
    try:
        with one_blas_thread():
            code = args.command(args)
            sys.stdout.flush()  # here, where a reader that has gone is expected
            return code
    except BrokenPipeError:
        # Whoever read our output has gone, as in `rnnfast sample run | head`.
        _drop_output()
        return 1
    except (DataError, DamagedFileError) as error:
        return _complain(str(error), 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror or error}", 2)
    except FloatingPointError as error:
        return _complain(f"{error}; try a smaller --lr", 2)
    except MemoryError:
        return _complain("not enough memory; try a smaller --hidden or --batch", 1)
    except KeyboardInterrupt as stop:
        return _complain("interrupted", 128 + (stop.args[0] if stop.args else signal.SIGINT))


def _complain(message: str, code: int) -> int:
    try:
        print(f"rnnfast: {' '.join(message.split())}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # the terminal may have gone, and Python would fail on it at the end again
        _drop_output()
    return code


def _drop_output() -> None:
    """From now on nothing is shown: nobody is there to read it, and writing would only fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _program() -> str:
    """What to type at a prompt, in the current folder, to start this program once more."""
    called = sys.argv[0]
    if os.path.realpath(called) == os.path.realpath(Path(__file__).with_name("__main__.py")):
        return f"{_typed(sys.orig_argv[0])} -m rnnfast"
    # Else `main` was called from within another program.
    return _typed(called) if os.path.basename(called) == "rnnfast" else "rnnfast"


def _typed(program: str) -> str:
    """A program as it is typed: by its name if that finds it, else by the shortest path to it."""
    name = os.path.basename(program)
    if program == name or shutil.which(name) == os.path.abspath(program):
        return shlex.quote(name)
    relative = os.path.relpath(program)
    if os.sep not in relative:
        relative = os.path.join(os.curdir, relative)
    return shlex.quote(min(program, relative, key=len))


# ------------------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rnnfast", description="Fast recurrent networks on CPUs.")
    parser.add_argument("--version", action="version", version=f"rnnfast {rnnfast.__version__}")
    commands = parser.add_subparsers(metavar="command")
    _add_train(commands)
    _add_sample(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="show the version, the CPU's kernels and the threads")
    info.set_defaults(command=_info)
    return parser


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a language model on text",
        description="Trains a recurrent language model on text, by default on the sources of "
        "Python's standard library, and shows how well it foretells text it has not seen.",
    )
    train.set_defaults(command=_train)
    usual = Settings()
    add = train.add_argument
    add("--text", metavar="FILE", help="UTF-8 text to train on; its last tenth is held out")
    add("--unit", choices=UNITS, help=f"what a token is (default: {usual.unit})")
    add(
        "--min-count",
        type=_positive,
        metavar="N",
        help=f"rarer tokens are unknown (default: one in {RARE:,} characters)",
    )
    add("--cell", choices=CELLS, help=f"kind of layer (default: {usual.cell})")
    add("--hidden", type=_positive, metavar="H", help=f"units of a layer (default: {usual.hidden})")
    add("--layers", type=_positive, metavar="L", help=f"stacked (default: {usual.layers})")
    add(
        "--embedding",
        type=_natural,
        metavar="E",
        help=f"size of a token's vector, 0 for one-hot (default: {usual.embedding})",
    )
    add("--batch", type=_positive, metavar="B", help=f"rows side by side (default: {usual.batch})")
    add(
        "--steps-per-chunk",
        type=_positive,
        metavar="T",
        help=f"how far gradients go back in time (default: {usual.steps_per_chunk})",
    )
    add(
        "--sampling",
        choices=SAMPLINGS,
        help=f"how the text is cut into batches (default: {usual.sampling})",
    )
    add("--optimizer", choices=OPTIMIZERS, help=f"kind of step (default: {usual.optimizer})")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=_positive_number, help=f"highest learning rate (default: {rates})")
    add("--momentum", type=_share, help=f"of sgd alone (default: {usual.momentum})")
    add(
        "--clip",
        type=_positive_number,
        help=f"largest norm of the gradients (default: {usual.clip})",
    )
    length = train.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive, metavar="N", help="times through the text")
    length.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help=f"steps of the optimiser (default: {usual.steps})",
    )
    add("--seed", type=_natural, help=f"of all that is random (default: {usual.seed})")
    add("--threads", type=_threads, help="at most (default: as many as there are cores)")
    add(
        "--out", metavar="DIR", default=DEFAULT_OUT, help="folder of the run (default: %(default)s)"
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out from its checkpoint, which is written every "
        f"{SAVE_EVERY:g} seconds, at the end, and when Ctrl-C, SIGTERM or SIGHUP stops the run",
    )


def _add_bench(commands) -> None:
    try:
        from .bench.suite import add_arguments
    except ModuleNotFoundError:  # a folder of sources: `bench` has its place there when installed
        return

    bench = commands.add_parser(
        "bench",
        help="measure this library beside others and the machine",
        description="Checks this library, and those others that are installed, against a plain "
        "reference, then times them in turns and shows what came out.",
    )
    bench.set_defaults(command=_bench)
    add_arguments(bench)


def _add_sample(commands) -> None:
    sample = commands.add_parser("sample", help="let a trained model write")
    sample.set_defaults(command=_sample)
    add = sample.add_argument
    add("model", metavar="DIR", help="folder of a run, or a file of LanguageModel.save")
    add("--prefix", default="", metavar="TEXT", help="what the model is to go on from")
    add("--length", type=_natural, default=SAMPLE_LENGTH, help="tokens (default: %(default)s)")
    add(
        "--temperature",
        type=_temperature,
        default=0.7,
        help="0 always takes the likeliest token, 1 draws as the model says (default: %(default)s)",
    )
    add("--seed", type=_natural, help="of the draws (default: another one each time)")


def _number(kind: type, text: str, low: float, high: float, needed: str):
    """`text` as a number in [low, high], or argparse's error."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {needed}, got {text!r}")
    return value


def _positive(text: str) -> int:
    return _number(int, text, 1, 2**31 - 1, "an integer of at least 1")


def _natural(text: str) -> int:
    return _number(int, text, 0, 2**63 - 1, "an integer of at least 0")


def _threads(text: str) -> int:
    return _number(int, text, 1, 256, "an integer in 1..256")


def _positive_number(text: str) -> float:
    return _number(float, text, 1e-30, 1e30, "a number above 0")


def _temperature(text: str) -> float:
    return _number(float, text, 0, 1e30, "a number of at least 0")


def _share(text: str) -> float:
    return _number(float, text, 0, 1 - 1e-9, "a number of at least 0 and below 1")


# --------------------------------------------------------------------------------------- train


def _train(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if args.threads is not None:
        rnnfast.set_num_threads(args.threads)
    with contextlib.ExitStack() as held:
        prepare = _resumed if args.resume else _started
        trainer, corpus = prepare(args, out, held)
        _introduce(trainer, corpus, out, args.resume)
        began, first = time.monotonic(), trainer.step
        stopped_by = _run(trainer, out)
        if stopped_by:
            command = f"{_program()} train --resume --out {shlex.quote(args.out)}"
            message = f"interrupted; go on from step {trainer.step} with: {command}"
            return _complain(message, 128 + stopped_by)
        loss = trainer.evaluate()
        here = f", {trainer.step - first} of them in this session," if first else ""
        print(f"{trainer.step} steps done{here} in {_clock(time.monotonic() - began)}")
        if math.isfinite(loss):
            print(f"all held-out text: {_quality(loss, trainer.settings.unit)}")
        _log(out, {"step": trainer.step, "held_out": loss})
    prefix = "\n" if trainer.settings.text else "def "
    print(f"\na sample (more: {_program()} sample {shlex.quote(args.out)}):\n")
    _write(trainer.model, prefix, SAMPLE_LENGTH, 0.7, trainer.settings.seed)
    return 0


def _started(
    args: argparse.Namespace, out: Path, held: contextlib.ExitStack
) -> tuple[Trainer, Corpus]:
    """A new run; its folder stays locked as long as `held` lasts."""
    _must_be_empty(out)
    _must_fit(args, args.optimizer or Settings.optimizer)
    corpus = _corpus(args.text)
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Settings)
        if getattr(args, field.name) is not None
    }
    usual = {
        "lr": LEARNING_RATES[args.optimizer or Settings.optimizer],
        "min_count": 1 + len(corpus.train) // RARE,
    }
    text = {"text": "" if args.text is None else os.path.abspath(args.text)}
    settings = Settings(**usual | given | text)
    try:
        trainer = Trainer(settings, corpus)
    except DataError as error:
        hint = "(a tenth of the text is held out); try a smaller --batch or --steps-per-chunk"
        raise DataError(f"{error} {hint}") from None
    trainer.train_for(epochs=args.epochs)
    out.mkdir(parents=True, exist_ok=True)
    held.enter_context(_locked(out))
    _must_be_empty(out)  # another run may have come and gone since
    return trainer, corpus


def _resumed(
    args: argparse.Namespace, out: Path, held: contextlib.ExitStack
) -> tuple[Trainer, Corpus]:
    """The run in a folder, which stays locked as long as `held` lasts."""
    path = out / CHECKPOINT
    if not path.exists():
        raise DataError(f"{path}: there is nothing to resume")
    held.enter_context(_locked(out))
    settings = read_settings(path)
    for field in dataclasses.fields(Settings):
        given, kept = getattr(args, field.name), getattr(settings, field.name)
        if field.name not in ("text", "steps") and given is not None and given != kept:
            option = "--" + field.name.replace("_", "-")
            raise DataError(f"{option} cannot change on --resume: it was {kept}, now {given}")
    _must_fit(args, settings.optimizer)
    try:
        corpus = _corpus(settings.text or None if args.text is None else args.text)
    except OSError as error:
        if args.text is None and settings.text:
            hint = "(the run's text; --text names its new place)"
            raise DataError(f"{settings.text}: {error.strerror} {hint}") from None
        raise
    trainer = Trainer.resume(path, corpus)
    if args.text is not None:
        trainer.settings = dataclasses.replace(trainer.settings, text=os.path.abspath(args.text))
    trainer.train_for(steps=args.steps, epochs=args.epochs)
    if trainer.settings.steps < trainer.step:
        asked = (
            f"--steps {args.steps}"
            if args.epochs is None
            else f"--epochs {args.epochs}, which is {trainer.settings.steps} steps"
        )
        raise DataError(f"{asked}: {trainer.step} are done already")
    return trainer, corpus


def _must_be_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not an empty folder; take another --out, or --resume the run")


def _must_fit(args: argparse.Namespace, optimizer: str) -> None:
    """Raises DataError for an option that would be without effect."""
    if args.momentum is not None and optimizer != "sgd":
        raise DataError(f"--momentum is for --optimizer sgd; {optimizer} has none")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the system ends that when this process ends, however.

    The folder itself is locked, so that nothing is left in it. A file system that cannot lock
    folders (NFS) leaves two runs at once to their user.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataError(f"{folder}: another run is writing to this folder") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _corpus(path: str | None) -> Corpus:
    return standard_library() if path is None else text_file(path)


def _introduce(trainer: Trainer, corpus: Corpus, out: Path, resumed: bool) -> None:
    settings, model = trainer.settings, trainer.model
    text = settings.text or f"{corpus.files} files of Python's standard library"
    numbers = sum(param.size for param in model.params.values())
    print(f"text       {text}")
    print(
        f"           {len(corpus.train):,} characters to learn from, {len(corpus.held_out):,} "
        f"held out, manifest {corpus.manifest[:16]}"
    )
    print(
        f"model      {settings.cell}, {settings.layers} x {settings.hidden} units, "
        f"{len(model.vocabulary)} tokens, {numbers:,} parameters"
    )
    print(
        f"training   {settings.steps} steps of {settings.batch} x {settings.steps_per_chunk} "
        f"tokens, {settings.sampling}, {settings.optimizer}, lr {settings.lr:g}, "
        f"seed {settings.seed}"
    )
    print(f"engine     {rnnfast.isa()}, {rnnfast.get_num_threads()} threads")
    place = f"{out}, resumed at step {trainer.step}" if resumed else out
    print(f"out        {place}", flush=True)


def _run(trainer: Trainer, out: Path) -> int:
    """Trains until all is done (0) or a signal stops it (its number); leaves a checkpoint."""
    with _interruptions() as stopped_by:
        # Before the first step, so that a folder that cannot be written is known at once.
        trainer.save(out / CHECKPOINT)
        _log(
            out,
            {
                "settings": dataclasses.asdict(trainer.settings),
                "manifest": trainer.manifest,
                "step": trainer.step,
                "rnnfast": rnnfast.__version__,
            },
        )
        try:
            _advance(trainer, out, stopped_by)
        except OSError:
            # Whoever was shown the progress has gone, say, between two steps.
            trainer.save(out / CHECKPOINT)
            if not stopped_by:
                raise
            _drop_output()
        else:
            trainer.save(out / CHECKPOINT)
    return stopped_by[0] if stopped_by else 0


def _advance(trainer: Trainer, out: Path, stopped_by: list[int]) -> None:
    """Trains until all is done or `stopped_by` is filled, and shows how far it is."""
    check_every = max(1, trainer.settings.steps // CHECKS)
    saved = time.monotonic()
    mean, seen = 0.0, 0
    with _progress(trainer) as show:
        while not (trainer.done or stopped_by):
            loss = trainer.advance()
            # A running mean over about the last 50 steps: single batches differ too much to read.
            seen += 1
            mean += (loss - mean) / min(seen, 50)
            show(mean)
            if trainer.step % check_every == 0 and not trainer.done:
                held_out = trainer.evaluate(CHECK_TOKENS)
                _log(out, {"step": trainer.step, "loss": mean, "held_out_part": held_out})
                if math.isfinite(held_out):
                    quality = _quality(held_out, trainer.settings.unit)
                    show.line(f"step {trainer.step}: a part of the held-out text: {quality}")
            if time.monotonic() - saved > SAVE_EVERY:
                trainer.save(out / CHECKPOINT)
                saved = time.monotonic()


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """A list that is empty until one of `STOP_SIGNALS` comes; a second one interrupts as usual.

    A step must not be left half done, so the loop ends itself when it sees the list filled. A
    signal that is ignored here stays so, as under nohup.
    """
    came: list[int] = []

    def handle(number: int, frame) -> None:
        if came:
            raise KeyboardInterrupt(number)
        came.append(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [number for number in STOP_SIGNALS if before[number] != signal.SIG_IGN]
    try:
        for number in handled:
            signal.signal(number, handle)
        yield came
    finally:
        for number in handled:
            signal.signal(number, before[number])


def _quality(loss: float, unit: str) -> str:
    bits = f", {loss / math.log(2):.4f} bits per character" if unit == "char" else ""
    return f"perplexity {perplexity(loss):.4f}{bits}"


def _log(out: Path, record: dict) -> None:
    with open(out / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------ progress


class _PlainProgress:
    """How far a run is, as plain lines now and then."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.first = trainer.step
        self.began = self.shown = time.monotonic()

    def __enter__(self) -> _PlainProgress:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __call__(self, loss: float) -> None:
        """To be called after each step."""
        now = time.monotonic()
        if now - self.shown >= PLAIN_LINE_EVERY or self.trainer.done:
            self.shown = now
            total = self.trainer.settings.steps
            self.line(f"step {self.trainer.step}/{total}: {', '.join(self.figures(loss))}")

    def figures(self, loss: float) -> list[str]:
        """Loss, perplexity, speed and time left."""
        seconds = time.monotonic() - self.began
        done = self.trainer.step - self.first
        left = seconds / done * (self.trainer.settings.steps - self.trainer.step)
        speed = done * self.trainer.tokens_per_step / seconds
        return [
            f"loss {loss:.4f}",
            f"perplexity {perplexity(loss):.3f}",
            f"{speed:,.0f} tokens/s",
            f"{_clock(left)} left",
        ]

    def line(self, text: str) -> None:
        print(text, flush=True)


class _RichProgress(_PlainProgress):
    """How far a run is, as a bar that stays at the bottom of the terminal."""

    BAR = 10  # columns

    def __init__(self, trainer: Trainer) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(trainer)
        figures = TextColumn("{task.description}")
        self.bar = Progress(BarColumn(self.BAR), MofNCompleteColumn(), figures)
        self.task = self.bar.add_task("", total=trainer.settings.steps, completed=trainer.step)

    def __enter__(self) -> _RichProgress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def __call__(self, loss: float) -> None:
        step, total = self.trainer.step, self.trainer.settings.steps
        # Between bar, count of steps and figures there is one column each.
        room = self.bar.console.width - self.BAR - len(f" {total}/{total} ")
        figures = self.figures(loss)
        while len(", ".join(figures)) > room and figures:
            del figures[min(1, len(figures) - 1)]  # perplexity first: the loss says the same
        self.bar.update(self.task, completed=step, description=", ".join(figures))

    def line(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False)


def _progress(trainer: Trainer) -> _PlainProgress:
    """A bar if there is a terminal to draw it on and `rich` to do it, else plain lines."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(ImportError):
            return _RichProgress(trainer)
    return _PlainProgress(trainer)


# ---------------------------------------------------------------------------------------- sample


def _sample(args: argparse.Namespace) -> int:
    path = Path(args.model)
    path = path / CHECKPOINT if path.is_dir() else path
    header, arrays = read(path)
    model = LanguageModel.from_file(path, header, arrays)
    training = header.get("training")
    if isinstance(training, dict) and training.get("step") == 0:
        raise DataError(f"{path}: no step of this run is done yet, so there is nothing to sample")
    _note_unknown(model.vocabulary, args.prefix)
    _write(model, args.prefix, args.length, args.temperature, args.seed)
    return 0


def _note_unknown(vocabulary: Vocabulary, prefix: str) -> None:
    """Says on stderr what in a prefix a model cannot know."""
    unknown = vocabulary.unknown_in(prefix)
    if unknown:
        named = ", ".join(map(ascii, unknown[:NAMED_AT_MOST]))
        more = ", ..." if len(unknown) > NAMED_AT_MOST else ""
        _complain(f"note: the model does not know these parts of --prefix: {named}{more}", 0)


def _write(
    model: LanguageModel, prefix: str, length: int, temperature: float, seed: int | None
) -> None:
    """Prints text as it is generated."""
    print(prefix, end="", flush=True)
    written = model.generate(prefix, temperature, seed)
    for _ in range(length):
        print(next(written), end="", flush=True)
    print()


# ----------------------------------------------------------------------------- bench and info


def _bench(args: argparse.Namespace) -> int:
    from .bench import suite

    try:
        return suite.run(args)
    except ValueError as error:
        return _complain(str(error), 2)


def _info(args: argparse.Namespace) -> int:
    rnnfast.show_config()
    return 0
