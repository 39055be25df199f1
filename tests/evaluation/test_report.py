"""Tables that fit a terminal and figures with a bar for each number."""

from dsv3_jax.analysis import figures
from dsv3_jax.evaluation.report import draw, rows_of, table

HALF = {"value": 0.5, "low": 0.25, "high": 0.75}
SUMMARIES = {
    "questions": {
        "records": 1234, "chance": 0.25, "cut_records": 2, "cut_tokens": 77, "accuracy": HALF, "accuracy_per_byte": HALF,
        "categories": {"a category of a very long name indeed": {"records": 1, "accuracy": HALF, "accuracy_per_byte": HALF}},
    },
    "humaneval": {"records": 164, "samples": 328, "timed_out": 3, "own_namespaces": ["network"], "pass@1": HALF},
    "bits_per_byte": {
        "domains": {"c": {"documents": 3, "bytes": 10**9, "tokens": 10, "bits_per_byte": HALF | {"value": 0.6}}},
        "all": {"documents": 3, "bytes": 10**9, "tokens": 10, "bits_per_byte": HALF},
    },
}  # fmt: skip


def test_the_table_has_every_number_and_fits_a_terminal():
    text = table(SUMMARIES)
    assert max(map(len, text.splitlines())) <= 100
    for wanted in ("guessing: 0.2500", "2 records (77 tokens)", "timed out: 3 of 328", "of their own: network", "1 record\n",
                   "1,234 records", "1,000,000,000 bytes", "0.6000  [0.2500, 0.7500]"):  # fmt: skip
        assert wanted in text


def test_the_figure_has_a_bar_for_each_number(tmp_path):
    figure = draw(SUMMARIES)
    for ax, (task, summary) in zip(figure.axes, SUMMARIES.items(), strict=True):
        rows = rows_of(task, summary)
        assert ax.get_title() == task and [patch.get_width() for patch in ax.patches] == [row.estimate["value"] for row in rows]
        assert "95 %" in ax.get_xlabel()
    assert "less is better" in figure.axes[2].get_xlabel()
    figures.save(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000
