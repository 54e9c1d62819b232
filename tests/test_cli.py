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
    assert "\n30 steps done in 0:0" in shown
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
    assert code == 0 and "resumed at step 30" in shown
    assert "\n45 steps done, 15 of them in this session, in 0:0" in shown
    # Already there: nothing is trained, all is shown.
    before = arrays_of(tmp_path / "a")
    code, shown, _ = run("train", "--resume", "--out", tmp_path / "a")
    assert code == 0 and "45 steps done" in shown and "held-out" in shown
    assert arrays_of(tmp_path / "a") == before


def test_resuming_at_step_0_says_so(run, text, tmp_path):
    checkpoint_of_step_0(run, text, tmp_path / "out")
    code, shown, _ = run("train", "--resume", "--out", tmp_path / "out")
    assert code == 0 and "resumed at step 0\n" in shown and "\n30 steps done in 0:0" in shown


def test_the_help_says_when_a_checkpoint_is_written(run):
    code, shown, _ = run("train", "--help")
    assert code == 0
    assert "written every 30 seconds, at the end, and when Ctrl-C" in " ".join(shown.split())


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


def test_no_command_lists_the_commands(run):
    code, shown, complaints = run()
    assert (code, shown) == (2, "")
    assert all(
        f"\n    {command} " in complaints for command in ("train", "sample", "bench", "info")
    )


@pytest.mark.parametrize("how", ["in a folder", "here", "by its name", "by python", "called"])
def test_the_commands_it_prints_work_as_they_are_printed(run, text, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "rnnfast"
    main = "from rnnfast.cli import main"
    script.write_text(f"#!{sys.executable}\nimport sys\n{main}\nsys.exit(main())\n")
    script.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    if how == "here":
        monkeypatch.chdir(folder)
    elif how == "by its name":
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    program, printed = {
        "in a folder": ([script], "bin/rnnfast"),
        "here": (["./rnnfast"], "./rnnfast"),
        "by its name": (["rnnfast"], "rnnfast"),
        "by python": (["bin/python", "-m", "rnnfast"], "bin/python -m rnnfast"),
        "called": ([sys.executable, "-c", f"{main}; main()"], "rnnfast"),
    }[how]
    # Through a link, an interpreter does not find the packages beside it.
    packages = [os.path.dirname(os.path.dirname(module.__file__)) for module in (rnnfast, np)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))
    command = [*program, "train", "--text", text, "--out", "a run", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    hint = re.search(r"a sample \(more: (.*)\):\n", done.stdout)[1]
    assert hint == f"{printed} sample 'a run'"
    if how != "called":
        again = subprocess.run(hint, shell=True, capture_output=True, text=True, timeout=60)
        assert again.returncode == 0, again.stderr


# ------------------------------------------------------------------------------ what goes wrong


def checkpoint_of_step_0(run, text, out):
    """What a run leaves that fails in its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Trainer, "advance", overflow)
        assert run(*train()(text, out))[0] == 2


def overflow(self):
    raise FloatingPointError(f"the loss overflowed at step {self.step + 1}")


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
    "text shorter than a row": (
        lambda t, o: [o.with_name("s").write_text("spam and") and "train", "--text",
                      o.with_name("s"), "--out", o],
        "the part of the text for training has 8 tokens: too short for one chunk of 32 x 64, "
        "which needs 2112 (a tenth of the text is held out); "
        "try a smaller --batch or --steps-per-chunk"),
    "short text in random order": (train("--steps-per-chunk", "9999", "--sampling", "random"),
                                   "too short"),
    "momentum of adam": (train("--momentum", "0.5"), "--momentum is for --optimizer sgd; adam"),
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
    assert code == 2 and complaints.count("\n") == 1 and "No space left on device" in complaints
    assert arrays_of(out) == before
    assert {path.name for path in out.iterdir()} == {CHECKPOINT, cli.LOG}


@pytest.mark.parametrize("option", [
    "--hidden 13", "--cell gru", "--seed 1", "--lr 0.5", "--momentum 0.9",
])  # fmt: skip
def test_resuming_keeps_the_settings(run, text, tmp_path, option):
    out = tmp_path / "out"
    assert run(*train()(text, out))[0] == 0
    before = arrays_of(out)
    code, _, complaints = run("train", "--resume", "--out", out, *option.split())
    assert code == 2 and complaints.count("\n") == 1 and option.split()[0] in complaints
    assert arrays_of(out) == before


def test_resuming_cannot_take_steps_back(run, text, tmp_path):
    out = tmp_path / "out"
    assert run(*train("--steps", 400)(text, out))[0] == 0
    code, _, complaints = run("train", "--resume", "--out", out, "--steps", 3)
    assert (code, complaints) == (2, "rnnfast: --steps 3: 400 are done already\n")
    code, _, complaints = run("train", "--resume", "--out", out, "--epochs", 1)
    assert code == 2 and re.fullmatch(
        r"rnnfast: --epochs 1, which is \d+ steps: 400 are done already\n", complaints
    )


def test_resuming_on_a_moved_text(run, text, tmp_path):
    out = tmp_path / "out"
    assert run(*train()(text, out))[0] == 0
    (tmp_path / "text").rename(tmp_path / "moved")
    code, _, complaints = run("train", "--resume", "--out", out)
    assert code == 2 and complaints == (
        f"rnnfast: {text}: No such file or directory (the run's text; --text names its new place)\n"
    )
    # A wrong new place is no place of the run's.
    code, _, complaints = run("train", "--resume", "--out", out, "--text", tmp_path / "none")
    assert code == 2 and "the run's text" not in complaints
    code, _, _ = run("train", "--resume", "--out", out, "--text", tmp_path / "moved")
    assert code == 0
    code, _, complaints = run("train", "--resume", "--out", out)  # the new place is kept
    assert (code, complaints) == (0, "")


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


def test_a_loss_that_overflows_leaves_the_last_good_checkpoint(run, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    advance = cli.Trainer.advance

    def poisoned(self):
        if self.step == 12:
            self.model.params["head.bias"][1] = np.inf
        return advance(self)

    monkeypatch.setattr(cli.Trainer, "advance", poisoned)
    monkeypatch.setattr(cli, "SAVE_EVERY", -1)
    code, _, complaints = run(*train()(text, out))
    assert code == 2
    assert complaints == "rnnfast: the loss overflowed at step 13; try a smaller --lr\n"
    header, arrays = storage.read(out / CHECKPOINT)
    assert header["training"]["step"] == 12
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_sampling_from_a_run_without_a_step(run, text, tmp_path):
    out = tmp_path / "out"
    checkpoint_of_step_0(run, text, out)
    code, shown, complaints = run("sample", out)
    assert (code, shown) == (2, "")
    assert complaints.count("\n") == 1 and "no step of this run is done yet" in complaints


@pytest.mark.parametrize(("unit", "prefix", "named"), [
    ("char", "d\u00e9f \u2603\u2603", r"'\xe9', '\u2603'"), ("word", "def spam x", "'spam'"),
])  # fmt: skip
def test_what_the_model_does_not_know_of_a_prefix(run, text, tmp_path, unit, prefix, named):
    out = tmp_path / "out"
    assert run(*train("--unit", unit)(text, out))[0] == 0
    code, shown, complaints = run("sample", out, "--prefix", prefix, "--length", 3)
    assert code == 0 and shown.startswith(prefix)
    note = "rnnfast: note: the model does not know these parts of --prefix: "
    assert complaints == note + named + "\n"
    assert run("sample", out, "--prefix", "def ", "--length", 3)[2] == ""
    many = "".join(map(chr, range(0x400, 0x420)))
    complaints = run("sample", out, "--prefix", " ".join(many), "--length", 3)[2]
    assert complaints.endswith(r"'\u0409', ..." + "\n")


def test_two_runs_do_not_share_a_folder(run, text, tmp_path):
    out = tmp_path / "out"
    first = start("train", "--text", text, "--out", out, *SMALL, "--steps", 10**6)
    wait_for_steps(out, first, 0)
    # An option that is refused after a look at the lock.
    second = ["train", "--resume", "--out", out, "--hidden", 13]
    code, _, complaints = run(*second)
    assert code == 2 and complaints == f"rnnfast: {out}: another run is writing to this folder\n"
    assert run(*train()(text, out))[0] == 2
    # The lock dies with its holder, even if that could not do a thing about it.
    first.kill()
    first.communicate(timeout=60)
    assert "--hidden cannot change" in run(*second)[2]


def test_a_folder_that_another_run_has_taken_meanwhile(run, text, tmp_path, monkeypatch):
    """The second look at the folder: this run has read its text while another one came and went."""
    out = tmp_path / "out"
    text_file = cli.text_file

    def slow(path):
        monkeypatch.setattr(cli, "text_file", text_file)
        assert run(*train()(text, out))[0] == 0
        return text_file(path)

    monkeypatch.setattr(cli, "text_file", slow)
    code, _, complaints = run(*train()(text, out))
    assert code == 2 and "not an empty folder" in complaints
    assert (out / cli.LOG).read_text().count("settings") == 1


# ------------------------------------------------------------------------ signals and terminals


def wait_for_steps(out, process, looks=1):
    """Waits until a run has begun and looked so many times at its held-out text."""
    log = out / cli.LOG
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > looks):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_ctrl_c_leaves_a_checkpoint_and_resuming_the_same_bits(text, tmp_path, sampling):
    options = [*SMALL, "--steps", 3000, "--text", text, "--sampling", sampling]
    whole = start("train", *options, "--out", tmp_path / "whole")
    stopped = start("train", *options, "--out", tmp_path / "stopped")
    # Past the first look at held-out text, at a tenth of the steps.
    wait_for_steps(tmp_path / "stopped", stopped)
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


@pytest.fixture
def hangs_up():
    """What is started ends with its terminal, even if these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_are_like_ctrl_c(text, tmp_path, number, hangs_up):
    out = tmp_path / "out"
    process = start("train", "--text", text, "--out", out, *SMALL, "--steps", 3000)
    wait_for_steps(out, process)
    process.send_signal(number)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = storage.read(out / CHECKPOINT)[0]["training"]["step"]
    assert 300 <= step < 3000 and f"step {step} " in complaints


def test_the_hosts_handlers_come_back_and_what_it_ignores_stays_so(run, text, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    seen = []
    advance = cli.Trainer.advance

    def watched(self):
        seen[:] = [signal.getsignal(number) for number in numbers]
        return advance(self)

    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        mine = [signal.getsignal(number) for number in numbers]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli.Trainer, "advance", watched)
            assert run(*train()(text, tmp_path / "out"))[0] == 0
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert seen[0] == seen[1] not in before and seen[2] == signal.SIG_IGN


IN_ITS_OWN_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)  # of a session without a terminal it becomes the terminal
os.execv(sys.executable, [sys.executable, "-m", "rnnfast", *sys.argv[1:]])
"""


def test_a_terminal_that_is_closed(text, tmp_path, hangs_up):
    out = tmp_path / "out"
    screen, terminal = pty.openpty()
    command = ["train", "--text", text, "--out", str(out), *SMALL, "--steps", "20000"]
    process = subprocess.Popen(
        [sys.executable, "-c", IN_ITS_OWN_TERMINAL, *command],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(terminal)
    wait_for_steps(out, process)
    os.close(screen)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert storage.read(out / CHECKPOINT)[0]["training"]["step"] >= 2000


def test_nobody_reads_the_progress(text, tmp_path):
    out = tmp_path / "out"
    process = start("train", "--text", text, "--out", out, *SMALL, "--steps", 20_000)
    process.stdout.readline()
    wait_for_steps(out, process)
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""
    process.stderr.close()
    assert storage.read(out / CHECKPOINT)[0]["training"]["step"] >= 2000


def test_nobody_reads_the_info():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rnnfast", "info"]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # all is written at the end
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=buffered, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ctrl_c_during_the_sample(run, text, tmp_path):
    assert run(*train()(text, tmp_path / "out"))[0] == 0
    writing = start("sample", tmp_path / "out", "--length", 10**9)
    assert len(writing.stdout.read(500)) == 500
    writing.send_signal(signal.SIGINT)
    _, complaints = writing.communicate(timeout=60)
    assert writing.returncode == 130 and complaints == "rnnfast: interrupted\n"


def test_ctrl_c_during_a_benchmark_keeps_its_rows(tmp_path):
    path = tmp_path / "found.json"
    running = start("bench", "--peers", "numpy", "--threads", 1, "--seconds", 0, "--json", path,
                    "--shapes", *(f"gru-i3-h5-b2-t{T}" for T in range(1, 999)))  # fmt: skip
    while not running.stderr.readline().startswith("[3/"):
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    shown, complaints = running.communicate(timeout=60)
    assert running.returncode == 130 and complaints.endswith("rnnfast: interrupted\n")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) >= 2 and all(row["shape"] in shown for row in rows)


def test_the_benchmark_has_two_names():
    shown = [
        subprocess.run([sys.executable, "-m", *name, "--help"], capture_output=True, check=True)
        for name in (["rnnfast", "bench"], ["rnnfast.bench"])
    ]
    assert shown[0].stdout == shown[1].stdout and b"--compare OLD NEW" in shown[0].stdout


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


@pytest.mark.parametrize(("columns", "there"), [
    (120, "loss perplexity tokens/s left"), (60, "loss left"), (30, ""),
])  # fmt: skip
def test_a_bar_in_a_narrow_terminal(text, tmp_path, columns, there):
    pytest.importorskip("rich")
    command = train("--steps", "3000")(text, tmp_path / "out")
    code, shown = in_a_terminal(*command, COLUMNS=str(columns))
    bars = [line for line in re.split(r"[\r\n]|\x1b\[2K", shown) if "3000/3000" in line]
    bar = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bars[-1])
    assert code == 0 and len(bar) <= columns
    assert all(word in bar for word in there.split())
    assert ("perplexity" in bar) == (columns == 120)


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
