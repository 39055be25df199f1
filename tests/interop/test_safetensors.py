"""One file: every header that lies is refused in one line, and what is written is what was read."""

import json
import resource

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3_jax.interop.safetensors import MAX_HEADER, MappedFile, Planned, header_bytes, read_header, write_file
from oracles.released_folder import file_bytes, header_of, write_safetensors
from oracles.safetensors_reader import DTYPES, read_safetensors

VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, -2], ml_dtypes.bfloat16)}
DATA = b"".join(value.tobytes() for value in VALUES.values())


def planned(tensors):
    return [Planned(name, t.dtype, t.shape, lambda t=t: iter([t])) for name, t in tensors.items()]


def refused(path):
    """The one line by which the file is refused."""
    with pytest.raises(ValueError) as error:
        read_header(path)
    line = str(error.value)
    assert type(error.value) is ValueError and line.startswith(str(path)) and "\n" not in line and len(line) < 1000
    return line.removeprefix(str(path))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_is_read_as_a_view_of_the_file(path, kind):
    values = np.arange(24, dtype=np.uint8).view(DTYPES[kind]).reshape(1, -1)
    write_safetensors(path, {"first": np.zeros(3, np.uint8), "x": values}, {"format": "pt"})
    file = MappedFile(path)
    assert list(file.entries) == ["first", "x"] and file.metadata == {"format": "pt"}
    read = file.tensor("x")
    assert read.dtype == values.dtype and read.shape == values.shape and read.tobytes() == values.tobytes()
    assert not read.flags.writeable and not read.flags.owndata


def test_tensors_are_in_the_order_of_their_bytes_whatever_the_header_says(path):
    header = header_of(VALUES)
    path.write_bytes(file_bytes(dict(reversed(header.items())), DATA))
    assert list(read_header(path).entries) == ["a", "b"]


def test_empty_tensors_and_scalars_are_tensors(path):
    tensors = {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5, np.float32), "no more": np.zeros(0, np.int8)}
    write_safetensors(path, tensors)
    file = MappedFile(path)
    assert {name: file.tensor(name).shape for name in file.entries} == {"none": (0, 3), "one": (), "no more": (0,)}
    assert file.tensor("one") == 2.5


def changed(name, **entry):
    header = header_of(VALUES)
    return header | {name: header[name] | entry}


LIES = {
    "overlap": (changed("b", data_offsets=[20, 24]), "tensor 'b' overlaps 'a'"),
    "gap": (changed("b", data_offsets=[25, 29]), "truncated"),
    "beyond the end": (changed("b", data_offsets=[24, 2**40], shape=[2**39 - 12]), "tensor 'b': ends at byte"),
    "backwards": (changed("b", data_offsets=[28, 24]), "tensor 'b': data_offsets"),
    "negative": (changed("a", data_offsets=[-4, 20]), "two non-negative integers"),
    "fraction": (changed("a", data_offsets=[0.0, 24.0]), "two non-negative integers"),
    "one offset": (changed("a", data_offsets=[24]), "two non-negative integers"),
    "size": (changed("a", shape=[2, 4]), "are 24 bytes, but F32 [2, 4] takes 32"),
    "overflow": (changed("a", shape=[2**32, 2**32]), "takes"),
    "negative side": (changed("a", shape=[-2, -3]), "tensor 'a': shape"),
    "true side": (changed("a", shape=[True, 6]), "tensor 'a': shape"),
    "too many sides": (changed("a", shape=[1] * 90 + [6]), "tensor 'a': shape"),
    "dtype": (changed("a", dtype="F33"), "tensor 'a': dtype: expected one of"),
    "dtype of a wrong type": (changed("a", dtype=["F32"]), "tensor 'a': dtype"),
    "no dict": (header_of(VALUES) | {"b": 3}, "tensor 'b': expected dtype, shape"),
    "unused bytes": ({"a": header_of(VALUES)["a"]}, "4 bytes that belong to no tensor after 'a'"),
    "unused bytes first": ({"b": header_of(VALUES)["b"]}, "leaves 24 bytes unused after the header"),
    "metadata": (header_of(VALUES) | {"__metadata__": {"n": 1}}, "__metadata__"),
    "doubled": (b'{"a": 1, "a": 2}', "'a' is there twice"),
    "no object": (b"[1]", "expected a JSON object"),
    "no JSON": (b'{"a": ', "damaged JSON"),
    "no UTF-8": (b'{"\xff": 1}', "damaged JSON"),
    "no text": (b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', "a name that is no text"),
    "deep": (b"[" * 10**6, "nested too deeply"),
    "long number": (b'{"a": ' + b"9" * 10**5 + b"}", "damaged JSON"),
    "long name": (json.dumps({"x" * 10**6: 1}).encode(), "expected dtype, shape"),
    "name with a line break": (json.dumps({"x\ny": 1}).encode(), "tensor 'x\\ny'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_line(path, lie):
    header, message = LIES[lie]
    path.write_bytes(file_bytes(header, DATA))
    assert message in refused(path)


def test_gaps_are_refused(path):
    path.write_bytes(file_bytes(changed("b", data_offsets=[25, 29]), DATA + b"."))
    assert "tensor 'b' leaves 1 bytes unused after 'a'" in refused(path)


@pytest.mark.parametrize("length", [0, 5, 8, 40])
def test_a_truncated_file_is_refused(path, length):
    path.write_bytes(file_bytes(header_of(VALUES), DATA)[:length])
    assert "truncated" in refused(path)


def test_a_file_that_lost_its_last_byte_is_refused(path):
    path.write_bytes(file_bytes(header_of(VALUES), DATA)[:-1])
    assert "tensor 'b': ends at byte" in refused(path)


@pytest.mark.parametrize("claimed", [2**63, 2**40, 1000])
def test_a_header_longer_than_the_file_is_not_allocated(path, claimed):
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    assert "truncated" in refused(path)


def test_a_header_longer_than_any_model_needs_is_not_parsed(path):
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "a header of" in refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**10  # KiB


def test_what_is_no_file_is_refused(tmp_path):
    assert "no file" in refused(tmp_path / "absent.safetensors")
    assert "something else" in refused(tmp_path)


def test_a_file_that_shrinks_after_opening_is_refused_by_name(path):
    write_safetensors(path, VALUES)
    file = MappedFile(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="tensor 'b': the file has become shorter"):
        file.tensor("b")


# JSON-like values of the kinds that headers hold, and of kinds that they should not.
NUMBERS = st.one_of(st.integers(-2, 40), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(list(DTYPES)), NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
    },
)
HEADERS = st.dictionaries(st.text(max_size=4), st.one_of(ENTRIES, NUMBERS), max_size=3)


def opened_or_refused(path):
    """Reads everything that the header offers; nothing but one line may go wrong."""
    try:
        file = MappedFile(path)
    except ValueError as error:
        assert type(error) is ValueError
        line = str(error)
        assert line.startswith(str(path)) and "\n" not in line and len(line) < 1000
        return None
    total = sum(file.tensor(name).nbytes for name in file.entries)
    assert total <= path.stat().st_size
    return file


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    opened_or_refused(path)


@given(HEADERS, st.integers(0, 40), st.integers(-3, 3))
@example({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4, 0)
def test_random_headers_are_refused_or_read(tmp_path_factory, header, size, longer):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    content = bytearray(file_bytes(json.dumps(header).encode(), bytes(size)))
    content[0] = max(0, min(255, content[0] + longer))
    path.write_bytes(content)
    opened_or_refused(path)


@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 2))
def test_mutated_headers_are_refused_or_read(tmp_path_factory, changes, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = bytearray(file_bytes({"__metadata__": {"format": "pt"}} | header_of(VALUES), DATA))
    for at, byte in changes:
        content[at % (len(content) - len(DATA))] = byte
    path.write_bytes(content[: len(content) - cut])
    file = opened_or_refused(path)
    if file is not None and set(file.entries) == set(VALUES) and file.entries["a"].shape == (2, 3) and cut == 0:
        assert file.tensor("a").nbytes == 24


def test_what_is_written_is_read_back_by_another_reader(path):
    tensors = VALUES | {"empty": np.zeros((0, 2), np.float16), "s": np.array([[2, 0.5]], ml_dtypes.float8_e8m0fnu)}
    heard = []
    write_file(path, header_bytes(planned(tensors), {"format": "pt"}), planned(tensors), heard.append)
    read = read_safetensors(path)
    assert list(read) == list(tensors) and sum(heard) == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].tobytes() == tensor.tobytes()
    assert len(header_bytes(planned(tensors), {})) % 8 == 0


def test_a_header_is_kept_as_it_stands_only_if_it_says_the_same():
    header = {"__metadata__": {"k": "ü"}} | dict(reversed(header_of(VALUES).items()))
    odd = json.dumps(header, indent=3).encode() + b"   "
    tensors = planned(VALUES)
    assert header_bytes(tensors, {"k": "ü"}, odd)[8:] == odd
    assert header_bytes(tensors, {"k": "other"}, odd)[8:] != odd
    assert header_bytes(tensors[:1], {"k": "ü"}, odd)[8:] != odd


def test_a_file_that_cannot_be_finished_leaves_nothing_and_is_named(path, monkeypatch):
    write_safetensors(path, VALUES)
    before = path.read_bytes()

    def failing():
        yield VALUES["a"][:1]
        raise OSError(28, "No space left on device")

    tensors = [Planned("a", np.dtype(np.float32), (2, 3), failing)]
    with pytest.raises(OSError, match="x.safetensors could not be written: No space left"):
        write_file(path, header_bytes(tensors, {}), tensors)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
