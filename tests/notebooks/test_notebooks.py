"""Every notebook runs, smoke-sized, and its two files have the same cells, without output."""

import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from matplotlib.figure import Figure

from dsv3_jax.settings import override
from experiments import trace
from oracles.cases import DATA
from oracles.micro import micro_config
from oracles.run_folders import write_checkpoints, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(ROOT.glob("*.py"))
SETTINGS = ("DSV3_TRACE", "DSV3_TOKENIZER", "DSV3_CHECKPOINT", "DSV3_TOKENS", "DSV3_RUNS", "DSV3_TRACES")


@pytest.fixture
def made(monkeypatch):
    """Figures, as they are made."""
    found, plain = [], Figure.__init__

    def recorded(self, *arguments, **keywords):
        plain(self, *arguments, **keywords)
        found.append(self)

    monkeypatch.setattr(Figure, "__init__", recorded)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return found


def check_figures(figures):
    """They draw, and say what their axes are."""
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=40)
        shown = [ax for ax in figure.axes if ax.axison]
        assert shown and all(ax.get_xlabel() or ax.get_ylabel() for ax in shown)


def cells_of_source(path):
    """Of jupytext's percent format: [(kind, text)]."""
    header, body = path.read_text().split("\n# ---\n", 1)
    assert "formats: ipynb,py:percent" in header
    first, *parts = re.split(r"^# %%(?: (\[markdown\]))?\n", body, flags=re.M)
    assert not first.strip()
    cells = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        if mark:
            lines = text.strip().split("\n")
            assert all(line == "#" or line.startswith("# ") for line in lines)
            cells.append(("markdown", "\n".join(line[2:] for line in lines)))
        else:
            cells.append(("code", re.sub(r"^# %(?=\w)", "%", text.strip(), flags=re.M)))
    return cells


def cells_of_notebook(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (not cell["outputs"] and cell["execution_count"] is None)
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def test_there_are_notebooks():
    assert "routing_analysis.py" in [path.name for path in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_both_files_of_a_notebook_have_the_same_cells_and_no_output(path):
    assert cells_of_notebook(path.with_suffix(".ipynb")) == cells_of_source(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_figures_draw(path, made):
    runpy.run_path(str(path))
    assert made
    check_figures(made)


@pytest.fixture
def token_trace(tmp_path):
    """Of a released-format checkpoint over tokens: no domains, no text."""
    return trace_of_tokens(tmp_path, "trace")


def trace_of_tokens(folder, name, *flags, seed=0):
    tokens, out = folder / f"{seed}.npy", folder / name
    np.save(tokens, np.random.default_rng(seed).integers(0, 512, (4, 16)))
    values = absl_flags.FlagValues()
    trace.define_flags(values)
    values(["trace", f"--checkpoint={DATA / 'mtp'}", f"--data={tokens}", f"--out={out}", "--seq_len=16", *flags])
    assert trace.main(values) == 0
    return out


def test_routing_analysis_shows_a_trace_of_tokens(token_trace, made, monkeypatch, capsys):
    monkeypatch.setenv("DSV3_TRACE", str(token_trace))
    found = runpy.run_path(str(ROOT / "routing_analysis.py"))
    assert found["trace"].n_tokens == 64 and found["layers"] == ("1", "2", "mtp 1") and not found["tests"]
    assert "nothing to compare with" in capsys.readouterr().out
    check_figures(made)
    assert len(made) == 8  # all but the one that compares domains
    texts = [text.get_text() for text in made[-1].axes[0].texts]
    experts = found["choices"].experts_NLK[:16, 2, 0]
    assert texts[::2] == [f"[{i}]" for i in found["text"].tokens_N[:16]]
    assert texts[1::2] == [str(e) for e in experts[:-1]] + ["-"]  # MTP's last has nothing to look ahead at


def test_routing_analysis_refuses_another_model_s_tokenizer(token_trace, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("DSV3_TRACE", str(token_trace))
    monkeypatch.setenv("DSV3_TOKENIZER", str(tmp_path))
    with pytest.raises(ValueError, match=r"has not the tokenizer that .* was made with") as error:
        runpy.run_path(str(ROOT / "routing_analysis.py"))
    assert "\n" not in str(error.value)


def test_mla_cache_shows_a_checkpoint_stored_in_fp8(tmp_path, made, monkeypatch, capsys):
    tokens = np.random.default_rng(0).integers(0, 512, (4, 70))
    np.save(tmp_path / "tokens.npy", tokens)
    monkeypatch.setenv("DSV3_CHECKPOINT", str(DATA / "fp8"))
    monkeypatch.setenv("DSV3_TOKENS", str(tmp_path / "tokens.npy"))
    found = runpy.run_path(str(ROOT / "mla_cache.py"))
    np.testing.assert_array_equal(found["tokens"], tokens)
    study, width = found["study"], found["config"].kv_lora_rank
    assert study.ranks[-1] == width and study.nll_N.shape == (2 * 69,) and study.absorbed_L.max() < 1e-5
    np.testing.assert_allclose(study.nll_RN[-1], study.nll_N, rtol=1e-5)  # the whole latent, rounded once more
    assert f"{width} of latent" in capsys.readouterr().out
    check_figures(made)
    assert len(made) == 8


@pytest.mark.slow
def test_mla_cache_of_a_checkpoint_without_a_tokenizer_takes_random_tokens(made, monkeypatch, capsys):
    monkeypatch.setenv("DSV3_CHECKPOINT", str(DATA / "base"))
    found = runpy.run_path(str(ROOT / "mla_cache.py"))
    assert found["tokens"].shape == (8, 128) and "for want of a tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("DSV3_CHECKPOINT", r".*/no: expected a checkpoint's folder, got nothing"),
        ("DSV3_TOKENS", r"DSV3_TOKENS: no file .*/no"),
    ],
)
def test_mla_cache_refuses_a_path_without_a_model_or_tokens(setting, said, tmp_path, monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(setting, str(tmp_path / "no"))
    with pytest.raises(ValueError, match=said) as error:
        runpy.run_path(str(ROOT / "mla_cache.py"))
    assert "\n" not in str(error.value)


def test_mla_cache_refuses_tokens_that_are_no_sequences(tmp_path, made, monkeypatch):
    np.save(tmp_path / "tokens.npy", np.arange(9))
    monkeypatch.setenv("DSV3_TOKENS", str(tmp_path / "tokens.npy"))
    with pytest.raises(ValueError, match=r"expected integers \[sequences, tokens\], got int64 \[9\]"):
        runpy.run_path(str(ROOT / "mla_cache.py"))


def test_precision_and_routing_compares_the_traces_that_it_is_given(tmp_path, token_trace, made, monkeypatch, capsys):
    rounded = trace_of_tokens(tmp_path, "fp8", "--fp8")
    monkeypatch.setenv("DSV3_TRACES", f"exact={token_trace},same={token_trace},FP8={rounded}")
    found = runpy.run_path(str(ROOT / "precision_and_routing.py"))
    ours, theirs = (np.sort(found["traces"][name].choices.experts_NLK, axis=-1) for name in ("FP8", "exact"))
    flipped = (ours != theirs).any(axis=-1).sum(axis=0)
    assert found["rates"]["FP8"].hits.tolist() == flipped.tolist() and flipped.sum() > 0
    assert found["rates"]["same"].of.tolist() == [64, 64, 60] and not found["rates"]["same"].hits.any()
    assert "FP8: dtype float32, fp8 True" in capsys.readouterr().out
    check_figures(made)
    assert len(made) == 7


def test_precision_and_routing_names_the_trace_that_is_of_another_text(tmp_path, token_trace, made, monkeypatch):
    other = trace_of_tokens(tmp_path, "other", seed=1)
    monkeypatch.setenv("DSV3_TRACES", f"a={token_trace},b={other}")
    with pytest.raises(ValueError, match=r"^DSV3_TRACES: b beside a: traces: expected the same text") as error:
        runpy.run_path(str(ROOT / "precision_and_routing.py"))
    assert "\n" not in str(error.value)


def test_balance_dynamics_shows_the_runs_that_it_is_given_and_their_checkpoints(tmp_path, made, monkeypatch, capsys):
    config = micro_config(tmp_path)
    folders = {name: write_run(tmp_path / name, override(config, {"controller": name}), 20) for name in ("sign", "none")}
    write_checkpoints(folders["none"], config, 10, 20)
    monkeypatch.setenv("DSV3_RUNS", ",".join(f"{name}={folder}" for name, folder in folders.items()))
    found = runpy.run_path(str(ROOT / "balance_dynamics.py"))
    assert found["layers"] == ("1", "mtp 1") and list(found["moving"]) == ["sign", "none"] and found["size"] == 2
    for name in folders:
        loads = [np.random.default_rng(step).integers(0, 9, (2, 4)) for step in (19, 20)]
        expected = [row.max() / row.mean() - 1 for row in sum(loads)]
        np.testing.assert_allclose(found["window"][name][-1], expected)
    assert list(found["shares"]) == ["none"] and found["shares"]["none"][-1] == 1
    assert not found["rated"] and re.search(r"^none +none +0.01 +20 ", capsys.readouterr().out, re.M)
    check_figures(made)
    assert len(made) == 3 + 2 + 1  # the first run has no scores to balance


def test_balance_dynamics_of_runs_without_checkpoints_says_so(tmp_path, made, monkeypatch, capsys):
    monkeypatch.setenv("DSV3_RUNS", f"one={write_run(tmp_path / 'one', micro_config(tmp_path), 1)}")
    runpy.run_path(str(ROOT / "balance_dynamics.py"))
    said = capsys.readouterr().out
    assert "no run has kept a checkpoint" in said and "no run has kept two checkpoints" in said
    check_figures(made)


@pytest.mark.parametrize(
    ("name", "setting", "value", "said"),
    [
        ("balance_dynamics", "DSV3_RUNS", "DIR", "DSV3_RUNS: expected name=folder,name=folder,..., got 'DIR'"),
        ("balance_dynamics", "DSV3_RUNS", "a=no/run", "no/run: expected the folder of a training run, found no run.json in it"),
        ("precision_and_routing", "DSV3_TRACES", "a=no", "DSV3_TRACES: expected at least 2 folders, got 1: 'a=no'"),
        ("precision_and_routing", "DSV3_TRACES", "a=no,b=no", "no: expected the folder of a routing trace, got nothing"),
    ],
)
def test_notebooks_refuse_what_is_no_run_or_trace(name, setting, value, said, made, monkeypatch):
    monkeypatch.setenv(setting, value)
    with pytest.raises(ValueError) as error:
        runpy.run_path(str(ROOT / f"{name}.py"))
    assert str(error.value) == said


def test_walkthrough_s_checks_stop_at_a_difference(capsys):
    first = next(text for kind, text in cells_of_source(ROOT / "walkthrough.py") if kind == "code")
    names = {}
    exec(first.replace("%matplotlib inline", ""), names)
    names["check"]("eq. 1", np.ones(3), np.ones(3) * (1 + 1e-7))
    assert capsys.readouterr().out == "eq. 1: 1e-07 apart\n"
    for wrong in (np.ones(3) * 1.001, np.ones(1), np.array([1, 1, np.nan])):
        with pytest.raises(AssertionError, match="eq. 1"):
            names["check"]("eq. 1", wrong, np.ones(3))
