"""Batches: resumable at any point, shuffled anew each epoch, held-out documents apart, every evaluated byte accounted for."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, TrainConfig
from dsv3_jax.data import Data, build_data, store
from oracles.texts import VOCAB_SIZE, WORDS, invented

TRAIN = TrainConfig(steps=1, batch_size=4, batch_size_start=4, micro_batch_size=2)


@pytest.fixture(scope="module")
def data(small) -> Data:
    return build_data(small, VOCAB_SIZE)


def plain(data: Data) -> Data:
    """The same data without anything random but the order."""
    return Data(replace(data.config, fim_rate=0.0, punctuation_split_rate=0.0), data.store)


def document_texts(data: Data, batches: list) -> list[str]:
    """The texts between BOS and EOS in the stream that the batches cover, the unfinished last one left out."""
    rows = np.concatenate([b["tokens"].reshape(-1, b["tokens"].shape[-1]) for b in batches])
    stream = np.concatenate([rows[0], *rows[1:, 1:]])
    parts = np.split(stream, np.flatnonzero(stream == data.tokenizer.bos))[1:-1]
    assert all(part[-1] == data.tokenizer.eos for part in parts)
    return [data.tokenizer.decode(part) for part in parts]


def test_batches_have_the_shape_of_the_interface(data):
    batch = next(data.train_batches(TRAIN))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: ((2, 2, 33), np.dtype(np.int32)) for name in ("tokens", "segment_ids", "domain_ids")
    }
    assert batch["tokens"].max() < VOCAB_SIZE and set(np.unique(batch["domain_ids"])) <= {0, 1, 2}


def test_an_epoch_has_every_training_document_once_and_the_next_one_another_order(data):
    batches = Data(replace(data.config, shuffle_windows=1), data.store).train_batches(TRAIN)  # windows in turn
    n = len(data.train_documents)
    texts: list[str] = []
    seen = []
    while len(texts) < 2 * n:
        seen.append(next(batches))
        texts = document_texts(plain(data), seen)
    # FIM moves text about but keeps its characters.
    epochs = [["".join(sorted(text)) for text in texts[i * n : (i + 1) * n]] for i in range(2)]
    expected = sorted("".join(sorted(data.store.text(int(i)).decode())) for i in data.train_documents)
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected and epochs[0] != epochs[1]


def test_a_restored_iterator_gives_the_same_batches_at_any_point(data):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, 250).tolist()  # of rows of 32 tokens: past the end of the first epoch
    running, states, batches = data.train_batches(TRAIN), [], []
    for size in sizes:
        states.append(json.dumps(running.get_state()))
        batches.append(running.next_batch(size))
    for first in [0, 1, len(sizes) - 3, *rng.integers(0, len(sizes) - 2, 7)]:
        restored = data.train_batches(TRAIN, start_state=json.loads(states[first]))
        for size, expected in list(zip(sizes, batches, strict=True))[first : first + 3]:
            got = restored.next_batch(size)
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name])


def test_the_order_of_asking_changes_nothing_about_a_document(data):
    first = [data._prepared(index, epoch) for epoch in (0, 1) for index in range(20)]
    again = [data._prepared(index, epoch) for epoch in (1, 0) for index in reversed(range(20))]
    for a, b in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert any(len(a.tokens) != len(b.tokens) for a, b in zip(first[:20], first[20:], strict=True))  # epochs differ


def test_the_seed_decides_both_the_order_and_what_happens_to_a_document(data):
    other = Data(replace(data.config, data_seed=1), data.store)
    orders = [next(plain(d).train_batches(TRAIN))["tokens"].tolist() for d in (data, data, other)]
    assert orders[0] == orders[1] != orders[2]
    documents = [[d._prepared(index, 0).tokens.tolist() for index in range(20)] for d in (data, data, other)]
    assert documents[0] == documents[1] != documents[2]


def test_fim_comes_at_its_rate_in_training_and_never_in_evaluation(data):
    for rate in (0.0, 0.4, 1.0):
        mixed = Data(replace(data.config, fim_rate=rate), data.store)
        begin, hole, end = data.tokenizer.fim
        found = 0
        for epoch, index in itertools.product(range(5), data.train_documents):
            tokens = mixed._prepared(int(index), epoch).tokens
            found += tokens[1] == begin
            marks = [int((tokens == token).sum()) for token in (begin, hole, end)]
            assert (
                marks == [int(tokens[1] == begin)] * 3 and tokens[0] == data.tokenizer.bos and tokens[-1] == data.tokenizer.eos
            )
        n = 5 * len(data.train_documents)
        assert abs(found - rate * n) <= 4 * (n * rate * (1 - rate)) ** 0.5  # four standard deviations
    for batch in data.eval_batches(4):
        assert not np.isin(batch["tokens"], [begin, hole, end]).any()


def test_punctuation_is_split_in_training_alone(data):
    split = Data(replace(data.config, punctuation_split_rate=1.0, fim_rate=0.0), data.store)
    merged = np.flatnonzero(data.tokenizer.merged[:, 0] >= 0)
    stored = np.concatenate([data.store.document(int(i)) for i in data.train_documents])
    prepared = np.concatenate([split._prepared(int(i), 0).tokens for i in data.train_documents])
    assert np.isin(stored, merged).sum() > 100 and not np.isin(prepared, merged).any()
    assert any(np.isin(batch["tokens"], merged).any() for batch in split.eval_batches(4))


def test_a_ramped_batch_has_its_trailing_rows_padded_and_loses_no_text(data):
    whole, ramped = data.train_batches(TRAIN), data.train_batches(TRAIN)
    rows = [next(whole)["tokens"].reshape(4, 33) for _ in range(2)]
    got = [ramped.next_batch(n) for n in (3, 1, 4)]
    assert all(batch["tokens"].shape == (2, 2, 33) for batch in got)
    assert (got[0]["segment_ids"].reshape(4, 33)[3] == 0).all() and (got[1]["segment_ids"].reshape(4, 33)[1:] == 0).all()
    taken = np.concatenate([got[0]["tokens"].reshape(4, 33)[:3], got[1]["tokens"].reshape(4, 33)[:1]])
    np.testing.assert_array_equal(taken, rows[0])
    np.testing.assert_array_equal(got[2]["tokens"].reshape(4, 33), rows[1])
    for n in (0, 5):
        with pytest.raises(ValueError, match=r"next_batch: expected 1..batch_size=4"):
            ramped.next_batch(n)


def test_held_out_text_is_not_in_the_training_text(data):
    training = b"\0".join(data.train_texts())
    held_out = [data.store.text(int(i)) for i in np.flatnonzero(data.store.held_out)]
    assert len(held_out) + len(data.train_documents) == 90 and len(held_out) >= 9
    assert not any(text in training for text in held_out)


def test_the_tokenizer_learns_from_training_documents_alone(small, data, tmp_path, monkeypatch):
    learned = []
    monkeypatch.setattr(store, "train_tokenizer", lambda texts, size: learned.extend(texts) or data.tokenizer)
    built = build_data(replace(small, cache_dir=str(tmp_path)), VOCAB_SIZE)
    assert [text.encode() for text in learned] == list(built.train_texts())


def test_evaluated_bytes_are_those_of_the_targets_in_every_domain(data):
    counted = np.zeros(3, np.int64)
    rows = 0
    for batch in data.eval_batches(4):
        assert batch["tokens"].shape == (1, 4, 33)
        segments, domains = batch["segment_ids"], batch["domain_ids"]
        valid = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
        np.add.at(counted, domains[..., 1:][valid], data.tokenizer.n_bytes[batch["tokens"][..., 1:][valid]])
        rows += (segments[0, :, 0] > 0).sum()
    np.testing.assert_array_equal(counted, data.eval_bytes)
    assert (counted > 0).all() and rows == data.config.eval_sequences
    held_out = [data.store.text(int(i)) for i in np.flatnonzero(data.store.held_out)]
    assert [sum(map(len, texts)) for texts in data.eval_texts] == counted.tolist()
    assert all(any(text in document for document in held_out) for texts in data.eval_texts for text in texts)


def test_evaluation_is_the_same_for_every_batch_size_and_call(data):
    def rows(batch_size):
        stacked = np.concatenate([b["tokens"][0] for b in data.eval_batches(batch_size)])
        return stacked[: data.config.eval_sequences]

    np.testing.assert_array_equal(rows(2), rows(5))
    np.testing.assert_array_equal(rows(5), rows(5))


def test_scarce_held_out_text_is_evaluated_whole(data):
    everything = Data(replace(data.config, eval_sequences=10_000), data.store)
    held_out = [row["held_out_bytes"] for row in data.summary["domains"].values()]
    assert everything.eval_bytes.tolist() == held_out


def test_the_summary_is_json_and_adds_up(data):
    summary = json.loads(json.dumps(data.summary))
    assert list(summary["domains"]) == sorted(WORDS) == list(data.domains)
    for row in summary["domains"].values():
        assert row["documents"] == 30 == row["train_documents"] + row["held_out_documents"]
        assert row["bytes"] == row["train_bytes"] + row["held_out_bytes"] and len(row["sha256"]) == 64
    assert sum(r["train_tokens"] + r["held_out_tokens"] for r in summary["domains"].values()) == len(data.store.tokens)


def test_tokens_stay_on_disk(data):
    assert isinstance(data.store.tokens, np.memmap) and data.store.tokens.dtype == np.int32
    assert isinstance(data.store.document(3).base, np.memmap)


def test_a_second_start_reads_the_cache_and_any_change_misses_it(small, data, monkeypatch):
    folder = data.store.folder
    built = []
    monkeypatch.setattr(store, "_build", lambda *args: built.append(args) or (_ for _ in ()).throw(OSError("no space")))
    assert build_data(small, VOCAB_SIZE).store.folder == folder and not built
    assert build_data(replace(small, seq_len=64, fim_rate=0.0, data_seed=5), VOCAB_SIZE).store.folder == folder
    for changed, size in ((replace(small, holdout_fraction=0.3), VOCAB_SIZE), (small, VOCAB_SIZE + 1)):
        with pytest.raises(OSError, match="no space"):
            build_data(changed, size)
    assert len(built) == 2
    assert [path for path in folder.parent.iterdir() if path.name.startswith("building")] == []


def test_a_vocabulary_that_is_too_small_is_refused_before_the_corpus_is_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "load_corpus", lambda data: pytest.fail("read the corpus first"))
    with pytest.raises(ValueError, match="vocab_size: expected at least 266"):
        build_data(replace(small, cache_dir=str(tmp_path)), 265)
    assert list(tmp_path.iterdir()) == []


def test_other_code_makes_another_store(small, monkeypatch):
    before = store._key(small, VOCAB_SIZE)
    assert store._key(small, VOCAB_SIZE) == before
    monkeypatch.setattr(store, "CODE", store.CODE[1:])
    assert store._key(small, VOCAB_SIZE) != before


def test_of_two_builders_the_second_uses_the_first_ones_work(small, tmp_path, monkeypatch):
    config = replace(small, cache_dir=str(tmp_path))
    build = store._build

    def beaten(folder, *args):
        build(folder, *args)
        shutil.copytree(folder, tmp_path / f"tokens-{args[-1]}")  # the other process renames its own first

    monkeypatch.setattr(store, "_build", beaten)
    assert build_data(config, VOCAB_SIZE).tokenizer.size == VOCAB_SIZE
    assert len(list(tmp_path.iterdir())) == 1


def test_a_released_tokenizer_is_used_and_checked(small, data, tmp_path):
    config = replace(small, tokenizer=str(data.store.folder / "tokenizer.json"), cache_dir=str(tmp_path))
    assert build_data(config, VOCAB_SIZE).store.folder != data.store.folder
    with pytest.raises(ValueError, match=rf"ids up to {VOCAB_SIZE - 1}, but vocab_size is 300"):
        build_data(config, 300)
    with pytest.raises(ValueError, match="tokenizer: no file"):
        build_data(replace(config, tokenizer="absent.json"), VOCAB_SIZE)


def test_fim_without_its_tokens_is_refused(small, data, tmp_path):
    text = (data.store.folder / "tokenizer.json").read_text(encoding="utf-8").replace("<｜fim▁hole｜>", "<｜something｜>")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    config = replace(small, tokenizer=str(tmp_path / "tokenizer.json"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="fim_rate: tokenizer .* has no fill-in-the-middle tokens; set fim_rate=0"):
        build_data(config, VOCAB_SIZE)
    assert next(build_data(replace(config, fim_rate=0.0), VOCAB_SIZE).train_batches(TRAIN))["tokens"].shape == (2, 2, 33)


def test_a_tokenizer_that_loses_bytes_is_refused(small, data, tmp_path):
    content = json.loads((data.store.folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = replace(small, tokenizer=str(tmp_path / "tokenizer.json"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer: it loses bytes of"):
        build_data(config, VOCAB_SIZE)


def test_one_text_file_is_enough_when_it_is_long(tmp_path):
    (tmp_path / "play.txt").write_text("".join(invented("prose", seed, 20_000) for seed in range(4)))
    config = DataConfig(corpus=str(tmp_path / "play.txt"), cache_dir=str(tmp_path / "cache"), seq_len=32)
    built = build_data(config, VOCAB_SIZE)
    assert built.domains == (Path(tmp_path).name,) and built.eval_bytes[0] > 1000
