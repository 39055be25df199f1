"""The program that continues prompts: text to stdout as it comes, a report to stderr, mistakes in one line."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from absl import flags

from dsv3_jax.data.tokenizer import ASSISTANT, BOS, EOS, USER, train_tokenizer
from dsv3_jax.inference.generate import Statistics
from dsv3_jax.inference.talk import Reply
from experiments import generate
from oracles.decoding import TINY, successor_tensors
from oracles.released_folder import released_config, write_folder

TOKENIZER = train_tokenizer(["a"], 266)  # special tokens and bytes
ANSWER = " né🌹日b."  # no byte twice, so that every token has one successor
USUAL = {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_model(folder, depths):
    """Continues `a`, and opens an assistant's turn, with ANSWER and an end."""
    released = released_config(**TINY | {"vocab_size": 266, "hidden_size": 32, "num_nextn_predict_layers": depths})
    ids = [*TOKENIZER.encode(ANSWER), TOKENIZER.eos]
    starts = [(start, ids[0]) for start in (*TOKENIZER.encode("a"), TOKENIZER.turns[1])]
    tensors = successor_tensors(released, [*starts, *zip(ids, ids[1:], strict=False)], noise=0.05)
    (one, _), (other, _) = starts
    tensors["model.embed_tokens.weight"][one] = tensors["model.embed_tokens.weight"][other]  # both have the same successor
    for depth in range(depths):
        prefix = f"model.layers.{released['num_hidden_layers'] + depth}."
        tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"]
    write_folder(folder, released, {name: t.astype(np.float32) for name, t in tensors.items()})
    TOKENIZER.backend.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), depths=1)


def call(*arguments):
    """The program's main with its own set of flags: other programs define flags of the same names."""
    values = flags.FlagValues()
    generate.define_flags(values)
    values(["generate", *arguments])
    return generate.main(values)


def test_a_prompt_is_continued_to_its_end(folder, capsys):
    assert call(f"--checkpoint={folder}", "--prompt=a", "--max_new_tokens=99") == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n"
    assert err.count("\n") == 1 and err.startswith("2 tokens in ") and f"{len(ANSWER.encode()) + 1} new ones" in err


@pytest.mark.slow
def test_stop_strings_and_max_new_tokens_cut_it(folder, capsys):
    assert call(f"--checkpoint={folder}", "--prompt=a", "--max_new_tokens=99", "--stop=日b", "--stop=no") == 0
    assert capsys.readouterr().out == " né🌹\n"
    assert call(f"--checkpoint={folder}", "--prompt=a", "--max_new_tokens=2") == 0
    assert capsys.readouterr().out == " n\n"


@pytest.mark.slow
def test_drafts_give_the_same_text_and_are_reported(folder, capsys):
    assert call(f"--checkpoint={folder}", "--prompt=a", "--speculative") == 0
    out, err = capsys.readouterr()
    assert out == ANSWER + "\n" and "% of the drafts accepted" in err and "tokens a step" in err


@pytest.fixture
def asked(monkeypatch):
    """Prompts that a faked `reply` was asked to continue; it answers A0, A1, ..."""
    prompts = []

    def faked(speaker, wanted, *, show, **options):
        texts = [f"A{len(prompts) + i}" for i in range(len(wanted))]
        prompts.extend(wanted)
        for i, text in enumerate(texts):
            show(i, text)
        return Reply(texts, [[0]] * len(texts), Statistics(**dict.fromkeys(Statistics._fields, 1)))

    monkeypatch.setattr(generate, "reply", faked)
    return prompts


def test_several_prompts_are_told_apart(folder, asked, capsys):
    assert call(f"--checkpoint={folder}", "--prompt=one", "--prompt=two") == 0
    assert capsys.readouterr().out == "[0] one\nA0\n\n[1] two\nA1\n"
    assert asked == [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in ("one", "two")]


def test_a_conversation_is_laid_out_with_its_earlier_turns(folder, asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nWhy?\n"))
    assert call(f"--checkpoint={folder}", "--chat", "--system=Be.") == 0
    assert capsys.readouterr().out == "A0\nA1\n\n"
    user, assistant = TOKENIZER.turns
    begin = [TOKENIZER.bos, *TOKENIZER.encode("Be."), user, *TOKENIZER.encode("Hi"), assistant]
    assert asked == [begin, [*begin, *TOKENIZER.encode("A0"), TOKENIZER.eos, user, *TOKENIZER.encode("Why?"), assistant]]


def test_without_chat_each_line_is_a_prompt_of_its_own(folder, asked, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert call(f"--checkpoint={folder}") == 0
    assert asked == [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in ("one", "two")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint: expected a folder, got none"),
        (["--checkpoint=/no/such"], "/no/such: expected a checkpoint's folder, got nothing"),
        (["--checkpoint=FOLDER", "--dtype=float16"], "--dtype: expected one of .*, got 'float16'"),
        (["--checkpoint=FOLDER", "--system=Be.", "--prompt=a"], "--system: expected together with --chat"),
        (["--checkpoint=FOLDER", "--top_p=1.5", "--prompt=a"], "top_p: expected 0 < top_p <= 1, got 1.5"),
        (["--checkpoint=FOLDER", "--max_new_tokens=0", "--prompt=a"], "max_new_tokens: expected at least 1, got 0"),
        (["--checkpoint=FOLDER", "--stop=", "--prompt=a"], "stop: expected a list of strings, none of them empty.*"),
        (["--checkpoint=FOLDER", "--average", "--prompt=a"], ".*: only a training run has averaged weights"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, message, folder, capsys):
    with pytest.raises(ValueError, match=f"^{message}$") as error:
        call(*(argument.replace("FOLDER", folder) for argument in arguments))
    assert "\n" not in str(error.value) and not capsys.readouterr().out


def test_what_a_folder_lacks_is_said_in_one_line(tmp_path):
    here = f"--checkpoint={write_model(tmp_path, depths=0)}"
    with pytest.raises(ValueError, match="^speculative: this model has no MTP module to draft with; leave it out$"):
        call(here, "--speculative", "--prompt=a")
    without_turns = json.loads((tmp_path / "tokenizer.json").read_text())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate((BOS, EOS, *"abc"))}, []))
    assert USER in {t["content"] for t in without_turns["added_tokens"]} >= {ASSISTANT}
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"^tokenizer: expected {USER} and {ASSISTANT} among its tokens, got one without"):
        call(here, "--chat", "--prompt=a")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=".*: has no tokenizer.json; copy the model's there to generate text$"):
        call(here, "--prompt=a")


def program(*arguments, **options):
    command = [sys.executable, "-m", "experiments.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | USUAL, **options)


@pytest.mark.parametrize(
    "argument", ["--temprature=1", *(pytest.param(a, marks=pytest.mark.slow) for a in ("--checkpoint=/no/such", "prompt"))]
)
def test_the_program_ends_with_status_2_and_one_line(argument):
    done = program(argument)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_pipe_is_a_conversation(folder):
    done = program(f"--checkpoint={folder}", "--chat", input="Hi\nOh\n")
    assert done.returncode == 0 and done.stdout == f"{ANSWER}\n{ANSWER}\n\n" and done.stderr.count(" new ones") == 2
