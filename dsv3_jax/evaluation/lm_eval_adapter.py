"""Lets lm-eval (extra `lm-eval`) drive our models, as its model `dsv3_jax`; its tasks stay its own.

    python -m dsv3_jax.evaluation.lm_eval_adapter --model_args checkpoint=DIR --tasks=NAME --include_path=FOLDER [...]

Everything behind the module's name goes to lm-eval's own command line; FOLDER holds tasks as YAML files, whose data may be
local JSON Lines (`dataset_path: json`, `dataset_kwargs: {data_files: {test: FILE}}`), so that nothing is downloaded. Arguments
of the model: `checkpoint`, and as in `experiments.evaluate` `dtype`, `average`, `window`, `overlap`, `batch_tokens`,
`stream_layers`, `seed`; `--batch_size` is the number of sequences that are continued together (lm-eval says 1 if it is not
given), and `--device` is left to JAX. In Python: import this module, then
`lm_eval.simple_evaluate(model="dsv3_jax", model_args="checkpoint=DIR", ...)`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from dsv3_jax.evaluation.bits_per_byte import check_overlap, windows
from dsv3_jax.evaluation.exact_match import batches, continued, prompt_of
from dsv3_jax.evaluation.logprob import Request, Scored, cut, encode_pair, scored
from dsv3_jax.evaluation.subject import open_subject
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.text import prompt_ids
from dsv3_jax.interop.read import Dtype

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    MISSING = "lm_eval_adapter: needs the package lm-eval; install the extra: pip install 'dsv3_jax[lm-eval]'"
    if __name__ == "__main__":
        print(f"error: {MISSING}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(MISSING) from None

NAME = "dsv3_jax"
NEW_TOKENS = 256  # lm-eval's default
DRAWING = ("temperature", "top_k", "top_p", "min_p")


@register_model(NAME)
class Dsv3Lm(LM):
    """A checkpoint that answers lm-eval's three kinds of question; texts in, numbers and texts out.

    Raises ValueError as `open_subject` does.
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: Dtype = "float32",
        average: bool = False,
        window: int | None = None,
        overlap: int | None = None,
        batch_tokens: int = 8192,
        batch_size: int | str | None = 16,
        stream_layers: bool = False,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        how: Any = {"dtype": dtype, "average": average, "window": window, "stream_layers": stream_layers}
        self.subject = open_subject(checkpoint, **how)
        self.batch_tokens, self.seed = batch_tokens, seed
        self.batch_size = int(str(batch_size)) if str(batch_size).isdecimal() else max_batch_size or 16  # `auto` too
        self.overlap = self.subject.window // 2 if overlap is None else overlap
        check_overlap(self.subject.window, self.overlap)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests: the tokenizer's hash."""
        return self.subject.tokenizer_hash

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would give it) of each (context, continuation)."""
        window, tokenizer = self.subject.window, self.subject.tokenizer
        asked = [cut(*encode_pair(tokenizer, *request.args), window)[0] for request in requests]
        found = self._scored(asked, "log-likelihoods", disable_tqdm)
        answers = [(each.logprob, each.greedy) for each in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text behind BOS, by overlapping windows."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            own = windows(prompt_ids(self.subject.tokenizer, request.args[0]), self.subject.window, self.overlap)
            asked += own
            owners += [number] * len(own)
        sums = [0.0] * len(requests)
        for owner, each in zip(owners, self._scored(asked, "texts", disable_tqdm), strict=True):
            sums[owner] += each.logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of `until`; greedy unless `do_sample` or a temperature says otherwise."""
        prompts, drawings = [], []
        for request in requests:
            text, how = request.args
            most = next((how[n] for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if how.get(n)), NEW_TOKENS)
            until = how.get("until") or ()
            stop = [s for s in ([until] if isinstance(until, str) else until) if s]
            prompts.append(prompt_of(self.subject.tokenizer, text, self.subject.window, int(most), stop))
            drawings.append(self._drawing(how))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm, dynamic_ncols=True) as bar:
            for drawing in dict.fromkeys(drawings):
                alike = [i for i, each in enumerate(drawings) if each == drawing]
                rows = min(self.batch_size, len(alike))
                for members in batches([prompts[i] for i in alike], rows):
                    own = [alike[i] for i in members]
                    answers = continued(self.subject.speaker, [prompts[i] for i in own], rows, drawing)
                    for i, text in zip(own, answers, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(own))
        return texts

    def _drawing(self, how: dict[str, Any]) -> Sampling:
        given = {name: how[name] for name in DRAWING if how.get(name) is not None}
        if not how.get("do_sample", bool(given.get("temperature"))):
            return Sampling(seed=self.seed)
        return Sampling(**{"temperature": 1.0, **given}, seed=self.seed)

    def _scored(self, asked: Sequence[Request], what: str, quiet: bool) -> list[Scored]:
        found: dict[int, Scored] = {}
        with tqdm(total=len(asked), desc=what, disable=quiet, dynamic_ncols=True) as bar:
            for batch in scored(self.subject.supply, asked, self.batch_tokens):
                found |= batch
                bar.update(len(batch))
        return [found[i] for i in range(len(asked))]


def main(arguments: Sequence[str]) -> int:
    """lm-eval's command line, with this model unless another is named. Returns an exit status."""
    from lm_eval.__main__ import cli_evaluate

    rest = list(arguments)
    if rest[:1] == ["run"]:
        rest = rest[1:]
    if not any(word in ("--model", "-M") or word.startswith("--model=") for word in rest):
        rest = ["--model", NAME, *rest]
    sys.argv = [sys.argv[0], "run", *rest]
    try:
        cli_evaluate()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
