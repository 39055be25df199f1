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

from experiments import trace
from oracles.cases import DATA

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(ROOT.glob("*.py"))
SETTINGS = ("DSV3_TRACE", "DSV3_TOKENIZER")


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
    tokens, out = tmp_path / "tokens.npy", tmp_path / "trace"
    np.save(tokens, np.random.default_rng(0).integers(0, 512, (4, 16)))
    values = absl_flags.FlagValues()
    trace.define_flags(values)
    values(["trace", f"--checkpoint={DATA / 'mtp'}", f"--data={tokens}", f"--out={out}", "--seq_len=16"])
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
