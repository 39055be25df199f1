"""What a trained model writes: the beginnings of held-out documents, continued [§2.2: with the MTP modules as drafters]."""

from pathlib import Path

from dsv3_jax.data.pipeline import Data
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.talk import open_speaker, reply
from dsv3_jax.inference.text import prompt_ids
from dsv3_jax.interop.source import open_source

PROMPT_TOKENS, NEW_TOKENS = 16, 48
SAMPLING = Sampling(temperature=0.7, top_p=0.95)


def sample(workdir: str | Path, data: Data) -> str:
    """Markdown: one continuation a domain, and how the drafts did. Raises ValueError if the run's checkpoint cannot be read."""
    source = open_source(workdir)
    speaker = open_speaker(source, "float32")
    by_domain = zip(data.domains, data.eval_texts, strict=True)
    beginnings = {domain: max(texts, key=len) for domain, texts in by_domain if any(texts)}
    prompts = [
        prompt_ids(speaker.tokenizer, text[: 16 * PROMPT_TOKENS].decode(errors="ignore"))[: PROMPT_TOKENS + 1]
        for text in beginnings.values()
    ]
    answer = reply(
        speaker, prompts, max_new_tokens=NEW_TOKENS, sampling=SAMPLING, speculative=source.config.num_nextn_predict_layers > 0
    )
    s = answer.statistics
    how = f"Temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}, seed {SAMPLING.seed}; the prompt stands before the bar."
    if s.drafts:
        how += f" Of the MTP modules' drafts {s.acceptance:.0%} were accepted: {s.tokens_per_step:.2f} tokens a step."
    blocks = [
        # Four backticks: a text may hold three.
        f"{domain}\n\n````\n{speaker.tokenizer.decode(prompt)}┃{text}\n````\n"
        for domain, prompt, text in zip(beginnings, prompts, answer.texts, strict=True)
    ]
    return "\n".join(["## Sample", "", how, "", *blocks])
