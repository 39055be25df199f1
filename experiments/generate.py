"""What does a model say? A prompt continued, or a conversation at the terminal.

    python -m experiments.generate --checkpoint=DIR --prompt='def main():' [--speculative] [--temperature=0.7 --top_p=0.95]
    python -m experiments.generate --checkpoint=DIR --chat

DIR: a released folder with its tokenizer.json, one that `experiments.convert` wrote, or a training run's. Without `--prompt`
each line that is typed is a prompt (in `--chat`, a turn of one conversation); Ctrl-C ends an answer, Ctrl-D the program.
`--prompt` may be given several times: all are continued side by side. `--speculative` drafts with the MTP modules; the last
line says how many drafts were accepted. `--dtype=int8` (a scale a channel) or `int4` (one for 64 inputs) keeps matrices in so
few bits. `--layout=decode` (or `prefill`) divides sequences, heads and experts among all devices, as the report does; the last
line then says how evenly the experts' rows fell on them.
"""

import sys
from collections.abc import Sequence

from absl import flags

from dsv3_jax.inference.sampling import Sampling, check_sampling
from dsv3_jax.inference.talk import Reply, Speaker, cost_of_bits, in_few_bits, open_speaker, reply, summary
from dsv3_jax.inference.text import chat_ids, prompt_ids
from dsv3_jax.interop.source import open_source
from experiments import _cli
from experiments._mesh import define_mesh_flags, placement_from, split_cpu

DTYPES = ("float32", "bfloat16", "stored", "int8", "int4")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    flags.DEFINE_string("checkpoint", None, "folder of a model", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue; none: read from the terminal", flag_values=values)
    flags.DEFINE_bool("chat", False, "prompts are a user's turns, laid out as the released models expect", flag_values=values)
    flags.DEFINE_string("system", None, "with --chat: the system's text", flag_values=values)
    flags.DEFINE_bool("speculative", False, "draft with the MTP modules", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 256, "at most so many new tokens", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0: the most probable token, always", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw from the k most probable; 0: from all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest whose probabilities reach p", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "draw from those at least so probable, relative to the most probable", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer; may be given several times", flag_values=values)
    flags.DEFINE_string("dtype", "float32", f"of weights: {', '.join(DTYPES)}", flag_values=values)
    flags.DEFINE_bool("average", False, "a run's averaged weights", flag_values=values)
    define_mesh_flags(values, None)


def main(values: flags.FlagValues = flags.FLAGS) -> int:
    split_cpu(values)
    if not values.checkpoint:
        raise ValueError("--checkpoint: expected a folder, got none")
    if values.dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {values.dtype!r}")
    if values.system is not None and not values.chat:
        raise ValueError("--system: expected together with --chat")
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.min_p, values.seed)
    check_sampling(sampling)
    compute = "bfloat16" if values.dtype == "bfloat16" else "float32"
    source = open_source(values.checkpoint, compute_dtype=compute, mtp=values.speculative, average=values.average)
    bits = values.dtype if values.dtype in ("int8", "int4") else None
    placement = placement_from(values, source.config)
    if placement is not None and values.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: expected float32 or bfloat16 with --layout, got {values.dtype!r}")
    speaker = open_speaker(source, "float32" if bits else values.dtype, placement)
    if bits:
        exact, speaker = speaker, in_few_bits(speaker, bits)
        sample = prompt_ids(speaker.tokenizer, values.prompt[0] if values.prompt else "The answer is")
        prefixes = [sample[:end] for end in range(len(sample), 0, -1)][:16]
        print(cost_of_bits(speaker, exact, prefixes), file=sys.stderr)
        del exact
    if not values.prompt:
        return _converse(speaker, sampling, values)
    prompts = [_turn(speaker, [], text, values) for text in values.prompt]
    answer = _answer(speaker, prompts, sampling, values, show=len(prompts) == 1)
    if len(prompts) > 1:
        pairs = zip(values.prompt, answer.texts, strict=True)
        print("\n\n".join(f"[{i}] {asked}\n{text}" for i, (asked, text) in enumerate(pairs)))
    print(summary(answer.statistics, answer.device_rows_LP), file=sys.stderr)
    return 0


def _turn(speaker: Speaker, before: list[dict[str, str]], text: str, values: flags.FlagValues) -> list[int]:
    if not values.chat:
        return prompt_ids(speaker.tokenizer, text)
    system = [{"role": "system", "content": values.system}] if values.system is not None else []
    return chat_ids(speaker.tokenizer, [*system, *before, {"role": "user", "content": text}])


def _answer(
    speaker: Speaker, prompts: Sequence[Sequence[int]], sampling: Sampling, values: flags.FlagValues, *, show: bool
) -> Reply:
    def say(number: int, text: str) -> None:
        print(text, end="", flush=True)

    answer = reply(
        speaker, prompts, max_new_tokens=values.max_new_tokens, sampling=sampling, stop=values.stop,
        speculative=values.speculative, show=say if show else lambda number, text: None,
    )  # fmt: skip
    if show:
        print(flush=True)
    return answer


def _converse(speaker: Speaker, sampling: Sampling, values: flags.FlagValues) -> int:
    """Turn by turn, until the input ends."""
    turns: list[dict[str, str]] = []
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(asking)
        except EOFError:
            print()
            return 0
        if not text:
            continue
        try:
            answer = _answer(speaker, [_turn(speaker, turns, text, values)], sampling, values, show=True)
        except KeyboardInterrupt:
            print(flush=True)
            continue
        print(summary(answer.statistics, answer.device_rows_LP), file=sys.stderr)
        if values.chat:
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.texts[0]}]


if __name__ == "__main__":
    define_flags()
    _cli.run(main)
