"""The benchmarks do what they say: they check before they time, and their figures are right.

Knows `rnnfast.bench` and made-up times. No figure is judged here: benchmarks decide nothing.
"""

import copy
import doctest
import importlib
import importlib.util
import io
import json
import math
import pathlib
import pkgutil
import re
import sys

import numpy as np
import pytest
import tolerances

import rnnfast.bench
from rnnfast import cli
from rnnfast.bench import (
    closed_loop,
    compare,
    figures,
    measure,
    models,
    overhead,
    report,
    suite,
    variants,
    worker,
)
from rnnfast.bench.libraries import BANDWIDTH, DROP_IN, OURS, PEAK, PEERS, library, machine, pytorch
from rnnfast.bench.shapes import CELLS, MODEL_MODES, MODES, SUITES, problem, shape_of

TINY = "lstm-i3-h5-b2-t7"
MODULES = [
    module.name for module in pkgutil.walk_packages(rnnfast.bench.__path__, "rnnfast.bench.")
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_in_docstrings(name):
    # By hand, because this folder is not where its package's name says.
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


# -------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "name",
    [
        *(shape.name for suite in SUITES.values() for shape in suite.shapes),
        *(TINY, "gru-i1-h1-b1-t1-float64", "gru-i2-h3-b4-t5-l3-bi-uneven-float64"),
    ],
)
def test_a_name_gives_its_shape(name):
    shape = shape_of(name)
    assert shape.name == name


@pytest.mark.parametrize(
    "name",
    ["", "lstm", "lstm-i0-h5-b2-t7", "elman-i3-h5-b2-t7", TINY + "-f", TINY + "-l0", TINY + "-l2-"],
)
def test_a_name_of_no_shape_is_refused(name):
    with pytest.raises(ValueError, match="shape: got"):
        shape_of(name)


def test_what_a_shape_counts():
    even, uneven = shape_of("lstm-i3-h5-b4-t8"), shape_of("lstm-i3-h5-b4-t8-uneven")
    assert sorted(uneven.lengths.tolist()) == [2, 4, 6, 8]
    assert even.operations("inference") == 2 * 8 * 4 * 4 * 5 * (3 + 5)
    assert uneven.operations("inference") == 2 * (2 + 4 + 6 + 8) * 4 * 5 * (3 + 5)
    stack = shape_of("lstm-i3-h5-b4-t8-l2-bi")  # the second layer's x has both directions' h
    assert stack.operations("training") == 3 * 2 * 8 * 4 * 2 * 4 * 5 * (3 + 5 + 10 + 5)
    assert even.bytes_read("inference") == 8 * 4 * 5 * 5 * 4
    assert even.bytes_read("stream") == 8 * 4 * 5 * (3 + 5) * 4
    assert shape_of("lstm-i3-h5-b4-t8-float64").slice_bytes(2) == 4 * 5 * 5 * 8 / 2
    assert even.operations("predict") == even.operations("inference") + 2 * 8 * 4 * 5 * 96
    assert even.operations("step") == 3 * even.operations("predict")


def test_padding_is_given_as_zeros():
    given = problem(shape_of("lstm-i3-h5-b4-t8-uneven"), 0)
    for row, length in enumerate(given.lengths):
        assert given.x[:length, row].all() and not given.x[length:, row].any()
        assert given.dy[:length, row].all() and not given.dy[length:, row].any()


def test_text_past_a_row_s_length_is_told_apart():
    given = models.text(shape_of("lstm-i3-h5-b4-t8-uneven"), 0)
    for row, length in enumerate(given.lengths):
        assert (given.targets[row, :length] >= 0).all()
        assert (given.targets[row, length:] == models.PADDING).all()
        assert not given.tokens[row, length:].any()


# --------------------------------------------------------------------------- checks before times


def test_bounds_are_those_of_the_tests():
    for dtype, bounds in measure.BOUNDS.items():
        assert bounds == tuple(tolerances.BOUNDS[dtype, what] for what in ("forward", "gradient"))


@pytest.fixture(scope="module")
def right():
    """What a worker that is just right would write for the tiny shape."""
    want = measure.expected(shape_of(TINY), "training")
    return {name: array.astype(np.float32) for name, array in want.items()}, want


def test_check_takes_what_is_right(right):
    assert measure.check(*right, "float32") < 0.1  # rounding to float32 alone


@pytest.mark.parametrize("damage", ["one element", "NaN", "shape", "dtype", "missing", "unknown"])
@pytest.mark.parametrize("name", sorted(measure.expected(shape_of(TINY), "training")))
def test_check_refuses_what_is_wrong(right, name, damage):
    got, want = dict(right[0]), right[1]
    array = got[name] = got[name].copy()
    if damage == "one element":
        # Hidden in the norm over all steps, not in its own step's.
        array.flat[0] += 3e-5 * np.linalg.norm(array[0] if name in ("y", "dx") else array)
    elif damage == "NaN":
        array.flat[-1] = np.nan
    elif damage == "shape":
        got[name] = array[None]
    elif damage == "dtype":
        got[name] = array.astype(np.float64)
    elif damage == "missing":
        del got[name]
    else:
        got["unknown"] = array
    with pytest.raises(measure.WrongResults, match=name):
        measure.check(got, want, "float32")
    if damage == "one element":
        measure.check(got, want, "float32", times=10)


def test_check_knows_steps_that_are_padding():
    want = {"y": np.array([[[1.0]], [[0.0]]])}
    assert measure.check({"y": want["y"].astype(np.float32)}, want, "float32") == 0
    with pytest.raises(measure.WrongResults, match=r"y\[1\]"):
        measure.check({"y": np.array([[[1.0]], [[1e-9]]], np.float32)}, want, "float32")


class Wrong(measure.Worker):
    """A process whose results arrive with one sign turned."""

    def results(self, *asked):
        got, told = super().results(*asked)
        got["y"][-1] *= -1
        return got, told

    def turn(self, *asked):
        pytest.fail("was timed though its results are wrong")


@pytest.mark.parametrize("mode", MODES)
def test_wrong_results_are_not_timed(mode):
    with measure.Worker(OURS, 1) as good, Wrong("numpy", 1) as wrong:
        row = measure.measure(shape_of(TINY), mode, [wrong, good], pairs=2)
    assert row["refused"]
    assert row["left_out"]["numpy"].startswith("refused: y: relative error 0.")
    assert {name: found["rounds"] for name, found in row["results"].items()} == {OURS: 2}


# ----------------------------------------------------------------------------------- libraries

PACKAGES = {"numpy": "numpy", "torch": "torch", "onnxruntime": "onnxruntime"}
PACKAGES |= {"openvino": "openvino", "jax": "jax", "tensorflow": "tensorflow"}
CANNOT = {
    "torch": r"gru_reset_before|peephole|coupled|gru_norm|rnn_\w+_norm|norm\S*-(uneven|l2)",
    "tensorflow": r"peephole|coupled|norm",
    "onnxruntime": r"training|float64|norm",
    "openvino": r"training|float64|peephole|coupled|norm",
    "jax": r"norm",
}


@pytest.fixture(scope="module")
def workers():
    """A function that gives the worker of a library, or skips the test where it is missing."""
    started = {}

    def worker_of(name):
        if name not in started:
            started[name] = measure.Worker(name, 2)
        if started[name].about is None:
            pytest.skip(f"{name}: {started[name].missing}")
        return started[name]

    yield worker_of
    for one in started.values():
        one.__exit__()


# PyTorch is named where it is missing; of the others only those that are there are asked.
ASKED = [OURS] + [n for n, p in PACKAGES.items() if n == "torch" or importlib.util.find_spec(p)]


@pytest.mark.parametrize("structure", ["", "-uneven", "-l2", "-l2-bi-uneven", "-float64"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ASKED)
def test_a_library_is_right_or_says_that_it_cannot(workers, name, cell, structure):
    shape = shape_of(f"{cell}-i3-h5-b4-t6{structure}")
    modes = [m for m in MODES if m != "stream" or not re.search("bi|uneven", structure)]
    for mode in modes:
        cannot = name in CANNOT and re.search(CANNOT[name], f"{shape.name} {mode}")
        row = measure.measure(shape, mode, [workers(name)], pairs=1)
        if cannot:
            assert row["left_out"][name].startswith("cannot: ")
        else:
            assert row["left_out"] == {}
            assert 0 <= row["error_over_bound"][name] <= 1


@pytest.mark.parametrize("structure", ["", "-l2-bi-uneven", "-float64"])
@pytest.mark.parametrize("name", ASKED)
def test_a_library_projects_or_says_that_it_cannot(workers, name, structure):
    shape = shape_of(f"lstm-i3-h5-p2-b4-t6{structure}")
    for mode in ("inference", "training"):
        row = measure.measure(shape, mode, [workers(name)], pairs=1)
        if name in (OURS, "torch", "numpy"):
            assert row["left_out"] == {} and 0 <= row["error_over_bound"][name] <= 1
        else:
            assert row["left_out"][name].startswith("cannot: ")


@pytest.mark.parametrize("structure", ["", "-uneven", "-l2", "-l2-bi-uneven", "-float64"])
@pytest.mark.parametrize("cell", sorted(pytorch.LAYERS))
@pytest.mark.parametrize("name", [DROP_IN, "torch"])
def test_a_model_is_that_of_the_reference(workers, name, cell, structure):
    shape = shape_of(f"{cell}-i3-h5-b4-t6{structure}")
    for mode in ("step", "predict"):
        row = measure.measure(shape, mode, [workers(name)], pairs=1)
        assert row["left_out"] == {}
        assert 0 <= row["error_over_bound"][OURS if name == DROP_IN else name] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["", "-uneven"])
@pytest.mark.parametrize("name", [DROP_IN, "torch"])
def test_a_compiled_model_is_that_of_the_reference(workers, name, structure):
    shape = shape_of(f"lstm-i3-h5-b4-t6{structure}")
    row = measure.measure(shape, "step-compiled", [workers(name)], pairs=1)
    assert row["left_out"] == {} and row["results"]


def test_the_loss_of_a_model_has_the_gradients_that_are_expected():
    """By finite differences, one number of each parameter; uneven, so that padding is in it."""
    shape, eps = shape_of("gru-i3-h5-b4-t6-l2-uneven-float64"), 1e-5
    given = models.text(shape, 0)
    want = models.expected(shape, "step", 0)

    def loss(name, by):
        given.weights[name].flat[2] += by
        try:
            return models.expected(shape, "step", 0)["loss"]
        finally:
            given.weights[name].flat[2] -= by

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "text", lambda shape, seed: given)
        for name in given.weights:
            slope = (loss(name, eps) - loss(name, -eps)) / (2 * eps)
            assert slope == pytest.approx(want[f"d{name}"].flat[2], rel=1e-6, abs=1e-10), name


def test_who_is_asked_for_a_row():
    """The drop-in for models, in the place of ours; nobody else is even started."""
    started = []

    class Started(measure.Worker):
        def _start(self):
            self.about = {}
            started.append(self._runs)

    def of(name, mode):
        started.clear()
        with pytest.MonkeyPatch.context() as patch, suite.Crew(list(PEERS), None, 1.0) as crew:
            patch.setattr(suite, "Worker", Started)
            workers = crew.of(suite.Job(shape_of(name), mode, 1))
            assert crew.of(suite.Job(shape_of(name), mode, 1)) == workers  # the same ones
        return [w.library for w in workers]

    assert of(TINY, "training") == [OURS, *PEERS, PEAK]
    for mode in MODEL_MODES:
        assert of(TINY, mode) == [OURS, "torch", PEAK]
        assert started == [DROP_IN, "torch", PEAK]
        assert of("lstm-i3-h5-b1-t7", mode) == [OURS, "torch", PEAK, BANDWIDTH]


@pytest.mark.parametrize(("spins", "slept"), [(0, 0.005), (0.03, 0.035), (9, worker.SETTLED)])
def test_a_turn_ends_when_the_process_computes_no_more(spins, slept, monkeypatch):
    """Or, with threads that never do, in the end. One thread spins for so many seconds."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

        def perf_counter(self):
            return self.now

        def process_time(self):
            return min(self.now, spins)

    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    worker.settle()
    assert clock.now == pytest.approx(slept, abs=1e-9 if spins < 1 else worker.LOOK)


def test_what_is_timed_gives_the_same_results_again():
    for mode in ("inference", "training"):
        shape = shape_of(TINY)
        call, arrays = library("numpy")(1).prepare(shape, mode, problem(shape, measure.SEED))
        runner = library(OURS)(rnnfast.get_num_threads())
        ours, ours_arrays = runner.prepare(shape, mode, problem(shape, measure.SEED))
        call(), ours()  # the second call's results must not have the first one's in them
        want = measure.expected(shape, mode)
        measure.check(arrays(call()), want, shape.dtype)
        measure.check(ours_arrays(ours()), want, shape.dtype)


def test_a_library_that_is_not_here_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answers = io.StringIO()
    worker.serve("torch", 1, io.StringIO('{"do": "time"}\n'), answers)
    (answer,) = map(json.loads, answers.getvalue().splitlines())
    assert "torch" in answer["missing"]


def test_avx2_is_asked_of_all_who_listen():
    told = {name: library(name).environment(1, "avx2") for name in (OURS, *PEERS)}
    free = {name: library(name).environment(1, None) for name in (OURS, *PEERS)}
    for name in told:
        spoken = [v for k, v in told[name].items() if free[name].get(k) != v]
        assert library(name).holds_isa == any(re.search("(?i)avx2|haswell", v) for v in spoken)
    assert not library("onnxruntime").holds_isa


def test_a_disturbance_does_not_pass_for_a_long_measurement(monkeypatch):
    now, disturbances = [0.0], iter([1.0, 0.0, 1.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def measured(rounds):
        now[0] += 1e-6 * rounds + next(disturbances, 0.0)
        return float(rounds)

    call, _ = machine._long_enough(measured)
    assert machine.SECONDS <= 1e-6 * call() < 2 * machine.SECONDS


# ------------------------------------------------------------------------------------- workers


def test_a_worker_answers_failure_and_goes_on(tmp_path):
    def request(shape):
        fields = {"mode": "inference", "seed": 0, "results": str(tmp_path / "r.npz")}
        return json.dumps({"do": "prepare", "shape": shape, **fields})

    time = json.dumps({"do": "time", "seconds": 1, "most": 2})
    lines = [time, request(TINY), time, request("nonsense"), time]
    answers = io.StringIO()
    worker.serve("numpy", 1, io.StringIO("".join(f"{line}\n" for line in lines)), answers)
    kinds = [next(iter(json.loads(line))) for line in answers.getvalue().splitlines()]
    assert kinds == ["about", "error", "counted", "seconds", "error", "error"]


def test_workers_are_of_the_installed_package_in_a_folder_of_sources(tmp_path, monkeypatch):
    (tmp_path / "rnnfast").mkdir()
    (tmp_path / "rnnfast" / "__init__.py").write_text("raise ImportError('not built')\n")
    monkeypatch.chdir(tmp_path)
    with measure.Worker(OURS, 1) as one:
        assert one.about["rnnfast"] == rnnfast.__version__


def test_a_worker_that_ends_has_failed_and_comes_back():
    with measure.Worker(OURS, 1) as one:
        one._process.kill()
        row = measure.measure(shape_of(TINY), "inference", [one], pairs=1)
        assert row["refused"]
        assert row["left_out"] == {OURS: "failed: the worker of rnnfast ended with code -9"}
        row = measure.measure(shape_of(TINY), "inference", [one], pairs=1)
        assert row["left_out"] == {} and OURS in row["results"]


def test_a_worker_that_takes_too_long_is_ended():
    with measure.Worker("numpy", 1) as one:
        pid, one.patience = one.pid, 0.0
        row = measure.measure(shape_of("lstm-i9-h99-b9-t500"), "training", [one], pairs=1)
        assert row["left_out"] == {"numpy": "failed: not ready within 0 s"}
        assert not row["refused"] and one.pid is None != pid


def test_memory_is_what_a_call_holds():
    memory = worker.Memory()
    if memory.most() is None:
        pytest.skip("this system does not tell how much memory a process held")
    block = np.ones(4_000_000)
    del block
    assert 30_000_000 < memory.most() < 60_000_000
    memory.watch()
    assert memory.most() < 10_000_000


# ---------------------------------------------------------------------------------- statistics


def test_summary_pairs_what_ran_in_the_same_round():
    # A neighbour halves the machine's speed in the second round: shares and ratios do not see it.
    rounds = {
        OURS: [[3e-3, 2e-3, 2e-3], [4e-3], [2e-3]],
        "torch": [[6e-3], [12e-3], [6e-3]],
        "jax": [[20e-3], [40e-3]],  # far behind, and out of the last round
        PEAK: [[5e-3], [10e-3], [5e-3, 4e-3, 5e-3]],
        BANDWIDTH: [[1e-3], [2e-3], [1e-3]],
    }
    counted = {OURS: 1e9, "torch": 1e9, "jax": 1e9, PEAK: 5e9, BANDWIDTH: 1e8}
    found = figures.summary(rounds, counted, bytes_read=5e7)
    ours, theirs = found[OURS], found["torch"]
    assert ours["median_ms"] == ours["min_ms"] == pytest.approx(2)
    assert ours["gflops"] == pytest.approx(500)
    assert ours["share"] == pytest.approx(0.5)
    assert ours["best_share"] == pytest.approx(0.4)
    assert ours["read_share"] == pytest.approx(0.25)
    assert theirs["ratio"] == pytest.approx(3)
    assert theirs["ratio_interval"] == pytest.approx((3, 3))
    assert found["jax"]["ratio"] == pytest.approx(10) and found["jax"]["rounds"] == 2
    assert found[BANDWIDTH]["gbytes"] == pytest.approx(100)
    assert "ratio" not in found[PEAK] and "share" not in found[PEAK]


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 30, 31, 100])
def test_interval_covers_the_median_as_surely_as_it_says(n):
    low, high = figures.median_interval(range(n))
    outside = low  # values on either side of it
    assert low + high == n - 1

    def coverage(k):
        """Chance that neither end's k + 1 values all lie on one side of the median."""
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    assert outside == 0 or coverage(outside) >= 0.95
    if n >= 6:
        assert coverage(outside) >= 0.95 > coverage(outside + 1)


class Fake:
    """A worker whose calls take as long as it is told, and no time at all."""

    def __init__(self, name, ms):
        self.library, self.ms, self.turns = name, ms, 0

    def turn(self):
        self.turns += 1
        return [1e-3 * self.ms]


def test_rounds_go_on_without_those_far_behind(monkeypatch):
    monkeypatch.setattr(measure, "GAP", 0)
    times = {OURS: 50, "torch": 10, "jax": 19, "numpy": 21, PEAK: 100, BANDWIDTH: 100}
    fakes = [Fake(name, ms) for name, ms in times.items()]
    rounds, failed = measure._rounds(fakes, None, 8, 0)
    assert {name: len(turns) for name, turns in rounds.items()} == {
        OURS: 8, "torch": 8, "jax": 8, "numpy": measure.FEW, PEAK: 8, BANDWIDTH: 8
    }  # fmt: skip
    rounds, failed = measure._rounds(fakes, 0.0, 8, 0)
    assert [len(turns) for turns in rounds.values()] == [1] * 6 and not failed


class Mortal(Fake):
    """One that ends in its third turn."""

    def turn(self):
        if self.turns == 2:
            raise measure.Failed("gone")
        return super().turn()


def test_who_ends_during_the_rounds_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "GAP", 0)
    rounds, failed = measure._rounds([Fake(OURS, 1), Mortal("jax", 1), Fake(PEAK, 1)], None, 8, 0)
    assert {name: len(turns) for name, turns in rounds.items()} == {OURS: 8, PEAK: 8}
    assert failed == {"jax": "gone"}


def test_a_row_without_ours_is_refused(monkeypatch):
    with measure.Worker(OURS, 1) as one:
        monkeypatch.setattr(one, "turn", Mortal(OURS, 1).turn)
        row = measure.measure(shape_of(TINY), "inference", [one], pairs=4)
    assert row["refused"] and row["left_out"] == {OURS: "failed: gone"} and not row["results"]
    found = made_up({"threads": 1, "isa": "avx2", **row})
    assert all(len(table.lines[0]) == len(table.header) for table in report.tables(found)[:2])


# ------------------------------------------------------------------------------ the command


def made_up_row(shape=TINY, mode="inference", threads=1, ours=1.0, peak=4.0, **peers):
    """A row as `measure` makes it, of times in ms that never change."""
    rounds = {OURS: [[1e-3 * ours]] * 30, PEAK: [[1e-3 * peak]] * 30}
    rounds |= {name.replace("_", "-"): [[1e-3 * ms]] * 30 for name, ms in peers.items()}
    operations = shape_of(shape).operations(mode)
    found = figures.summary(rounds, dict.fromkeys(rounds, operations))
    first = {"ready_ms": 1.0, "first_ms": 2.0, "first_bytes": 1, "bytes": 1}
    return {
        "shape": shape, "stands_for": "", "mode": mode, "threads": threads, "isa": "avx2",
        "pairs": 30, "others": 0.0, "error_over_bound": {}, "left_out": {}, "refused": False,
        "results": {name: {**row, **first} for name, row in found.items()},
    }  # fmt: skip


def made_up(*rows, **versions):
    peers = {name: {name: version} for name, version in versions.items()}
    machine = measure.machine()
    return {"machine": machine, "peers": peers, "missing": {}, "not_held": [], "rows": list(rows)}


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def test_bench_from_end_to_end(tmp_path, capfd):
    path, text = tmp_path / "found.json", tmp_path / "found.md"
    arguments = ["--shapes", TINY, "--threads", 1, "--peers", "numpy", "--seconds", 0]
    assert bench(*arguments, "--json", path, "--markdown", text) == 0
    found = report.read(path)
    assert found["machine"]["rnnfast"] == rnnfast.__version__
    assert found["peers"] == {"numpy": {"numpy": np.__version__}}
    assert [row["mode"] for row in found["rows"]] == ["inference", "training"]
    for row in found["rows"]:
        assert row["pairs"] == 1
        assert set(row["results"]) == {OURS, PEAK, "numpy"}
        assert 0 < row["error_over_bound"][OURS] <= 1
        ours = row["results"][OURS]
        assert 0 < ours["share"] < 1
        assert 0 < ours["min_ms"] <= ours["median_ms"]
        assert 0 < row["results"]["numpy"]["ratio"]
    shown = capfd.readouterr().out
    assert report.markdown(found).strip() == text.read_text(encoding="utf-8").strip()
    for table in report.tables(found):
        assert table.markdown() in shown
        assert {len(line) for line in table.lines} == {len(table.header)}


def test_a_stream_from_end_to_end(tmp_path):
    path = tmp_path / "found.json"
    arguments = ["--shapes", "lstm-i3-h5-b1-t7", "--modes", "stream", "--threads", 1]
    assert bench(*arguments, "--peers", "numpy", "--seconds", 0, "--json", path) == 0
    (row,) = report.read(path)["rows"]
    ours = row["results"][OURS]
    assert ours["us_per_step"] == pytest.approx(1e3 * ours["median_ms"] / 7, rel=1e-3)
    assert 0 < ours["read_share"] < 1 < row["results"][BANDWIDTH]["gbytes"]


def test_models_from_end_to_end(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "found.json"
    arguments = ["--shapes", "lstm-i3-h5-b4-t7-uneven", "--modes", "step", "predict"]
    assert bench(*arguments, "--threads", 1, "--seconds", 0, "--json", path) == 0
    found = report.read(path)
    assert list(found["peers"]) == ["torch"] and found["missing"] == {}
    assert [row["mode"] for row in found["rows"]] == ["step", "predict"]
    for row in found["rows"]:
        assert set(row["results"]) == {OURS, PEAK, "torch"}
        assert row["error_over_bound"].keys() == {OURS, "torch"}
        assert 0 < row["results"]["torch"]["ratio"]


def test_models_need_pytorch(monkeypatch, capsys):
    class Missing(measure.Worker):
        def _start(self):
            self.about, self.missing = None, "rnnfast.torch: needs PyTorch"

    monkeypatch.setattr(suite, "Worker", Missing)
    assert bench("--suite", "torch", "--threads", 1) == 2
    assert "rnnfast.torch: needs PyTorch" in capsys.readouterr().err


@pytest.fixture
def scripted(monkeypatch):
    """A function that makes `measure` give these rows, or raise these errors, one by one."""

    def script(*rows):
        given = iter(rows)

        def measured(shape, mode, workers, seconds):
            row = next(given)
            if isinstance(row, BaseException):
                raise row
            return row | {"shape": shape.name, "mode": mode}

        monkeypatch.setattr(suite, "measure", measured)
        monkeypatch.setattr(suite.Crew, "of", lambda self, job: [])

    return script


def test_ctrl_c_keeps_what_was_measured(tmp_path, scripted, capsys):
    scripted(made_up_row(numpy=2.0), KeyboardInterrupt())
    path, text = tmp_path / "found.json", tmp_path / "found.md"
    code = bench("--shapes", TINY, "--threads", 1, "--json", path, "--markdown", text)
    assert code == 130
    assert [row["mode"] for row in report.read(path)["rows"]] == ["inference"]
    assert "geometric mean 2.00 over 1 rows" in text.read_text(encoding="utf-8")
    assert "geometric mean 2.00 over 1 rows" in capsys.readouterr().out


def test_a_disturbed_row_is_measured_once_more(tmp_path, scripted):
    scripted(
        made_up_row(ours=7.0) | {"others": 0.9},
        made_up_row(ours=5.0) | {"others": 0.3},
        made_up_row(ours=3.0) | {"others": 0.1},
    )
    path = tmp_path / "found.json"
    assert bench("--shapes", TINY, "--threads", 1, "--json", path) == 0
    rows = report.read(path)["rows"]
    assert [row["results"][OURS]["median_ms"] for row in rows] == [5, 3]
    (table, *_) = report.tables({**made_up(*rows)})
    assert table.lines[0][0] == f"{TINY}!"


def test_append_replaces_and_keeps(tmp_path, scripted):
    path = tmp_path / "found.json"
    scripted(made_up_row(ours=1.0), made_up_row(ours=2.0))
    assert bench("--shapes", TINY, "--threads", 1, "--json", path) == 0
    scripted(made_up_row(ours=3.0), made_up_row(ours=4.0))
    again = ["--modes", "training", "inference", "--threads", 1, "--append", "--json", path]
    assert bench("--shapes", TINY, *again) == 0
    rows = report.read(path)["rows"]
    found = [(row["mode"], row["results"][OURS]["median_ms"]) for row in rows]
    assert found == [("inference", 4), ("training", 3)]


def test_append_refuses_the_run_of_another_machine(tmp_path, scripted, capsys):
    scripted()
    path = tmp_path / "found.json"
    other = made_up()
    other["machine"]["cpu"] = "Other"
    report.write(path, report.to_json(other))
    assert bench("--shapes", TINY, "--append", "--json", path) == 2
    assert "with cpu Other; needs" in capsys.readouterr().err


def test_isa_is_asked_of_the_kernels_too(tmp_path):
    path = tmp_path / "found.json"
    if rnnfast.isa() == "base":
        pytest.skip("this CPU cannot run avx2")
    arguments = ["--shapes", TINY, "--threads", 1, "--peers", "--seconds", 0, "--json", path]
    assert bench(*arguments, "--isa", "avx2") == 0
    found = report.read(path)
    assert found["machine"]["isa"] == "avx2"
    assert {row["isa"] for row in found["rows"]} == {"avx2"}


def test_a_suite_without_this_library_is_none(capfd):
    with suite.Crew([], "nonsense", 60.0) as crew:
        with pytest.raises(ValueError, match="the worker of rnnfast ended with code 1, as it said"):
            crew.of(suite.Job(shape_of(TINY), "inference", 1))
    assert "RNNFAST_ISA: got 'nonsense'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "lstm-i0-h5-b2-t7"], "needs CELL-iI-hH-bB-tT"),
        (["--threads", "0"], "threads: got 0"),
        (["--threads", "two"], "'two'"),
        (["--seconds", "-1"], "seconds: got -1"),
        (["--append"], "--append: got no --json"),
        (["--shapes", f"{TINY}-bi", "--modes", "stream"], "--modes stream: got"),
        (["--compare", __file__, __file__], "needs a file that `--json` has written"),
        (["--show", "no-such-file"], "no-such-file"),
    ],
)
def test_a_wrong_argument_is_explained(arguments, words, capsys):
    try:
        code = bench(*arguments)
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_suites_ask_for_their_modes_and_threads(monkeypatch):
    parser = suite.argparse.ArgumentParser()
    suite.add_arguments(parser)
    monkeypatch.setattr(suite.os, "sched_getaffinity", lambda pid: set(range(6)))

    def asked(*arguments):
        return suite.jobs(parser.parse_args(arguments))

    assert len(asked()) == 18 * 2 * 2
    assert {job.threads for job in asked("--suite", "threads")} == {1, 2, 4, 6}
    assert {job.mode for job in asked("--suite", "stream", "--threads", "3")} == {"stream"}
    assert {job.mode for job in asked("--suite", "torch")} == set(MODEL_MODES)
    assert len(asked("--suite", "layers", "layers")) == 18 * 2 * 2


# --------------------------------------------------------------------------------------- tables


def test_the_best_peer_is_the_fastest_that_was_held():
    row = made_up_row(onnxruntime=2.0, torch=3.0, numpy=9.0)
    assert report.best_peer(row) == "onnxruntime"
    assert report.ratio_to_best(row) == pytest.approx(2)
    assert report.best_peer(row, ["onnxruntime"]) == "torch"
    found = made_up(row) | {"not_held": ["onnxruntime"]}
    main, _, peers, *_ = report.tables(found)
    assert "torch" in main.lines[0]
    assert "onnxruntime†" in peers.header and any("†" in note for note in peers.notes)


def test_totals_count_what_is_behind():
    rows = [made_up_row(torch=0.5), made_up_row("gru-i3-h5-b2-t7", torch=8.0)]
    (line,) = report.tables(made_up(*rows))[1].lines
    assert line == ["inference, 1 thread", "2", "2.00", "0.50", "1", "400%"]


def test_fewer_rounds_than_promised_are_said():
    row = made_up_row(torch=2.0) | {"pairs": 12}
    main, *_ = report.tables(made_up(row))
    assert main.lines[0][0] == f"{TINY}*" and any("12 rounds" in note for note in main.notes)


def test_tables_fit_a_terminal_of_100_columns(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    longest = "rnn_tanh-i1760-h1760-b16-t50"
    peers = {name.replace("-", "_"): 123.4 for name in PEERS}
    rows = [made_up_row(longest, mode, ours=99.9, **peers) for mode in ("inference", "training")]
    report.show(report.tables(made_up(*rows)))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert shown.count(f"{longest} ") == 2 * 3 and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert re.search(rf"{longest} +99.9 ±0% .* torch +123 +1.24 +1.24-1.24", shown)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    report.write(path, "old")
    with pytest.raises(KeyboardInterrupt), report.replaced(path) as temporary:
        pathlib.Path(temporary).write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_picture_or_what_to_install(tmp_path, scripted, capsys):
    scripted(made_up_row(numpy=2.0), made_up_row(numpy=0.5))
    path = tmp_path / "found.svg"
    code = bench("--shapes", TINY, "--threads", 1, "--picture", path)
    if importlib.util.find_spec("matplotlib"):
        assert code == 0 and "</svg>" in path.read_text(encoding="utf-8")
    else:
        assert code == 2 and "pip install 'rnnfast[plot]'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize(
    ("old", "new", "versions", "against", "verdict"),
    [
        (dict(torch=2.0), dict(torch=1.8), "11", "torch", "SLOWER"),
        (dict(torch=2.0), dict(torch=2.2), "11", "torch", "faster"),
        (dict(torch=2.0), dict(torch=1.96), "11", "torch", ""),  # within the margin
        # A machine of half the speed: everything takes twice as long.
        (dict(torch=2.0), dict(ours=2.0, torch=4.0, peak=8.0), "11", "torch", ""),
        # Another PyTorch says nothing about us; the peak does.
        (dict(torch=2.0), dict(torch=1.0), "12", "peak", ""),
        (dict(), dict(ours=1.2), "11", "peak", "SLOWER"),
        (dict(torch=2.0, jax=3.0), dict(jax=2.0), "11", "jax", "SLOWER"),
    ],
)
def test_compare(tmp_path, capsys, old, new, versions, against, verdict):
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, row, version in zip(paths, (old, new), versions, strict=True):
        found = made_up(made_up_row(**row), torch=version, jax="1")
        report.write(path, report.to_json(found))
    assert bench("--compare", *paths) == (verdict == "SLOWER")
    (line,) = (li for li in capsys.readouterr().out.splitlines() if li.startswith(f"| {TINY}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (cells[3], cells[-1]) == (against, verdict)


def test_compare_believes_no_change_within_the_intervals():
    old, new = made_up_row(torch=2.0), made_up_row(torch=1.8)
    assert compare.compared(made_up(old, torch="1"), made_up(new, torch="1"))[1] == 1
    noisy = copy.deepcopy(new)
    noisy["results"]["torch"]["ratio_interval"] = (1.5, 2.1)
    assert compare.compared(made_up(old, torch="1"), made_up(noisy, torch="1"))[1] == 0


def test_compare_says_what_is_gone():
    old = made_up(made_up_row(), made_up_row(mode="training"))
    table, regressions = compare.compared(old, made_up(made_up_row()))
    assert regressions == 0 and f"Only in the first: {TINY} training 1." in table.notes


# ------------------------------------------------------------------------------------- overhead


def test_overhead_from_end_to_end(tmp_path, capfd):
    path = tmp_path / "found.json"
    assert overhead.main(["--imports", "1", "--blocks", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["bytes"]["installed package"] > 10_000
    assert all(seconds[0] > 0 for seconds in found["imports"].values())
    assert any("rnnfast.torch" in name for name in found["calls"]) == bool(
        importlib.util.find_spec("torch")
    )
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + len(found["imports"]) + len(found["calls"])


def test_variants_from_end_to_end(capfd):
    clipped = "lstm-i3-h5-b2-t7-clip"
    assert variants.main([clipped, "gru-i3-h5-b2-t7", "--rounds", "2", "--threads", "1"]) == 0
    assert variants.main([clipped, "--mode", "inference", "--rounds", "2"]) == 0  # has none
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| lstm")]
    assert [line.split()[1] for line in lines] == [TINY, clipped, TINY]


def test_closed_loop_from_end_to_end(capfd):
    assert closed_loop.main(["--steps", "4", "--rounds", "2"]) == 0
    assert "| rnnfast |" in capfd.readouterr().out
