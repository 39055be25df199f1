"""Run by an interpreter that has torch and transformers: logits of a released folder, by another implementation's own reader.

python -m oracles.transformers_peer FOLDER TOKENS.npy LOGITS.npy
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: str, tokens: str, out: str) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    how: dict[str, Any] = {}
    if "quantization_config" in json.loads((Path(folder) / "config.json").read_text()):
        how["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)  # its FP8 products need a GPU
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager", **how
    )
    model = model.float()  # beside FP8, which it multiplies out in float32, it keeps what the file has
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(tokens))).logits
    np.save(out, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
