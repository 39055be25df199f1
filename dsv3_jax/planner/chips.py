"""Accelerators as the planner sees them [§3.1]: peaks, memory and links of one device, each number an input with its source."""

from typing import Any, NamedTuple

from dsv3_jax.planner.rows import Number
from dsv3_jax.settings import parse_settings


class Chip(NamedTuple):
    """One JAX device. Rates count one direction; TFLOPS are dense. `sources` names where each number comes from.

    GPUs: `node_gbs` to the others of its node, `network_gbs` to other nodes. TPUs: `torus_dims` > 0, one kind of link, and both
    rates are what all links of a device carry together.
    """

    name: str
    bf16_tflops: float
    fp8_tflops: float
    hbm_gib: float
    hbm_gbs: float
    node_gbs: float
    network_gbs: float
    torus_dims: int
    sources: dict[str, str]

    @property
    def platform(self) -> str:
        return "tpu" if self.torus_dims else "gpu"

    @property
    def links(self) -> tuple[str, ...]:
        return ("ici",) if self.torus_dims else ("node", "network")

    def link_bytes_per_second(self, link: str) -> Number:
        return 1e9 * (self.network_gbs if link == "network" else self.node_gbs)


NUMBERS = ("bf16_tflops", "fp8_tflops", "hbm_gib", "hbm_gbs", "node_gbs", "network_gbs", "torus_dims")
UNITS = dict(zip(NUMBERS, ("TFLOPS", "TFLOPS", "GiB", "GB/s", "GB/s", "GB/s", "dims"), strict=True))

_HOPPER_HBM = "XLA's target description of an H100 SXM: 84,978,434,048 bytes, 3,352 GB/s"
_CLOUD = "Google Cloud's specification of TPU7x beside its predecessors"
_ICI = f"{_CLOUD}: bidirectional figure, halved"
_COMPILER = "what the TPU compiler lets a program use"
_TPU = dict(hbm=_COMPILER, hbm_gbs=_CLOUD, node=_ICI, network=_ICI, torus=_CLOUD)


def _sources(**given: str) -> dict[str, str]:
    return {name: given.get(name, given.get(name.split("_")[0], "")) for name in NUMBERS}


CHIPS = {
    "h800": Chip(
        "h800", 989, 1979, 79.14, 3352, 160, 50, 0,
        _sources(
            bf16="ISCA'25 paper: 385 TFLOPS are 38.94 % of it",
            fp8="twice BF16, as on the H100 (unverified)",
            hbm=f"taken as the H100's (unverified); {_HOPPER_HBM}",
            node="report, section 3.2.2: effective NVLink",
            network="report, section 3.2.2: one 400 Gb/s InfiniBand card a GPU",
            torus="NVSwitch and a switched network",
        ),
    ),
    "h100": Chip(
        "h100", 989, 1979, 79.14, 3352, 450, 50, 0,
        _sources(
            bf16="NVIDIA's H100 SXM data sheet, without sparsity",
            fp8="NVIDIA's H100 SXM data sheet, without sparsity",
            hbm=_HOPPER_HBM,
            node="NVIDIA's H100 SXM data sheet: NVLink 900 GB/s, halved",
            network="one 400 Gb/s card a GPU, as in NVIDIA's DGX H100",
            torus="NVSwitch and a switched network",
        ),
    ),
    "h200": Chip(
        "h200", 989, 1979, 140.4, 4800, 450, 50, 0,
        _sources(
            bf16="NVIDIA's H200 SXM data sheet, without sparsity",
            fp8="NVIDIA's H200 SXM data sheet, without sparsity",
            hbm="the driver's 143,771 MiB",
            hbm_gbs="NVIDIA's H200 SXM data sheet",
            node="NVIDIA's H200 SXM data sheet: NVLink 900 GB/s, halved",
            network="one 400 Gb/s card a GPU, as in NVIDIA's DGX H200",
            torus="NVSwitch and a switched network",
        ),
    ),
    "v5p": Chip(
        "v5p", 459, 459, 95.74, 2765, 600, 600, 3,
        _sources(bf16=_CLOUD, fp8=f"{_CLOUD}: as BF16, not native", **_TPU),
    ),
    "v6e": Chip(
        "v6e", 918, 918, 31.24, 1638, 400, 400, 2,
        _sources(bf16=_CLOUD, fp8=f"{_CLOUD}: as BF16, not native", **_TPU),
    ),
    "tpu7x": Chip(
        "tpu7x", 1153.5, 2307, 94.74, 3690, 300, 300, 3,
        _sources(
            bf16=f"{_CLOUD}: a device is half a chip", fp8=f"{_CLOUD}: a device is half a chip", hbm=_COMPILER,
            hbm_gbs=f"{_CLOUD}: half a chip's", node=f"{_ICI}, half a chip's", network=f"{_ICI}, half a chip's", torus=_CLOUD,
        ),
    ),
}  # fmt: skip


def chip_named(name: str, settings: list[str] | None = None) -> Chip:
    """A chip of the table, with numbers replaced by `["field=value", ...]`.

    Raises ValueError for an unknown chip or field, listing the known ones, and for a value that is no positive number.
    """
    if name not in CHIPS:
        raise ValueError(f"--chip: expected one of {', '.join(CHIPS)}, got {name!r}")
    chip = CHIPS[name]
    for field, text in parse_settings(settings or []).items():
        if field not in NUMBERS:
            raise ValueError(f"--chip_set: expected one of {', '.join(NUMBERS)}, got {field!r}")
        try:
            value = int(text) if field == "torus_dims" else float(text)
        except ValueError:
            raise ValueError(f"--chip_set: {field}: expected a number, got {text!r}") from None
        if not (0 < value < float("inf") or (field == "torus_dims" and value == 0)):
            raise ValueError(f"--chip_set: {field}: expected a positive number, got {text!r}")
        changed: dict[str, Any] = {field: value, "sources": {**chip.sources, field: "the command line"}}
        chip = chip._replace(**changed)
    return chip
