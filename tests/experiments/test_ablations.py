"""The ablations: what their arms differ in, runs shared by several processes, and the page that comes of it."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from dsv3_jax.model.count import count_parameters
from dsv3_jax.presets import preset
from dsv3_jax.settings import override
from experiments import (
    _ablation,
    _cli,
    ablate_attention,
    ablate_balance,
    ablate_controllers,
    ablate_experts,
    ablate_groups,
    ablate_mtp,
    ablations,
    compare,
)
from oracles.compiling import quick_environment
from oracles.micro import micro_settings, set_flags

PROGRAMS = [ablate_balance, ablate_mtp, ablate_attention, ablate_experts, ablate_groups, ablate_controllers]
BASES = [preset(name) for name in ("tiny", "quick", "mid")]


def changed(config, base):
    """Names of the fields in which two configurations differ."""
    pairs = [(getattr(config, s), getattr(base, s)) for s in ("model", "train", "data", "parallel")]
    return {f.name for a, b in pairs for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__.split(".")[-1])
def test_claims_are_of_arms_that_exist_and_the_first_arm_is_the_baseline(program):
    ablation = program.ABLATION
    base = override(preset("tiny"), dict(ablation.base))
    arms = ablation.arms(base)
    assert len(arms) >= 2 and {arm for claim in ablation.claims for arm in claim.arms} <= set(arms)
    assert ablation.name in ablations.NAMES and program.__name__ == f"experiments.ablate_{ablation.name}"
    for config in arms.values():
        assert not changed(config, base) & {"seed", "data_seed", "steps", "learning_rate", "corpus"}


@pytest.mark.parametrize("base", BASES, ids=["tiny", "quick", "mid"])
def test_models_of_every_attention_have_the_same_parameters_to_half_a_channel(base):
    arms = ablate_attention.arms(base)
    counts = {name: count_parameters(config.model) for name, config in arms.items()}
    channel = 3 * base.model.hidden_size * base.model.first_k_dense_replace
    for field in ("total", "active", "active_with_head"):
        sizes = [getattr(count, field) for count in counts.values()]
        assert max(sizes) - min(sizes) <= channel, field
    assert [config.model.attention for config in arms.values()] == list(arms) == ["mla", "mha", "gqa", "mqa"]
    assert arms["mha"].model.intermediate_size == base.model.intermediate_size, "no model is made smaller"
    assert arms["gqa"].model.n_key_value_heads * 2 == base.model.num_attention_heads
    cached = [ablate_attention.cache(Path(), config)["cache_bytes"] for config in arms.values()]
    assert cached[0] <= cached[3] < cached[2] < cached[1]
    m = base.model
    assert cached[0] == 2 * m.num_hidden_layers * (m.kv_lora_rank + m.qk_rope_head_dim)


def test_expert_arms_activate_the_same_parameters_but_for_the_router():
    base = preset("quick")
    arms = ablate_experts.arms(base)
    assert len(arms) == 5
    for config in arms.values():
        m = config.model
        assert (m.n_shared_experts + m.num_experts_per_tok) * m.moe_intermediate_size == 5 * base.model.moe_intermediate_size
        assert m.topk_group == m.n_group == 1
    fine = arms["finer"].model
    assert (fine.n_routed_experts, fine.num_experts_per_tok, fine.n_shared_experts) == (64, 16, 4)
    assert count_parameters(arms["fine"].model).total - count_parameters(arms["1 shared"].model).total == 3 * 16 * 129


def test_controllers_and_groups_differ_in_what_they_say():
    base = preset("tiny")
    assert [c.train.controller for c in ablate_balance.arms(base).values()] == ["sign", "sequence", "batch", "classical"]
    assert all(changed(c, base) <= {"controller"} for c in ablate_balance.arms(base).values())
    speeds = {name: c.train.bias_update_speed for name, c in ablate_controllers.arms(base).items()}
    assert speeds["slow"] == pytest.approx(0.001) and speeds["fast"] == pytest.approx(0.1) and speeds["sign"] == 0.01
    assert [c.model.topk_group for c in ablate_groups.arms(base).values()] == [2, 4, 1]
    assert [c.model.num_nextn_predict_layers for c in ablate_mtp.arms(base).values()] == [0, 1]


@pytest.mark.parametrize(
    ("program", "setting", "message"),
    [
        (ablate_mtp, {"num_nextn_predict_layers": 0}, "num_nextn_predict_layers: expected at least 1, got 0"),
        (ablate_attention, {"first_k_dense_replace": 0}, "first_k_dense_replace: expected at least 1"),
        (ablate_groups, {"n_group": 1, "topk_group": 1}, "topk_group: expected fewer than n_group=1, got 1"),
        (ablate_experts, {"n_shared_experts": 2}, "expected 1, a multiple of 4 and at least 2, got 2, 32 and 4"),
    ],
)
def test_a_base_without_what_is_asked_is_refused(program, setting, message):
    with pytest.raises(ValueError, match=message) as error:
        program.arms(override(preset("tiny"), setting))
    assert "\n" not in str(error.value)


def test_arms_are_chosen_by_name_in_the_ablation_s_order():
    arms = ablate_balance.arms(preset("tiny"))
    assert list(_ablation.chosen(arms, ["classical", "loss-free"])) == ["loss-free", "classical"]
    assert _ablation.chosen(arms, None) == arms
    for names in (["loss-free"], ["loss-free", "loss"]):
        with pytest.raises(ValueError, match="--arms: expected at least 2 of loss-free, sequence-wise"):
            _ablation.chosen(arms, names)


def test_a_run_s_measures_are_of_the_main_model_s_layers_and_of_the_end_of_training(tmp_path):
    raw = {"bits_per_byte": {"all": 1.5}, "loss": {"all": 2.5}}
    (tmp_path / "validation.json").write_text(json.dumps({"raw": raw}))
    records = [{"step": i, "main_loss": None if i == 20 else float(i), "max_vio_mean": float(i > 10)} for i in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    load_LME = np.random.default_rng(0).integers(0, 50, (3, 4, 16))
    np.save(tmp_path / "validation_load.npy", load_LME)  # the last layer is the MTP module's
    found = _ablation.measures(tmp_path, preset("tiny"))
    assert (found["bits_per_byte"], found["loss"], found["max_vio"]) == (1.5, 2.5, 1.0)
    assert found["train_loss"] == 19.0, "of the last tenth, without the skipped step"
    violations, bits = [], []
    for load_ME in load_LME[:2].astype(float):
        of_experts, of_domains = load_ME.sum(0), load_ME.sum(1)
        violations.append(of_experts.max() / of_experts.mean() - 1)
        joint = load_ME / load_ME.sum()
        chance = np.outer(of_domains, of_experts) / load_ME.sum() ** 2
        bits.append(sum(j * np.log2(j / c) for j, c in zip(joint.flat, chance.flat, strict=True) if j > 0))
    assert found["max_vio_global"] == pytest.approx(np.mean(violations))
    assert found["domain_bits"] == pytest.approx(np.mean(bits))


def test_what_was_observed_of_a_run_is_computed_once(tmp_path):
    seen = []
    ablation = dataclasses.replace(ablate_groups.ABLATION, observe=lambda folder, config: seen.append(folder) or {"nodes": 1.5})
    for _ in range(2):
        assert _ablation.observed(ablation, tmp_path, preset("tiny")) == {"nodes": 1.5}
    assert seen == [tmp_path] and _ablation.observed(ablate_balance.ABLATION, tmp_path, preset("tiny")) == {}


def test_the_command_beside_a_number_has_the_steps_that_a_budget_became(defined_flags):
    absl_flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(set=["controller=sign", "steps=3"], preset="quick"):
        command = _ablation.command_of("balance", {"seeds": 7, "steps": 412}, ["loss-free", "classical"], "--tile=8")
    assert command == (
        "python -m experiments.ablate_balance --preset=quick --seeds=7 --arms=loss-free,classical --tile=8 "
        "--set=controller=sign --set=steps=412"
    )


def test_a_corpus_is_named_by_its_texts_whatever_the_order_of_its_domains(tmp_path):
    rows = {name: {"sha256": name * 8, "bytes": 10, "train_tokens": 3} for name in ("a", "b")}
    found = []
    for order in (("a", "b"), ("b", "a")):
        (tmp_path / "run.json").write_text(json.dumps({"data": {"domains": {name: rows[name] for name in order}}}))
        found.append(_ablation.corpus_of(tmp_path))
    assert found[0] == found[1] and (found[0]["bytes"], found[0]["train_tokens"]) == (20, 6)
    rows["b"]["sha256"] = "c"
    (tmp_path / "run.json").write_text(json.dumps({"data": {"domains": rows}}))
    assert _ablation.corpus_of(tmp_path)["sha256"] != found[0]["sha256"]


def test_a_run_that_another_process_has_is_left_to_it(tmp_path):
    path = tmp_path / "x" / "seed-0.lock"
    with compare.claimed(path, wait=False) as mine:
        code = "import sys; from pathlib import Path; from experiments.compare import claimed\n"
        code += "with claimed(Path(sys.argv[1]), wait=False) as mine: print(mine)"
        env = quick_environment(tmp_path / "compiled")
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env)
        assert mine and other.stdout.strip() == "False", other.stderr
    with compare.claimed(path, wait=False) as mine:
        assert mine, "a lock ends with its holder"


def call(*flags):
    """(exit status) of the runner."""
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["ablations", *flags])
        _cli.run(ablations.main)
    return end.value.code or 0


@pytest.fixture
def defined_flags():
    if "preset" not in absl_flags.FLAGS:
        _cli.define_config_flags()
    if "seeds" not in absl_flags.FLAGS:
        compare.define_run_flags()
    for name in ("only", "workers", "results"):
        if name not in absl_flags.FLAGS:
            {"only": lambda: absl_flags.DEFINE_list("only", list(ablations.NAMES), ""),
             "workers": lambda: absl_flags.DEFINE_integer("workers", 0, ""),
             "results": lambda: absl_flags.DEFINE_string("results", "experiments", "")}[name]()  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only=balance,balanse", "--set=steps=3"], "--only: expected some of balance, mtp, attention"),
        ([], "--budget: expected finite minutes > 0 (or --set=steps=...), got None"),
        (["--budget=-1"], "--budget: expected finite minutes > 0"),
        (["--budget=nan"], "--budget: expected finite minutes > 0 (or --set=steps=...), got nan"),
        (["--budget=inf"], "--budget: expected finite minutes > 0 (or --set=steps=...), got inf"),
        (["--set=steps=3", "--seeds=0"], "expected 0 or more and at least 1"),
        (["--set=steps=3", "--set=n_group=1", "--set=topk_group=1"], "topk_group: expected fewer than n_group=1"),
        (["--set=steps=3", "--workdir={held}"], "holds ablations already; add --resume"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(defined_flags, tmp_path, capsys, flags, message):
    (tmp_path / "held" / "balance").mkdir(parents=True)
    flags = [flag.replace("{held}", str(tmp_path / "held")) for flag in flags]
    assert call("--preset=tiny", f"--workdir={tmp_path / 'w'}", *flags) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and message in err and "\n" not in err


def test_sums_are_taken_in_one_order_whatever_the_machine(monkeypatch):
    for given, expected in ((None, "1"), ("3", "3")):
        monkeypatch.delenv("NPROC", raising=False)
        if given:
            monkeypatch.setenv("NPROC", given)
        _ablation.same_sums_everywhere()
        assert os.environ["NPROC"] == expected


@pytest.mark.slow
def test_two_workers_compute_every_run_once_stop_on_ctrl_c_go_on_and_write_the_page(tmp_path):
    settings = set_flags({**micro_settings(tmp_path), "steps": "6", "n_group": "2", "n_routed_experts": "8"})
    command = [sys.executable, "-m", "experiments.ablations", "--preset=tiny", "--seeds=2", "--workers=2", "--only=groups,mtp"]
    command += [f"--workdir={tmp_path / 'w'}", f"--results={tmp_path / 'r'}", *settings]

    env = quick_environment(tmp_path / "compiled")

    def begin(*flags):
        return subprocess.Popen([*command, *flags], env=env, stderr=subprocess.PIPE, text=True)

    def finished():
        return sorted(path.parent for path in (tmp_path / "w").glob("*/*/seed-*/validation.json"))

    process = begin()
    while process.poll() is None and not finished():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "go on with the same command and --resume" in err, err
    first = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in finished()}
    assert 0 < len(first) < 10 and not (tmp_path / "r").exists()

    process = begin("--resume")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(finished()) == 10
    assert all((folder / "metrics.jsonl").stat().st_mtime_ns == t for folder, t in first.items())
    said = "".join(path.read_text() for path in (tmp_path / "w").glob("*/worker-*.log"))
    assert said.count("seed 2 of 2, limited, 6 steps") == 1, "no run is computed by both"

    page = (tmp_path / "r" / "RESULTS.md").read_text()
    for text in (
        "python -m experiments.ablate_groups --preset=tiny --seeds=2",
        "python -m experiments.ablate_mtp",
        "--set=steps=6",
    ):
        assert text in page
    result = json.loads((tmp_path / "r" / "results" / "mtp-tiny.json").read_text())
    with_mtp = result["scores"]["mtp 1"]
    assert all(0 <= score["acceptance"] <= 1 for score in with_mtp) and "acceptance, prose" in with_mtp[0]
    assert set(result["scores"]["without"][0]).isdisjoint({"acceptance"})
    nodes = json.loads((tmp_path / "r" / "results" / "groups-tiny.json").read_text())["scores"]
    assert all(1 <= score["nodes"] <= 2 for score in nodes["free"]) and all(s["nodes"] == 1 for s in nodes["one group"])
    again = [sys.executable, *shlex.split(result["command"])[1:], f"--workdir={tmp_path / 'again'}"]
    done = subprocess.run(again, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "again" / "mtp.json").read_text())
    assert {**found, "date": ""} == {**result, "date": ""}, "the command beside the numbers gives them again, without workers"
    for name in ("mtp", "groups"):
        assert (tmp_path / "r" / "results" / f"{name}-tiny.png").read_bytes()[:4] == b"\x89PNG"
