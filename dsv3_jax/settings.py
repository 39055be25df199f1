"""Configurations by name: `--set=name=value`, JSON, and how a run differs from the published recipe.

A field name occurs in one section of the configuration only, so that a setting needs no path.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dsv3_jax.checks import require
from dsv3_jax.config import Config, DataConfig, Fp8Recipe, ModelConfig, ParallelConfig, RopeScaling, TrainConfig

ALIASES = {"selector": "topk_method"}  # the field's word for what config.json calls topk_method
SECTIONS = ("model", "train", "data", "parallel")
NESTED = (RopeScaling, Fp8Recipe)  # fields of a section that are objects themselves


def field_names() -> dict[str, str]:
    """Name of every settable field -> its section."""
    return {f.name: section for section in SECTIONS for f in dataclasses.fields(type(getattr(Config(), section)))}


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with fields replaced; string values are parsed by the field's type.

    Raises ValueError for an unknown name (lists the nearest ones), a value of the wrong type, or an invalid combination.
    """
    owners = field_names()
    changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for given, value in settings.items():
        name = ALIASES.get(given, given)
        if name not in owners:
            nearest = difflib.get_close_matches(given, [*owners, *ALIASES], n=4, cutoff=0.4)
            raise ValueError(f"unknown setting {given!r}; nearest: {', '.join(nearest) or 'none'}")
        section = owners[name]
        hint = typing.get_type_hints(type(getattr(config, section)))[name]
        changes[section][name] = parse_value(given, value, hint) if isinstance(value, str) else _widened(value, hint)
    return dataclasses.replace(
        config, **{s: dataclasses.replace(getattr(config, s), **changes[s]) for s in SECTIONS if changes[s]}
    )


def parse_settings(settings: list[str]) -> dict[str, str]:
    """`["name=value", ...]` -> dict. Raises ValueError for one without `=`."""
    for setting in settings:
        require("=" in setting, f"--set: expected name=value, got {setting!r}")
    return dict(setting.split("=", 1) for setting in settings)


def parse_value(name: str, text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`; raises ValueError naming the field."""
    if isinstance(hint, types.UnionType):
        if text.lower() in ("null", "none"):
            require(type(None) in typing.get_args(hint), f"{name}: null is not allowed")
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if hint is Fp8Recipe and text == "report":
        return Fp8Recipe()
    if hint in NESTED:
        return hint(**_checked(hint, _json(name, text)))
    if typing.get_origin(hint) is Literal:
        if all(isinstance(choice, bool) for choice in typing.get_args(hint)):
            hint = bool
        else:
            return text  # the dataclass checks the choice
    if hint is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        require(text.lower() in values, f"{name}: expected true or false, got {text!r}")
        return values[text.lower()]
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{name}: expected {hint.__name__}, got {text!r}") from None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON or null, got {text!r} ({error})") from None


def _checked(cls: type, values: Any) -> dict[str, Any]:
    require(isinstance(values, Mapping), f"{cls.__name__}: expected an object, got {values!r}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        nearest = ", ".join(difflib.get_close_matches(key, names)) or "none"
        require(key in names, f"{cls.__name__}: unknown key {key!r}; nearest: {nearest}")
    hints = typing.get_type_hints(cls)
    return {name: _widened(value, hints[name]) for name, value in values.items()}


def _widened(value: Any, hint: Any) -> Any:
    """JSON writes a float without a fraction as an integer."""
    is_float = hint is float or float in typing.get_args(hint)
    return float(value) if is_float and isinstance(value, int) and not isinstance(value, bool) else value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Inverse of `to_dict`; unknown keys raise ValueError."""
    sections = _checked(Config, values)
    model = _checked(ModelConfig, sections["model"])
    for name, nested in (("rope_scaling", RopeScaling), ("fp8", Fp8Recipe)):
        if model.get(name) is not None:
            model[name] = nested(**_checked(nested, model[name]))
    return Config(
        model=ModelConfig(**model),
        train=TrainConfig(**_checked(TrainConfig, sections["train"])),
        data=DataConfig(**_checked(DataConfig, sections["data"])),
        parallel=ParallelConfig(**_checked(ParallelConfig, sections.get("parallel", {}))),
    )


RECIPE = {
    "router": (
        "scoring_func", "topk_method", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
        "group_score_topk", "norm_topk_prob", "routed_scaling_factor",
    ),
    "balancing": (
        "controller", "aux_loss_alpha", "aux_loss_reduction", "bias_update_speed", "bias_update_stop_tokens", "balance_mtp",
    ),
    "MTP": (
        "num_nextn_predict_layers", "mtp_hidden", "mtp_concat", "mtp_loss_weight", "mtp_loss_weight_late", "mtp_late_tokens",
    ),
    "schedules": (
        "learning_rate", "learning_rate_min", "learning_rate_final", "warmup_steps", "lr_decay_start_tokens",
        "lr_decay_end_tokens", "lr_final_start_tokens", "schedule_tokens", "train_tokens", "steps", "batch_size",
        "batch_size_start", "batch_ramp_tokens",
    ),
}  # fmt: skip


def recipe_differences(config: Config) -> list[str]:
    """One line for each point in which router, balancing, MTP or schedules differ from the published recipe."""
    published, owners = Config(), field_names()
    lines = []
    for topic, names in RECIPE.items():
        for name in names:
            ours = getattr(getattr(config, owners[name]), name)
            theirs = getattr(getattr(published, owners[name]), name)
            if ours != theirs:
                lines.append(f"{topic}: {name} = {ours} (published: {theirs})")
    return lines
