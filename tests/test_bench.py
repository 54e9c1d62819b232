"""The benchmarks do what they say: they check before they time, and their figures are right.

Knows `rnnfast.bench` and made-up times. No figure is judged here: benchmarks decide nothing.
"""

import doctest
import importlib
import io
import json
import math
import pkgutil
import sys

import numpy as np
import pytest
import tolerances

import rnnfast.bench
from rnnfast.bench import layers, overhead, worker
from rnnfast.bench.shapes import MODES, SHAPES, problem, shape_of
from rnnfast.cells import CELLS

TINY = "lstm-i3-h5-b2-t7"
MODULES = [module.name for module in pkgutil.iter_modules(rnnfast.bench.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    # By hand, because this folder is not where its package's name says.
    module = importlib.import_module(f"rnnfast.bench.{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("name", [*SHAPES, TINY, "gru-i1-h1-b1-t1-float64"])
def test_a_name_gives_its_shape(name):
    shape = shape_of(name)
    assert shape.name == name
    assert problem(shape, 0).x.shape == (shape.T, shape.B, shape.I)


@pytest.mark.parametrize("name", ["", "lstm", "lstm-i0-h5-b2-t7", "elman-i3-h5-b2-t7", TINY + "-f"])
def test_a_name_of_no_shape_is_refused(name):
    with pytest.raises(ValueError, match="shape: got"):
        shape_of(name)


def test_bounds_are_those_of_the_tests():
    for dtype, bounds in layers.BOUNDS.items():
        assert bounds == tuple(tolerances.BOUNDS[dtype, what] for what in ("forward", "gradient"))


@pytest.fixture(scope="module")
def right():
    """What a worker that is just right would write for the tiny shape."""
    want = layers.expected(shape_of(TINY), "training")
    return {name: array.astype(np.float32) for name, array in want.items()}, want


def test_check_takes_what_is_right(right):
    assert layers.check(*right, "float32") < 0.1  # rounding to float32 alone


@pytest.mark.parametrize("damage", ["one element", "NaN", "shape", "dtype", "missing", "unknown"])
@pytest.mark.parametrize("name", sorted(layers.expected(shape_of(TINY), "training")))
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
    with pytest.raises(layers.WrongResults, match=name):
        layers.check(got, want, "float32")
    if damage == "one element":
        layers.check(got, want, "float32", times=10)


class Wrong(layers.Worker):
    """A process whose results arrive with one sign turned."""

    def results(self, *asked):
        got, operations = super().results(*asked)
        got["y"][-1] *= -1
        return got, operations

    def turn(self, *asked):
        pytest.fail("was timed though its results are wrong")


@pytest.mark.parametrize("mode", MODES)
def test_wrong_results_are_not_timed(mode):
    with layers.Worker("rnnfast", 1) as good, Wrong("rnnfast", 1) as wrong:
        wrong.library = "torch"
        row = layers.measure(shape_of(TINY), mode, [wrong, good], pairs=2)
    assert row["refused"]
    assert row["left_out"]["torch"].startswith("refused: y: relative error 0.")
    assert [len(turns) for turns in row["seconds"].values()] == [2]
    (line,) = layers.lines({"threads": 1, **row})
    assert line[-2].startswith("refused: y: ")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("library", ["rnnfast", *layers.PEERS])
def test_a_library_is_right_or_says_that_it_cannot(library, cell, dtype):
    pytest.importorskip(library)
    runner = worker.RUNNERS[library](rnnfast.get_num_threads())
    shape = shape_of(f"{cell}-i3-h5-b2-t7{'-float64' * (dtype == 'float64')}")
    for mode in MODES:
        try:
            call, arrays = runner.prepare(shape, mode, problem(shape, layers.SEED))
        except NotImplementedError:
            assert (library, cell) == ("torch", "gru_reset_before")
            continue
        call()  # the second call's results must not have the first one's in them
        times = 1 if library == layers.OURS else layers.PEERS_BOUND
        layers.check(arrays(call()), layers.expected(shape, mode), dtype, times)


def test_a_library_that_is_not_here_is_said_to_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    answers = io.StringIO()
    worker.serve("torch", 1, io.StringIO('{"do": "time"}\n'), answers)
    (answer,) = map(json.loads, answers.getvalue().splitlines())
    assert "torch" in answer["missing"]


def test_a_worker_answers_failure_and_goes_on(tmp_path):
    def request(shape):
        fields = {"mode": "inference", "seed": 0, "results": str(tmp_path / "r.npz")}
        return json.dumps({"do": "prepare", "shape": shape, **fields})

    time = json.dumps({"do": "time", "seconds": 1, "most": 2})
    lines = [time, request(TINY), time, request("nonsense"), time]
    answers, threads = io.StringIO(), rnnfast.get_num_threads()
    worker.serve("rnnfast", threads, io.StringIO("".join(f"{line}\n" for line in lines)), answers)
    kinds = [next(iter(json.loads(line))) for line in answers.getvalue().splitlines()]
    assert kinds == ["about", "error", "operations", "seconds", "error", "error"]


def test_summary_pairs_what_ran_in_the_same_round():
    # A neighbour halves the machine's speed in the second round: shares and ratios do not see it.
    rounds = {
        "rnnfast": [[3e-3, 2e-3, 2e-3], [4e-3], [2e-3]],
        "torch": [[6e-3], [12e-3], [6e-3]],
        "peak": [[5e-3], [10e-3], [5e-3, 4e-3, 5e-3]],
    }
    found = layers.summary(rounds, {"rnnfast": 1e9, "torch": 1e9, "peak": 5e9})
    ours, theirs = found["rnnfast"], found["torch"]
    assert ours["median_ms"] == ours["min_ms"] == pytest.approx(2)
    assert ours["gflops"] == pytest.approx(500)
    assert ours["share"] == pytest.approx(0.5)
    assert ours["best_share"] == pytest.approx(0.4)
    assert theirs["ratio"] == pytest.approx(3)
    assert theirs["ratio_interval"] == pytest.approx((3, 3))
    assert "ratio" not in found["peak"]


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 30, 31, 100])
def test_interval_covers_the_median_as_surely_as_it_says(n):
    low, high = layers.median_interval(range(n))
    outside = low  # values on either side of it
    assert low + high == n - 1

    def coverage(k):
        """Chance that neither end's k + 1 values all lie on one side of the median."""
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    assert outside == 0 or coverage(outside) >= 0.95
    if n >= 6:
        assert coverage(outside) >= 0.95 > coverage(outside + 1)


def test_layers_from_end_to_end(tmp_path, capfd):
    path = tmp_path / "found.json"
    arguments = ["--shapes", TINY, "--threads", "1", "--seconds", "0", "--json", str(path)]
    assert layers.main(arguments) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["machine"]["rnnfast"] == rnnfast.__version__
    assert set(found["peers"]) | set(found["missing"]) == set(layers.PEERS)
    assert [row["mode"] for row in found["rows"]] == list(MODES)
    for row in found["rows"]:
        assert row["pairs"] == 1
        assert set(row["results"]) == {"rnnfast", "peak", *found["peers"]}
        assert 0 < row["error_over_bound"]["rnnfast"] <= 1
        assert 0 < row["results"]["rnnfast"]["share"] < 1
        assert 0 < row["results"]["rnnfast"]["min_ms"] <= row["results"]["rnnfast"]["median_ms"]
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(MODES) * max(1, len(found["peers"]))
    assert {line.count("|") for line in table} == {len(layers.HEADER) + 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "lstm-i0-h5-b2-t7"], "needs CELL-iI-hH-bB-tT"),
        (["--threads", "0"], "threads: got 0"),
        (["--threads", "two"], "'two'"),
    ],
)
def test_a_wrong_argument_is_explained(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        layers.main(arguments)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_a_worker_that_dies_is_an_error():
    with layers.Worker("rnnfast", 1) as one:
        one._process.kill()
        with pytest.raises(RuntimeError, match="worker of rnnfast ended"):
            one.results(shape_of(TINY), "inference")


def test_overhead_from_end_to_end(tmp_path, capfd):
    path = tmp_path / "found.json"
    assert overhead.main(["--imports", "1", "--blocks", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["bytes"]["installed package"] > 10_000
    assert all(seconds[0] > 0 for seconds in found["imports"].values())
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + len(found["imports"]) + len(found["calls"])
