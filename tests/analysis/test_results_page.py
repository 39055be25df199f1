"""The page of results: every claim and every arm is on it, and a number says how sure it is."""

import math

import pytest

from dsv3_jax.analysis import comparison, results_page
from dsv3_jax.analysis.ablation import Claim, judge

CLAIMS = (
    Claim(text="a is better", measure="loss", arm="a", than="b", expects="lower", report="2.0 beside 2.1"),
    Claim(text="a keeps half", measure="kept", arm="a", expects="equal", value=0.5, within=0.1, report="50 %"),
)


def result(preset="tiny", name="one", seeds=3):
    scores = {
        "b": [{"loss": 2.1 + s} for s in (0.0, 1.0, -1.0)],
        "a": [{"loss": 2.0 + s, "kept": 0.5 + s / 100, "kept, prose": 0.25} for s in (0.01, 1.0, -1.0)],
    }
    return {
        "name": name, "question": "Which is better?", "command": "python -m experiments.ablate_one --set=steps=7",
        "preset": preset, "date": "2026-01-02", "seeds": seeds, "steps": 7, "tokens": 2_000_000, "device": "cpu cpu",
        "corpus": {"sha256": "0123456789abcdef", "bytes": 3_100_000, "train_tokens": 1_000_000},
        "versions": {"python": "3.11.7", "jax": "0.10.2"}, "titles": {"loss": "loss, nats"},
        "arms": {arm: {"total": 1234, "active_with_head": 567} for arm in scores},
        **comparison.differences(scores), "claims": [judge(claim, scores) for claim in CLAIMS],
    }  # fmt: skip


def test_the_page_has_command_setting_arms_and_verdicts():
    text = results_page.page([result(), result("quick")], {"one-tiny": "results/one-tiny.png"})
    assert text.count("    python -m experiments.ablate_one --set=steps=7\n") == 2
    assert "`tiny`, 2.0M tokens, 2.0 epochs, 3 seeds, 7 steps; corpus `0123456789abcdef` (3.1 MB); cpu, Python" in text
    assert "## Which is better? (`tiny`)" in text and "## Which is better? (`quick`)" in text
    assert "| a is better | -0.0967 ± 0.0143 | 2.0 beside 2.1 | **reproduced** | `quick`, 2.0M tokens" in text
    assert "| a keeps half | 0.5000 ± 0.0248 | 50 % | **reproduced** |" in text, "an absolute claim shows the value"
    assert "| b | 1,234, 567 | 2.1000 |" in text and "| a | 1,234, 567 | 2.0033 (-0.0967 ± 0.0143) |" in text
    assert "Of a: kept, prose 0.2500." in text and "kept 0.5" not in text
    assert text.count("](results/one-tiny.png)") == 1 and "In brackets: the difference from b" in text


def test_every_table_row_has_as_many_cells_as_its_head():
    lines = results_page.page([result()], {}).splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            rows = [lines[i - 1]]
            for following in lines[i + 1 :]:
                if not following.startswith("|"):
                    break
                rows.append(following)
            assert len(rows) > 1 and {row.count("|") for row in rows} == {line.count("|")}


@pytest.mark.parametrize(("value", "text"), [(0.00123, "0.0012"), (9.5, "9.5000"), (12.345, "12.35"), (70272.0, "70,272")])
def test_numbers_have_digits_by_their_size(value, text):
    assert results_page.number(value) == text and results_page.number(value, signed=True) == "+" + text.replace(",", "")


def test_what_was_not_resolved_says_what_could_have_been():
    scores = {"a": [{"loss": 2.0}, {"loss": 2.2}], "b": [{"loss": 2.1}, {"loss": 2.1}]}
    text = results_page.difference_text(judge(CLAIMS[0], scores))
    assert text.startswith("+0.0000 ± 1.27") and text.endswith(")") and "(1.4" in text


def test_a_verdict_of_fewer_than_five_seeds_says_so_in_its_row_and_the_page_why():
    for seeds, at in (
        (1, "2.0 epochs, 1 seed (fewer than 5) |"),
        (4, "2.0 epochs, 4 seeds (fewer than 5) |"),
        (5, "2.0 epochs, 5 seeds |"),
        (6, "2.0 epochs, 6 seeds |"),
    ):
        rows = results_page.verdicts([result(seeds=seeds)])[2:]
        assert len(rows) == 2 and all(row.endswith(at) for row in rows)
    head = results_page.page([result()], {}).split("| claim |")[0]
    assert "meant for\nfive seeds; a verdict of fewer" in head and results_page.SEEDS == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_that_diverged_is_counted_on_the_page_and_nothing_else_is_said(bad):
    one = result()
    scores = {arm: [dict(score) for score in of_arm] for arm, of_arm in one["scores"].items()}
    scores["a"][1] = {"loss": bad, "kept": bad, "kept, prose": bad}
    scores["b"][2]["loss"] = bad
    one["claims"] = [judge(claim, scores) for claim in CLAIMS]
    rows = results_page.verdicts([one])[2:]
    assert rows[0].startswith("| a is better | not finite in 2 runs | 2.0 beside 2.1 | **not resolved** |")
    assert rows[1].startswith("| a keeps half | not finite in 1 run | 50 % | **not resolved** |")
    # As JSON has them: what is not finite is None.
    one["scores"] = {
        arm: [{k: v if math.isfinite(v) else None for k, v in score.items()} for score in of_arm]
        for arm, of_arm in scores.items()
    }
    one["differences"]["a"]["loss"] |= {"mean": None, "half_width_95": None}
    text = "\n".join(results_page.section(one, None))
    assert "| b | 1,234, 567 | not finite |" in text and "| a | 1,234, 567 | not finite |" in text
    assert "Of a: kept, prose not finite." in text and "nan" not in text and "None" not in text
