"""Tests of the command line: what it prints, what it leaves behind, its exit codes.

Knows `rnnfast.cli` from inside and, where signals matter, as a process of its own.
"""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import rnnfast
from rnnfast import cli, storage
from rnnfast.learn import LanguageModel

TEXT = "".join(f"def f{k}(x):\n    return {k} * x + {k * k % 97}\n\n" for k in range(120))
SMALL = "--hidden 12 --embedding 6 --batch 3 --steps-per-chunk 7 --steps 30".split()
CHECKPOINT = cli.CHECKPOINT


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs one command line; returns its exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own
            code = end.code
        return code, *capsys.readouterr()

    return run


def arrays_of(folder):
    """All arrays of a checkpoint, as bytes."""
    return {name: a.tobytes() for name, a in storage.read(folder / CHECKPOINT)[1].items()}


def start(*arguments, **options):
    """The command line as a process of its own."""
    command = [sys.executable, "-u", "-m", "rnnfast", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# --------------------------------------------------------------------------------- train, sample


def test_a_run_from_text_to_sample(run, text, tmp_path):
    out = tmp_path / "out"
    handler = signal.getsignal(signal.SIGINT)
    code, shown, complaints = run("train", "--text", text, "--out", out, *SMALL)
    assert (code, complaints) == (0, "")
    assert signal.getsignal(signal.SIGINT) is handler
    assert f"{len(TEXT) - len(TEXT) // 10:,} characters" in shown
    assert re.search(r"manifest [0-9a-f]{16}", shown)
    assert re.search(r"step 30/30: loss \d\.\d+, perplexity [\d.]+, [\d,]+ tokens/s, 0:00", shown)
    assert re.search(r"all held-out text: perplexity \d+\.\d+, \d\.\d+ bits per character", shown)
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, cli.LOG}

    log = [json.loads(line) for line in (out / cli.LOG).read_text().splitlines()]
    assert len(log[0]["manifest"]) == 64 and log[0]["settings"]["hidden"] == 12
    assert [record["step"] for record in log] == [0, *range(3, 30, 3), 30]
    assert log[-1]["held_out"] < log[1]["held_out_part"]

    model = LanguageModel.load(out / CHECKPOINT)
    assert model.sample("\n", cli.SAMPLE_LENGTH, 0.7, seed=0) in shown
    code, written, _ = run("sample", out, "--prefix", "def ", "--length", 50, "--seed", 3)
    assert code == 0 and written == model.sample("def ", 50, 0.7, seed=3) + "\n"
    _, again, _ = run("sample", out / CHECKPOINT, "--prefix", "def ", "--length", 50, "--seed", 3)
    assert again == written
    one, two = (run("sample", out, "--temperature", 0, "--length", 30) for _ in range(2))
    assert one == two
    one, two = (run("sample", out, "--temperature", 2, "--length", 90) for _ in range(2))
    assert one != two


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_more_steps_after_the_end(run, text, tmp_path, sampling):
    options = ["--text", text, *SMALL, "--sampling", sampling, "--lr", "0.01"]
    assert run("train", *options, "--out", tmp_path / "a")[0] == 0
    assert storage.read(tmp_path / "a" / CHECKPOINT)[0]["training"]["step"] == 30
    code, shown, _ = run("train", "--resume", "--out", tmp_path / "a", "--steps", 45)
    assert code == 0 and "resumed at step 30" in shown and "45 steps done" in shown
    # Already there: nothing is trained, all is shown.
    before = arrays_of(tmp_path / "a")
    code, shown, _ = run("train", "--resume", "--out", tmp_path / "a")
    assert code == 0 and "45 steps done" in shown and "held-out" in shown
    assert arrays_of(tmp_path / "a") == before


@pytest.mark.parametrize("options", [
    "--cell rnn --optimizer sgd", "--cell gru --layers 2 --embedding 0", "--unit word --clip 0.1",
    "--cell lstm --momentum 0.5 --optimizer sgd --lr 0.1 --seed 5 --threads 1 --min-count 3",
])  # fmt: skip
def test_options_reach_the_run(run, text, tmp_path, options):
    threads = rnnfast.get_num_threads()
    out = tmp_path / "out"
    try:
        code, _, complaints = run("train", "--text", text, "--out", out, *SMALL, *options.split())
        assert rnnfast.get_num_threads() == (1 if "--threads" in options else threads)
    finally:
        rnnfast.set_num_threads(threads)
    assert (code, complaints) == (0, "")
    settings = storage.read(out / CHECKPOINT)[0]["training"]["settings"]
    words = options.split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option != "--threads":
            assert str(settings[option[2:].replace("-", "_")]) == value


def test_epochs_are_times_through_the_text(run, text, tmp_path):
    options = [option for option in SMALL if option not in ("--steps", "30")]
    code, _, _ = run("train", "--text", text, "--out", tmp_path / "o", *options, "--epochs", 2)
    settings = storage.read(tmp_path / "o" / CHECKPOINT)[0]["training"]["settings"]
    rows = (len(TEXT) - len(TEXT) // 10 - 7) // 3
    assert code == 0 and settings["steps"] == 2 * (rows // 7)


def test_info_and_version(run):
    code, shown, _ = run("info")
    assert code == 0 and rnnfast.__version__ in shown and rnnfast.isa() in shown
    code, shown, _ = run("--version")
    assert code == 0 and shown == f"rnnfast {rnnfast.__version__}\n"


# ------------------------------------------------------------------------------ what goes wrong


def train(*options):
    return lambda text, out: ["train", "--text", text, "--out", out, *SMALL, *options]


def make_folder(out, **files):
    out.mkdir()
    for name, content in files.items():
        (out / name.replace("_", ".")).write_bytes(content)


BAD = {
    "missing text": (lambda t, o: ["train", "--text", t + "x", "--out", o], "No such file"),
    "text is a folder": (lambda t, o: ["train", "--text", o.parent, "--out", o], "directory"),
    "no name of a text": (lambda t, o: ["train", "--text", "", "--out", o], ""),
    "empty text": (lambda t, o: ["train", "--text", os.devnull, "--out", o], "empty"),
    "text of one chunk less a token": (train("--batch", "747"), "too short"),
    "text in Latin-1": (
        lambda t, o: [o.with_name("latin").write_bytes(b"\xe9") and "train", "--text",
                      o.with_name("latin"), "--out", o], "UTF-8"),
    "out is not empty": (
        lambda t, o: make_folder(o, a=b"") or train()(t, o), "--resume"),
    "out is a file": (lambda t, o: train()(t, t), "not an empty folder"),
    "out is below a file": (lambda t, o: train()(t, t + "/deep/er"), "Not a directory"),
    "nothing to resume": (train("--resume"), "nothing to resume"),
    "damaged checkpoint": (
        lambda t, o: make_folder(o, checkpoint_npz=b"PK" * 99) or train("--resume")(t, o),
        "readable .npz"),
    "empty checkpoint": (
        lambda t, o: make_folder(o, checkpoint_npz=b"") or train("--resume")(t, o),
        "readable .npz"),
    "sample from nothing": (lambda t, o: ["sample", o], "No such file"),
    "sample from an empty folder": (lambda t, o: make_folder(o) or ["sample", o], "No such file"),
    "sample from a text": (lambda t, o: ["sample", t], "readable .npz"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_line_and_code_2(run, text, tmp_path, case):
    arguments, message = BAD[case]
    out = tmp_path / "out"
    arguments = arguments(text, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, complaints = run(*arguments)
    assert code == 2
    assert complaints.count("\n") == 1 and complaints.startswith("rnnfast: ")
    assert message in complaints
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", [
    "--hidden 0", "--hidden -1", "--hidden x", "--layers 0", "--batch 1.5", "--steps-per-chunk 0",
    "--lr 0", "--lr nan", "--lr -1", "--clip 0", "--clip inf", "--steps 0", "--epochs 0",
    "--seed -1", "--seed 99999999999999999999", "--threads 0", "--threads 257", "--cell tree",
    "--sampling none", "--optimizer newton", "--momentum 1", "--unit byte", "--min-count 0",
    "--embedding -1", "--steps 1 --epochs 1", "--none 1",
])  # fmt: skip
def test_wrong_options_are_named(run, text, tmp_path, option):
    options = [word for word in SMALL if word not in ("--steps", "30")]
    code, _, complaints = run(
        "train", "--text", text, "--out", tmp_path / "out", *options, *option.split()
    )
    assert code == 2 and not (tmp_path / "out").exists()
    assert option.split()[0] in complaints.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(run, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    code, _, complaints = run(*train()(text, out))
    assert code == 2 and complaints.count("\n") == 1 and "Permission denied" in complaints


def test_a_full_disk_loses_nothing(run, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(*train()(text, out))[0] == 0
    before = arrays_of(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, complaints = run("train", "--resume", "--out", out, "--steps", 40)
    assert code == 2 and complaints == "rnnfast: No space left on device\n"
    assert arrays_of(out) == before
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, cli.LOG}


@pytest.mark.parametrize("option", ["--hidden 13", "--cell gru", "--seed 1", "--lr 0.5"])
def test_resuming_keeps_the_settings(run, text, tmp_path, option):
    out = tmp_path / "out"
    assert run(*train()(text, out))[0] == 0
    before = arrays_of(out)
    code, _, complaints = run("train", "--resume", "--out", out, *option.split())
    assert code == 2 and complaints.count("\n") == 1 and option.split()[0] in complaints
    assert arrays_of(out) == before


def test_resuming_on_another_text(run, text, tmp_path):
    out = tmp_path / "out"
    assert run(*train()(text, out))[0] == 0
    (tmp_path / "text").write_text(TEXT + "\n")
    code, _, complaints = run("train", "--resume", "--out", out, "--steps", 40)
    assert code == 2 and "another text" in complaints
    # The same text elsewhere is welcome.
    (tmp_path / "moved").write_text(TEXT)
    code, _, _ = run("train", "--resume", "--out", out, "--steps", 40, "--text", tmp_path / "moved")
    assert code == 0


def test_a_loss_that_explodes(run, text, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def explode(self):
        raise FloatingPointError("the loss is nan at step 1")

    monkeypatch.setattr(cli.Trainer, "advance", explode)
    code, _, complaints = run(*train()(text, out))
    assert code == 1 and complaints == "rnnfast: the loss is nan at step 1; try a lower --lr\n"
    assert LanguageModel.load(out / CHECKPOINT)


# ------------------------------------------------------------------------ signals and terminals


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_ctrl_c_leaves_a_checkpoint_and_resuming_the_same_bits(text, tmp_path, sampling):
    options = [*SMALL, "--steps", 3000, "--text", text, "--sampling", sampling]
    whole = start("train", *options, "--out", tmp_path / "whole")
    stopped = start("train", *options, "--out", tmp_path / "stopped")
    log = tmp_path / "stopped" / cli.LOG
    end = time.monotonic() + 60
    # Past the first look at held-out text, at a tenth of the steps.
    while not (log.exists() and log.read_text().count("\n") > 1) and time.monotonic() < end:
        time.sleep(0.001)
    stopped.send_signal(signal.SIGINT)
    _, complaints = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert complaints.count("\n") == 1 and "--resume --out" in complaints
    step = storage.read(tmp_path / "stopped" / CHECKPOINT)[0]["training"]["step"]
    assert 300 <= step < 3000 and f"step {step} " in complaints

    assert whole.wait(60) == 0, whole.stderr.read()
    resumed = start("train", "--resume", "--out", tmp_path / "stopped")
    assert resumed.wait(60) == 0, resumed.stderr.read()
    assert arrays_of(tmp_path / "stopped") == arrays_of(tmp_path / "whole")
    final = [path.communicate()[0].split("all held-out text")[1].split("\n")[0]
             for path in (whole, resumed)]  # fmt: skip
    assert final[0] == final[1]


def test_ctrl_c_during_the_sample(run, text, tmp_path):
    assert run(*train()(text, tmp_path / "out"))[0] == 0
    writing = start("sample", tmp_path / "out", "--length", 10**9)
    assert len(writing.stdout.read(500)) == 500
    writing.send_signal(signal.SIGINT)
    _, complaints = writing.communicate(timeout=60)
    assert writing.returncode == 130 and complaints == "rnnfast: interrupted\n"


def test_nobody_reads_the_sample(run, text, tmp_path):
    assert run(*train()(text, tmp_path / "out"))[0] == 0
    writing = start("sample", tmp_path / "out", "--length", 10**9)
    assert len(writing.stdout.read(500)) == 500
    writing.stdout.close()
    assert writing.wait(60) == 1 and writing.stderr.read() == ""
    writing.stderr.close()


def in_a_terminal(*arguments, **environment):
    """Exit code and all that a process wrote to a terminal of its own."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rnnfast", *map(str, arguments)],
        stdin=terminal, stdout=terminal, stderr=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"} | environment,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the process has closed its end
            break
        if not piece:
            break
        shown += piece
    os.close(screen)
    return process.wait(60), shown.decode()


def test_a_bar_in_a_terminal(text, tmp_path):
    pytest.importorskip("rich")
    code, shown = in_a_terminal(*train("--steps", "300")(text, tmp_path / "out"))
    assert code == 0, shown
    assert "\x1b[" in shown and "300/300" in shown and "tokens/s" in shown
    assert "step 30: a part of the held-out text" in shown
    code, shown = in_a_terminal(*train()(text, tmp_path / "dumb"), TERM="dumb")
    assert code == 0 and "\x1b[" not in shown and "step 30/30: loss" in shown


def test_a_terminal_without_rich(text, tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError")
    code, shown = in_a_terminal(*train()(text, tmp_path / "out"), PYTHONPATH=os.pathsep.join(
        [str(tmp_path), os.environ.get("PYTHONPATH", "")]))  # fmt: skip
    assert code == 0 and "\x1b[" not in shown and "step 30/30: loss" in shown


def test_importing_the_command_line_leaves_rich_and_torch_alone():
    code = "import sys, rnnfast.cli; print([n for n in ('rich', 'torch') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_default_settings_learn_from_the_standard_library(run, tmp_path, monkeypatch):
    whole = cli.standard_library()
    # All of the held-out text would take longer than the steps.
    short = dataclasses.replace(whole, held_out=whole.held_out[:9999])
    monkeypatch.setattr(cli, "standard_library", lambda: short)
    code, shown, complaints = run("train", "--out", tmp_path / "out", "--steps", 4)
    assert (code, complaints) == (0, "")
    assert "files of Python's standard library" in shown and "lstm, 1 x 256 units" in shown
    first = float(re.search(r"loss (\d\.\d+)", shown)[1])
    assert first < np.log(110)
