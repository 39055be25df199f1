"""Run by an interpreter that has torch and transformers: logits of a released folder, by another implementation's own reader.

python -m oracles.transformers_peer FOLDER TOKENS.npy LOGITS.npy
"""

import sys

import numpy as np


def main(folder: str, tokens: str, out: str) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(tokens))).logits
    np.save(out, logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
