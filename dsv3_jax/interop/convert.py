"""A checkpoint into another format or dtype, shard by shard: resumable, and never a half-written target that looks whole.

`convert.json` says what is being made, from the first byte to the last; the files that make a folder a checkpoint (index or
table, then config.json) are written when everything else is there.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dsv3_jax.interop.config_json import released_json
from dsv3_jax.interop.folder import CONFIG, INDEX, SINGLE, Layout, Shard, read_json
from dsv3_jax.interop.names import leaves
from dsv3_jax.interop.orbax_folder import TABLE, group_folder, grouped, save_group, table_text
from dsv3_jax.interop.recode import Target, planned, quantization_config
from dsv3_jax.interop.safetensors import Planned, header_bytes, parse_json, write_file
from dsv3_jax.interop.source import Source
from dsv3_jax.training.journal import write_text

Format = Literal["hf", "orbax"]
STATE = "convert.json"
SMALLEST_GROUP = 2**20  # bytes of an Orbax checkpoint; small tensors share one
# Small files that belong to a released model and are copied as they are.
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
          "tokenizer.model", "vocab.json", "merges.txt", "LICENSE", "README.md")  # fmt: skip
Progress = Callable[[int], None]  # hears of bytes written


def convert(
    source: Source,
    target: str | Path,
    *,
    format: Format = "hf",
    dtype: Target = "keep",
    power_of_two: bool = False,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> None:
    """Writes `source` to the folder `target`. `progress(total bytes)` gives the function that hears of bytes done.

    "keep" leaves every tensor's bytes, and the division into files, as they are. With "fp8" and `power_of_two`, new scales are
    ue8m0. A target that a killed conversion left is completed. Raises ValueError if the target holds anything else, OSError
    for a disk that does not take it: what is complete stays, and the same call goes on.
    """
    target = Path(target)
    if format not in get_args(Format):
        raise ValueError(f"--format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    if shard_bytes < 1:
        raise ValueError(f"--shard_gb: expected a positive number, got {shard_bytes / 1e9}")
    if target.resolve() == source.folder.resolve():
        raise ValueError(f"--target: expected another folder than the source, got {target}")
    tensors = planned(source.tensors, source.config, dtype, power_of_two=power_of_two)
    largest = max(_bytes(source, name) for name in source.tensors.entries)
    layout = _layout(source, tensors, dtype, shard_bytes)
    _claim(target, _claimed(source, tensors, format, dtype, layout))
    hear = progress(sum(tensor.n_bytes for tensor in tensors))
    if format == "hf":
        _write_hf(target, tensors, layout, hear)
    else:
        _write_orbax(target, tensors, layout, max(SMALLEST_GROUP, largest // 2), hear)
    for name in BESIDE:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    write_text(target / CONFIG, _config_text(source, dtype, power_of_two))
    (target / STATE).unlink()


def _bytes(source: Source, name: str) -> int:
    dtype, shape = source.tensors.entries[name]
    return Planned(name, dtype, shape, lambda: []).n_bytes


def _layout(source: Source, tensors: Sequence[Planned], dtype: Target, shard_bytes: int) -> Layout:
    """Files and what is in them: the source's own where nothing changes, else in order, each up to `shard_bytes`."""
    as_it_is = getattr(source.tensors, "layout", None)
    if dtype == "keep" and as_it_is is not None:
        return as_it_is()
    groups = grouped(tensors, shard_bytes)
    n = len(groups)
    names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:06d}.safetensors" for i in range(1, n + 1)]
    return Layout(tuple(Shard(f, tuple(t.name for t in g), {"format": "pt"}) for f, g in zip(names, groups, strict=True)))


def _claimed(source: Source, tensors: Sequence[Planned], format: Format, dtype: Target, layout: Layout) -> dict[str, Any]:
    """What is being made, to know it again."""
    what = [[t.name, str(t.dtype), list(t.shape)] for t in tensors], [list(shard.names) for shard in layout.shards]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return {"source": str(Path(source.tensors.where).resolve()), "format": format, "dtype": dtype, "tensors": digest}


def _claim(target: Path, claimed: dict[str, Any]) -> None:
    """Makes the target, or finds it begun. Raises ValueError if it holds anything else."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"--target: expected a folder or where one can be made, got the file {target}")
    state = target / STATE
    if state.exists():
        begun = read_json(state)
        if begun != claimed:
            differs = [
                f"{key}={str(begun.get(key))[:80]}, now {str(value)[:80]}"
                for key, value in claimed.items()
                if begun.get(key) != value
            ]
            raise ValueError(
                f"--target: {target} holds another conversion, begun and not ended: {'; '.join(differs)}; take another"
            )
        return
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--target: {target} is not empty; expected a new or empty folder, or a conversion that was stopped")
    target.mkdir(parents=True, exist_ok=True)
    write_text(state, json.dumps(claimed, indent=1))


def _write_hf(target: Path, tensors: Sequence[Planned], layout: Layout, hear: Progress) -> None:
    of_name = {tensor.name: tensor for tensor in tensors}
    for shard in layout.shards:
        own = [of_name[name] for name in shard.names]
        path, size = target / shard.file, sum(tensor.n_bytes for tensor in own)
        header = header_bytes(own, shard.metadata, shard.header.encode())
        if path.exists() and path.stat().st_size == len(header) + size:
            hear(size)
        else:
            write_file(path, header, own, hear)
    if [shard.file for shard in layout.shards] != [SINGLE]:
        write_text(target / INDEX, _index_text(tensors, layout))


def _index_text(tensors: Sequence[Planned], layout: Layout) -> str:
    """The index as it stood, if it says just this."""
    weight_map = {name: shard.file for shard in layout.shards for name in shard.names}
    if layout.index_text and parse_json(layout.index_text.encode(), INDEX).get("weight_map") == weight_map:
        return layout.index_text
    total = sum(tensor.n_bytes for tensor in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _write_orbax(target: Path, tensors: Sequence[Planned], layout: Layout, group_bytes: int, hear: Progress) -> None:
    groups = grouped(tensors, group_bytes)
    for i, group in enumerate(groups):
        path = group_folder(target, i)
        if not path.exists():  # renamed to this name when complete
            save_group(path, group)
        hear(sum(tensor.n_bytes for tensor in group))
    write_text(target / TABLE, table_text(groups, layout))


def _config_text(source: Source, dtype: Target, power_of_two: bool) -> str:
    released = source.config_json
    if dtype == "keep" and released is not None:
        text = (source.folder / CONFIG).read_bytes()
        return text.decode() if parse_json(text, CONFIG) == released else json.dumps(released, indent=2) + "\n"
    stored = source.tensors.entries[leaves(source.config)["embed_tokens"].name(())][0].name
    name = {"keep": stored, "fp8": "bfloat16"}.get(dtype, dtype)
    quantization = quantization_config(power_of_two) if dtype == "fp8" else None
    if released is None:
        values: dict[str, Any] = released_json(source.config, dtype=name, quantization=quantization)
    else:
        values = {key: value for key, value in released.items() if key != "quantization_config"}
        values |= {key: name for key in ("torch_dtype", "dtype") if key in values}
        if quantization and "quantization_config" in released:
            quantization = released["quantization_config"]
        values |= {"quantization_config": quantization} if quantization else {}
    return json.dumps(values, indent=2) + "\n"
