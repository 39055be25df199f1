"""Small invented texts in three domains that even a tiny tokenizer can tell apart."""

import random

VOCAB_SIZE = 400
WORDS = {
    "code": "def return if else for while lambda yield import class self None True".split(),
    "prose": "the morning was cold and nobody in the village had seen the ferry leave before noon".split(),
    "verse": "O rose, thou art sick; the invisible worm that flies in the night — é 日本 🌹".split(),
}


def invented(domain: str, seed: int, n_words: int = 120) -> str:
    """A text of the domain's words, another one for each seed, with punctuation before many of its line ends."""
    rng = random.Random(f"{domain} {seed}")
    lines = [" ".join(rng.choices(WORDS[domain], k=rng.randint(2, 9))) for _ in range(n_words // 6)]
    return "\n".join(line + rng.choice(["", ".", "):", ";", ",", "!!"]) for line in lines) + "\n"
