"""What common slips are told: the warning or error says what to do instead.

Knows the public API and `storage`. That all bad input is refused is judged in test_bad_input.
"""

import copy
import re
import warnings
from collections import namedtuple

import numpy as np
import pytest

import rnnfast
from rnnfast import storage

CLASSES = (rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU)
T, B, I, H = 6, 3, 4, 5
X = np.zeros((T, B, I), np.float32)


def error_of(call, *args, **kwargs):
    """The error's own words."""
    with pytest.raises((TypeError, ValueError, OSError)) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_in_a_single_layer_warns_at_the_callers_line(cls):
    with pytest.warns(UserWarning, match="dropout: got 0.5 with num_layers=1; needs") as caught:
        cls(I, H, dropout=0.5)
    (warning,) = caught
    assert warning.filename == __file__


@pytest.mark.parametrize("cls", CLASSES)
def test_masks_for_all_steps_that_nobody_draws_warn(cls):
    with pytest.warns(
        UserWarning, match="variational: got True with recurrent_dropout=0"
    ) as caught:
        cls(I, H, variational=True)
    assert [warning.filename for warning in caught] == [__file__]


def test_dropout_that_acts_does_not_warn_nor_do_copies_and_files(tmp_path):
    with pytest.warns(UserWarning):
        single = rnnfast.LSTM(I, H, dropout=0.5)
    single.save(tmp_path / "single.npz")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rnnfast.LSTM(I, H, 2, dropout=0.5)
        rnnfast.LSTM(I, H, variational=True, recurrent_dropout=0.5)
        rnnfast.LSTM(I, H)
        assert copy.deepcopy(single).dropout == 0.5
        assert rnnfast.load(tmp_path / "single.npz").dropout == 0.5
    assert not caught


# ----------------------------------------------------------------------------------------- arrays


def test_a_packed_sequence_is_told_of_lengths():
    fields = "data batch_sizes sorted_indices unsorted_indices"
    packed = namedtuple("PackedSequence", fields)(X[:, 0], np.ones(T, int), None, None)
    want = "x: got a PackedSequence; needs the padded array, with its lengths as lengths="
    lstm = rnnfast.LSTM(I, H)
    for call in (lstm, lstm.forward_train):
        assert error_of(call, packed) == want


@pytest.mark.parametrize("shape", [(), (I,), (1, 1, 1, I)])
def test_another_rank_is_told_by_its_shape(shape):
    message = error_of(rnnfast.LSTM(I, H), np.zeros(shape, np.float32))
    assert message == f"x: got shape {shape}; needs 3 dimensions, [T, B, I], or 2, [T, I]"


@pytest.mark.parametrize("given", [5, 5.0, "abc", {0: 1}, object()], ids=repr)
def test_lengths_that_are_no_array_are_told_how_many_integers(given):
    lstm = rnnfast.LSTM(I, H)
    assert error_of(lstm, X, lengths=given).endswith("; needs 3 integers in 0..6")
    assert error_of(lstm, X[:, :1], lengths=given).endswith("; needs 1 integer in 0..6")


@pytest.mark.parametrize("dtype", [object, complex, str, "M8[s]"])
def test_what_cannot_be_converted_is_not_told_to_convert(dtype):
    message = error_of(rnnfast.LSTM(I, H), np.zeros((T, B, I), dtype))
    assert message.endswith("; needs float32 numbers")


@pytest.mark.parametrize("dtype", [float, np.float16, int, bool])
def test_what_can_be_converted_is_told_how(dtype):
    message = error_of(rnnfast.LSTM(I, H), np.zeros((T, B, I), dtype))
    assert message.endswith("; needs float32: .astype(np.float32) converts")


# ------------------------------------------------------------------------------------ parameters


def hint(module, entries):
    """What stands in brackets at the end of the message, if anything does."""
    message = error_of(module.load_state_dict, entries)
    return message.rpartition("; needs exactly: ")[2].partition(" (")[2].removesuffix(")")


def test_names_with_a_prefix_are_told_to_be_stripped():
    lstm = rnnfast.LSTM(I, H, 2, bidirectional=True)
    right = lstm.state_dict()
    whole = {f"model.rnn.{name}": array for name, array in right.items()}
    assert hint(lstm, whole) == "all names start with 'model.rnn.': prefix='model.rnn.'"
    more = {"fc.weight": X, **whole}
    want = "names that start with 'model.rnn.' are there: prefix='model.rnn.'"
    assert hint(lstm, more) == want
    del whole["model.rnn.bias_hh_l1"]
    assert hint(lstm, whole) == ""
    assert hint(lstm, {**right, "fc.weight": X}) == ""
    inside = error_of(lambda d: lstm.load_state_dict(d, prefix="rnn."), {"model": right, "step": 3})
    assert inside.endswith("; needs a state_dict, not a dict of such: the one in entry 'model'?")


def test_parameters_of_other_sizes_are_told_theirs():
    lstm = rnnfast.LSTM(I, H, 2)
    for other, want in (
        (rnnfast.LSTM(I, 32, 2), "these fit hidden_size 32"),
        (rnnfast.LSTM(7, H, 2), "these fit input_size 7"),
        (rnnfast.LSTM(7, 32, 2), "these fit input_size 7, hidden_size 32"),
        (rnnfast.GRU(I, H, 2), "these have 3 gates instead of 4: of a GRU, or a coupled LSTM?"),
        (rnnfast.RNN(7, 32, 2), "these have 1 gate instead of 4: of an RNN?"),
    ):
        assert hint(lstm, other.state_dict()) == want
    assert hint(rnnfast.GRU(I, H), lstm.state_dict()).endswith("4 gates instead of 3: of an LSTM?")


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_one_odd_array_makes_no_hint(name):
    lstm = rnnfast.LSTM(I, H)
    for shape in ((8 * H, 2 * H), (3,), (), (0, 0)):
        assert hint(lstm, {**lstm.state_dict(), name: np.zeros(shape, np.float32)}) == ""


# ------------------------------------------------------------------------------------------ files


def test_a_save_that_fails_names_the_path_that_was_asked_for(tmp_path):
    nowhere = tmp_path / "nodir" / "l.npz"
    for save in (rnnfast.LSTM(I, H).save, lambda path: storage.write(path, {}, {})):
        for path, error in ((nowhere, FileNotFoundError), (tmp_path, IsADirectoryError)):
            with pytest.raises(error, match=re.escape(f": '{path}'") + "$") as caught:
                save(path)
            assert caught.value.filename == str(path)
