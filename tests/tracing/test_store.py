"""A trace on disk: written in parts, continued, read through maps; whatever is not whole or not a trace is one line."""

import io
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.tracing import diff
from dsv3_jax.tracing.engines import to_engine
from dsv3_jax.tracing.store import Choices, Text, Writer, about_model, expert_dtype, kinds, layer_names, open_trace

CONFIG = ModelConfig(
    num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=16, num_experts_per_tok=2, n_group=4, topk_group=2,
    num_nextn_predict_layers=1,
)  # fmt: skip
FLIPS = 200
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


def write(folder, batches=((0, 1), (2,)), text=TEXT, choices=choices):
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
    again = write(tmp_path / "trace")
    assert (again.done, again.written) == (2, 20)
    assert Writer(tmp_path / "trace", about(), TEXT, groups=4, scores=True).done == 2
    again.finish()
    assert not (tmp_path / "trace" / "progress.json").exists()
    write(tmp_path / "once").finish()
    for name in ("experts", "gates", "margins", "groups", "scores"):
        assert (tmp_path / "trace" / f"{name}.npy").read_bytes() == (tmp_path / "once" / f"{name}.npy").read_bytes()
    with pytest.raises(ValueError, match="exists; name another folder"):
        write(tmp_path / "trace")


@pytest.mark.parametrize(
    ("model", "text", "how"),
    [
        ("other", {}, {}),
        ("m", {}, {"groups": 0}),
        ("m", {}, {"scores": False}),
        ("m", {"tokens_N": TEXT.tokens_N + 1}, {}),
        ("m", {"starts": np.array([0, 4, 12, 20])}, {}),
        ("m", {"document_of": np.array([0, 1, 2])}, {}),
        ("m", {"domain_of": np.array([0, 0, 0])}, {}),
    ],
)
def test_what_was_begun_of_another_model_text_or_with_other_files_is_not_continued(tmp_path, model, text, how):
    write(tmp_path / "trace", batches=((0, 1),))
    with pytest.raises(ValueError, match="begun with another model, text or flags"):
        Writer(tmp_path / "trace", about(model=model), TEXT._replace(**text), **{"groups": 4, "scores": True} | how)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "progress.json").write_text("{}"), r"progress\.json: expected the batches and the tokens"),
        (lambda f: change(f, "progress.json", batches=99), r"progress\.json: expected the batches and the tokens"),
        (lambda f: change(f, "progress.json", batches=0), r"progress\.json: expected the batches and the tokens"),
        (lambda f: change(f, "progress.json", tokens=21), r"progress\.json: expected the batches and the tokens"),
        (lambda f: change(f, "progress.json", batches=True), r"progress\.json: expected the batches and the tokens"),
        (lambda f: (f / "progress.json").unlink(), r"progress\.json: expected a file of the trace, got none"),
        (lambda f: (f / "trace.json").unlink(), r"trace\.json: expected a file of the trace, got none"),
        (lambda f: cut("gates.npy")(f), r"gates\.npy: not a whole \.npy file"),
        (lambda f: np.save(f / "gates.npy", np.zeros((20, 4, 1), np.float16)), r"gates\.npy: expected shape \[20, 4, 2\]"),
        (lambda f: np.save(f / "margins.npy", np.zeros((20, 4))), r"margins\.npy: expected float16, got float64"),
        (lambda f: np.save(f / "tokens.npy", np.arange(20, dtype=np.int32)[::-1]), "expected the text that was traced"),
    ],
)
def test_what_was_begun_and_damaged_is_not_continued(tmp_path, damage, message):
    write(tmp_path / "trace", batches=((0, 1),))
    damage(tmp_path / "trace.part")
    with pytest.raises(ValueError, match=message) as error:
        write(tmp_path / "trace")
    assert str(error.value).startswith("--out: what was begun is damaged") and str(error.value).endswith("trace.part")
    assert "\n" not in str(error.value)


def test_a_kill_in_the_middle_of_finishing_leaves_a_whole_trace(tmp_path, monkeypatch):
    def killed(*given, **how):
        raise KeyboardInterrupt

    writer = write(tmp_path / "trace")
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    assert open_trace(tmp_path / "trace").n_tokens == 20


def test_a_trace_that_is_not_all_there_is_not_finished(tmp_path):
    with pytest.raises(ValueError, match=r"--out: expected 20 tokens, got 12; remove .*trace\.part"):
        write(tmp_path / "trace", batches=((0, 1),)).finish()


def test_a_begin_that_was_killed_leaves_nothing_that_counts(tmp_path):
    (tmp_path / "trace.part.new").mkdir()
    (tmp_path / "trace.part.new" / "experts.npy").write_bytes(b"half")
    write(tmp_path / "trace").finish()
    assert open_trace(tmp_path / "trace").n_tokens == 20


def test_experts_take_as_few_bytes_as_their_number_allows():
    assert expert_dtype(16) == expert_dtype(255) == np.uint8 and expert_dtype(256) == np.uint16
    files = kinds(about(), TEXT, 0, False)
    assert set(files) == {"experts", "gates", "margins"} and files["experts"] == ((20, 4, 2), np.uint8)
    assert [kinds(about(), TEXT, n, False)["groups"][1] for n in (8, 9)] == [np.uint8, np.uint16]


def change(folder, name="trace.json", **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without(name):
    def damage(folder):
        path = folder / "trace.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return damage


def archive():
    file = io.BytesIO()
    np.savez(file, np.arange(20, dtype=np.int32))
    return file.getvalue()


def header_of(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


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
        (lambda f: (f / "trace.json").write_text("[" * 100_000), r"trace\.json: not JSON"),
        (lambda f: change(f, format="other"), "expected format 'dsv3_jax.routing_trace', version 2, got format 'other'"),
        (lambda f: change(f, format=["\n"] * 9), "version 2, got format list"),
        (lambda f: change(f, version=1), "version 2, got .*, version 1"),
        (without("groups"), r"trace\.json: expected a field 'groups', got none"),
        (without("scores"), r"trace\.json: expected a field 'scores', got none"),
        (without("layers"), r"trace\.json: expected a field 'layers', got none"),
        (lambda f: change(f, groups="4"), "groups: expected int, got '4'"),
        (lambda f: change(f, groups=5), "expected groups 0 or 4, .*, got groups 5"),
        (lambda f: change(f, batch_tokens=0), "batch_tokens of at least 1, got .* 0"),
        (lambda f: change(f, batch_tokens=True), "batch_tokens: expected int, got True"),
        (lambda f: change(f, layers=3), "layers: expected strings, got 3"),
        (lambda f: change(f, layers=[1, 2, 3, 4]), "layers: expected strings, got list"),
        (
            lambda f: change(f, layers=["1", "2", "9", "mtp 1"]),
            r"layers: expected \('1', '2', '3', 'mtp 1'\), as in the config",
        ),
        (lambda f: change(f, domains=None), "domains: expected strings, got None"),
        (lambda f: change(f, domains=["web", "code", "more"]), "expected the text that was traced"),
        (lambda f: change(f, domains=["web"]), r"domain_of: expected 0\.\.0, got 0\.\.1"),
        (lambda f: change(f, config={}), "config: expected that of the digest beside it"),
        (lambda f: change(f, config={}, config_digest=replace(about(), config={}).architecture), "the fields of a model"),
        (lambda f: change(f, config_digest="0"), "config: expected that of the digest beside it"),
        (lambda f: change(f, text="0"), "expected the text that was traced"),
        (lambda f: change(f, n_tokens=21), r"tokens\.npy: expected shape \[21\], got \[20\]"),
        (lambda f: change(f, top_k=3), "top_k: expected 2, as in the config, got 3"),
        (lambda f: change(f, n_experts=17), "n_experts: expected 16, as in the config, got 17"),
        (lambda f: np.save(f / "margins.npy", np.zeros((20, 4))), r"margins\.npy: expected float16, got float64"),
        (lambda f: np.save(f / "gates.npy", np.zeros((20, 4, 1), np.float16)), r"gates\.npy: expected shape \[20, 4, 2\]"),
        (lambda f: np.save(f / "starts.npy", np.array([0, 12, 7, 20])), "other bounds"),
        (lambda f: np.save(f / "starts.npy", np.array([0, 7, 7, 20])), "none of them empty, got other bounds"),
        (lambda f: np.save(f / "starts.npy", np.array([1, 7, 12, 20])), "other bounds"),
        (lambda f: np.save(f / "starts.npy", np.array([0, 7, 12, 19])), "other bounds"),
        (lambda f: np.save(f / "starts.npy", np.array([[0, 7, 12, 20]])), r"starts\.npy: expected shape \[any\], got \[1, 4\]"),
        (lambda f: np.save(f / "starts.npy", np.array([0, 8, 12, 20])), "expected the text that was traced, got other tokens"),
        (lambda f: np.save(f / "domain_of.npy", np.array([1, 0], np.int32)), "expected a document and a domain of 3 sequences"),
        (lambda f: np.save(f / "document_of.npy", np.zeros(4, np.int32)), "expected a document and a domain of 3 sequences"),
        (lambda f: np.save(f / "domain_of.npy", np.array([1, 0, -1], np.int32)), r"domain_of: expected 0\.\.1, got -1\.\.1"),
        (lambda f: np.save(f / "domain_of.npy", np.array([1, 1, 0], np.int32)), "expected the text that was traced"),
        (lambda f: np.save(f / "tokens.npy", TEXT.tokens_N + 1), "expected the text that was traced, got other tokens"),
        (lambda f: np.save(f / "tokens.npy", np.array(7, np.int32)), r"tokens\.npy: expected shape \[20\], got \[\]"),
        (lambda f: (f / "tokens.npy").write_bytes(pickle.dumps([1])), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: np.save(f / "tokens.npy", np.array([{}] * 20)), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: (f / "tokens.npy").write_bytes(archive()), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: (f / "tokens.npy").write_bytes(header_of("{'descr': '<i4', (")), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: (f / "tokens.npy").write_bytes(header_of("-" * 9000 + "1")), r"tokens\.npy: not a whole \.npy file"),
        (lambda f: (f / "gates.npy").write_bytes((f / "gates.npy").read_bytes() + b"x"), "expected 320 bytes of numbers"),
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

    ours = digest()
    assert ours == digest(compute_dtype="bfloat16", experts_implementation="dense") == about().architecture
    assert ours == digest(param_dtype="bfloat16")
    assert digest() != digest(routed_scaling_factor=1.5)


def whole_choices(n, seed):
    """What a router may have chosen: the last layer of the last token none."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((n, 4, 16)), axis=-1)[..., :2]
    experts[-1, 3] = 16
    return choices(n, seed)._replace(experts_NLK=experts)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [((3, 1), 17, r"expected 0\.\.16, got 0\.\.17"), ((3, 1, 0), 16, "got a part; the trace is damaged")],
)
def test_experts_that_no_router_chose_are_seen_where_they_are_read(tmp_path, place, value, message):
    write(tmp_path / "trace", choices=whole_choices).finish()
    experts = np.load(tmp_path / "trace" / "experts.npy")
    experts[0, 0, 0], experts[0, 0, 1] = 0, 1
    np.save(tmp_path / "trace" / "experts.npy", experts)
    np.testing.assert_array_equal(open_trace(tmp_path / "trace").experts_of(slice(0, 20)), experts)
    experts[place] = value
    np.save(tmp_path / "trace" / "experts.npy", experts)
    found = open_trace(tmp_path / "trace")
    assert found.experts_of(slice(4, 20)).dtype == np.int32
    for read in (lambda: found.experts_of(slice(0, 4)), lambda: to_engine(found, 0), lambda: diff.compare(found, found)):
        with pytest.raises(ValueError, match=message):
            read()


def test_a_text_whose_labels_do_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"text: domain_of: expected 0\.\.1, got 0\.\.2"):
        write(tmp_path / "trace", text=TEXT._replace(domain_of=np.array([0, 1, 2])))
    assert not list(tmp_path.iterdir())


def test_flipped_bytes_never_raise_more_than_one_line(tmp_path):
    write(tmp_path / "whole", choices=whole_choices).finish()
    write(tmp_path / "begun", choices=whole_choices, batches=((0, 1),))
    reference, rng, refused = open_trace(tmp_path / "whole"), np.random.default_rng(0), 0

    def read(folder):
        found = open_trace(folder)
        diff.table(diff.compare(found, reference))
        diff.compare(reference, found)
        for i in range(3):
            to_engine(found, i, "all")

    def go_on(folder):
        write(folder.with_suffix(""), choices=whole_choices).finish()

    for trial in range(FLIPS):
        kind, use = (("whole", read), ("begun.part", go_on))[trial % 4 == 0]
        folder = tmp_path / ("t.part" if use is go_on else "t")
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        shutil.rmtree(tmp_path / "t.part", ignore_errors=True)
        shutil.copytree(tmp_path / kind, folder)
        path = rng.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        at = rng.integers(0, min(len(content), 128 if rng.random() < 0.5 else 1 << 30))  # headers are where it hurts
        content[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(content)
        try:
            use(folder)
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
    assert FLIPS // 3 < refused < FLIPS
