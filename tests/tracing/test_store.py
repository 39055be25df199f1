"""A trace on disk: written in parts, continued, read through maps; whatever is not whole or not a trace is one line."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.tracing.store import Choices, Text, Writer, about_model, expert_dtype, kinds, layer_names, open_trace

CONFIG = ModelConfig(
    num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2,
    num_nextn_predict_layers=1,
)  # fmt: skip
TEXT = Text(np.arange(20, dtype=np.int32), np.array([0, 7, 12, 20]), np.array([0, 1, 1]), np.array([1, 0, 0]), ("web", "code"))


def about(**changes):
    fields = {
        "model": "m",
        "tokenizer": None,
        "domains": TEXT.domains,
        "source": "test",
        "batch_tokens": 8,
        "how": {"dtype": "x"},
    }
    return about_model(CONFIG, **fields | changes)


def choices(n, seed):
    rng = np.random.default_rng(seed)
    return Choices(
        rng.integers(0, 17, (n, 4, 2)),
        rng.random((n, 4, 2)),
        rng.random((n, 4)),
        rng.integers(0, 16, (n, 4)),
        rng.random((n, 4, 16)),
    )


def write(folder, batches=((0, 1), (2,)), text=TEXT):
    writer = Writer(folder, about(), text, groups=4, scores=True)
    for number, batch in enumerate(batches):
        if number >= writer.done:
            writer.write([text.sequence(i) for i in batch], [choices(int(text.lengths[i]), i) for i in batch])
    return writer


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path / "trace").finish()
    trace = open_trace(tmp_path / "trace")
    assert trace.about == about() and trace.about.layers == ("1", "2", "3", "mtp 1") == layer_names(CONFIG)
    for i in range(3):
        place = trace.text.sequence(i)
        for found, expected in zip(trace.choices, choices(place.stop - place.start, i), strict=True):
            assert isinstance(found, np.memmap)
            np.testing.assert_array_equal(found[place], expected.astype(found.dtype))
    for found, expected in zip(trace.text, TEXT, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(trace.of_tokens(trace.text.domain_of), [1] * 7 + [0] * 13)
    assert trace.layer("mtp 1") == 3
    with pytest.raises(ValueError, match="layer: expected one of 1, 2, 3, mtp 1, got '0'"):
        trace.layer("0")
    assert not (tmp_path / "trace.part").exists()


def test_an_interrupted_trace_is_continued_and_only_whole_there(tmp_path):
    write(tmp_path / "trace", batches=((0, 1),))
    assert not (tmp_path / "trace").exists()
    with pytest.raises(ValueError, match="begun with another model, text or flags"):
        Writer(tmp_path / "trace", about(model="other"), TEXT, groups=4, scores=True)
    again = write(tmp_path / "trace")
    assert again.done == 2
    again.finish()
    write(tmp_path / "once").finish()
    for name in ("experts", "gates", "margins", "groups", "scores"):
        assert (tmp_path / "trace" / f"{name}.npy").read_bytes() == (tmp_path / "once" / f"{name}.npy").read_bytes()
    with pytest.raises(ValueError, match="exists; name another folder"):
        write(tmp_path / "trace")


def test_a_begin_that_was_killed_leaves_nothing_that_counts(tmp_path):
    (tmp_path / "trace.part.new").mkdir()
    (tmp_path / "trace.part.new" / "experts.npy").write_bytes(b"half")
    write(tmp_path / "trace").finish()
    assert open_trace(tmp_path / "trace").n_tokens == 20


def test_experts_take_as_few_bytes_as_their_number_allows():
    assert expert_dtype(16) == expert_dtype(255) == np.uint8 and expert_dtype(256) == np.uint16
    files = kinds(about(), TEXT, 0, False)
    assert set(files) == {"experts", "gates", "margins"} and files["experts"] == ((20, 4, 2), np.uint8)


def change(folder, **fields):
    path = folder / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-3])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("experts.npy"), r"experts\.npy: not a whole \.npy file"),
        (cut("tokens.npy"), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: (f / "gates.npy").unlink(), r"gates\.npy: expected a file of the trace, got none"),
        (lambda f: (f / "trace.json").write_text("{"), r"trace\.json: not JSON"),
        (lambda f: (f / "trace.json").write_text("[]"), r"trace\.json: expected an object, got list"),
        (lambda f: (f / "trace.json").unlink(), r"trace\.json: expected a file of the trace, got none"),
        (lambda f: change(f, format="other"), "expected format 'dsv3_jax.routing_trace', version 1, got format 'other'"),
        (lambda f: change(f, version=2), "version 2"),
        (lambda f: change(f, n_tokens=21), "expected sequences of 21 tokens in all, got 20"),
        (lambda f: change(f, top_k=3), r"experts\.npy: expected shape \[20, 4, 3\], got \[20, 4, 2\]"),
        (lambda f: np.save(f / "margins.npy", np.zeros((20, 4))), r"margins\.npy: expected float16, got float64"),
        (lambda f: np.save(f / "starts.npy", np.array([0, 12, 7, 20])), "other bounds"),
    ],
)
def test_what_is_no_whole_trace_is_one_line(tmp_path, damage, message):
    write(tmp_path / "trace").finish()
    damage(tmp_path / "trace")
    with pytest.raises(ValueError, match=message) as error:
        open_trace(tmp_path / "trace")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_folder_and_a_file_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, got in (("none", "nothing"), ("file", "a file")):
        with pytest.raises(ValueError, match=f"expected the folder of a routing trace, got {got}"):
            open_trace(tmp_path / name)


def test_the_architecture_s_digest_is_not_of_how_numbers_are_computed():
    def digest(**changes):
        rest = {"model": "", "tokenizer": None, "domains": (), "source": "", "batch_tokens": 1, "how": {}}
        return about_model(replace(CONFIG, **changes), **rest).architecture

    assert digest() == digest(compute_dtype="bfloat16", experts_implementation="dense") == about().architecture
    assert digest() != digest(routed_scaling_factor=1.5)
