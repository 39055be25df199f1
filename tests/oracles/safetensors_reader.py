"""Minimal safetensors reader: an 8-byte header length, a JSON header, then raw little-endian tensors."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of one file by name, read-only views of one buffer, in their stored dtype and shape."""
    buffer = Path(path).read_bytes()
    header_bytes = int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    data = memoryview(buffer)[8 + header_bytes :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        raw = np.frombuffer(data[start:end], np.uint8)  # bytes first: float8 and bfloat16 have no buffer format of their own
        tensors[name] = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors
