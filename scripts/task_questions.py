"""Makes the questions of `src/bitladder/evaluation/harness/` from the text of a novel.

    python scripts/task_questions.py persuasion.txt src/bitladder/evaluation/harness

The text is *Persuasion* by Jane Austen (1818, public domain) as the R package janeaustenr 1.0.0 has it
(`data/persuasion.rda`), a line a row. No model has a say in what is asked: passages, wrong answers and their order are
drawn with a fixed seed, and the questions stand in the order of the draw, so that the first ones are a sample of all.

- `novel_endings`: a sentence of narration without its last five words, and four ways to end it.
- `novel_words`: a passage of 30 to 60 words without its last word, and ten words to end it.

The wrong answers end other sentences of the novel.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 0
QUESTIONS = 500
ENDING = 5  # words
ENDINGS = 4  # offered
WORDS = 10  # offered
SENTENCE = range(14, 41)  # words of a sentence whose ending is asked for
PASSAGE = range(30, 61)  # words of a passage whose last one is asked for
LEAST_COUNT = 2  # sentences of the novel that end in a word which is asked for, or offered
_ABBREVIATED = r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bEsq\.)(?<!\bCapt\.)"
_BETWEEN = _ABBREVIATED + r"""(?:(?<=[.!?])|(?<=[.!?]")) (?=[A-Z"])"""


def paragraphs(text: str) -> Iterator[list[str]]:
    """Yield the sentences of each paragraph, without marks of emphasis."""
    for block in re.split(r"\n\s*\n", text):
        joined = " ".join(block.replace("_", "").split())
        if joined.endswith((".", "!", "?", '"')) and not joined.startswith("Chapter"):
            yield re.split(_BETWEEN, joined)


def last_word(sentence: str) -> str | None:
    """Return the word that ends a sentence, where it is a plain one and a full stop follows."""
    found = re.search(r" ([a-z]{3,})\.$", sentence)
    return found[1] if found else None


def asked(draw: random.Random, context: str, right: str, others: list[str], offered: int) -> dict[str, object]:
    """Return one question; the right answer stands anywhere."""
    choices = [right, *draw.sample(sorted(set(others) - {right}), offered - 1)]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def endings(draw: random.Random, texts: list[list[str]]) -> list[dict[str, object]]:
    """Return the questions of `novel_endings`."""
    sentences = [one.split() for text in texts for one in text if '"' not in one]
    usable = [words for words in sentences if len(words) in SENTENCE and words[-1].endswith(".")]
    tails = [" ".join(words[-ENDING:]) for words in usable]
    pairs = [(" ".join(words[:-ENDING]), tail) for words, tail in zip(usable, tails, strict=True)]
    return [asked(draw, context, right, tails, ENDINGS) for context, right in draw.sample(pairs, QUESTIONS)]


def words(draw: random.Random, texts: list[list[str]]) -> list[dict[str, object]]:
    """Return the questions of `novel_words`."""
    ends = [word for text in texts for one in text if (word := last_word(one))]
    pool = sorted({word for word in ends if ends.count(word) >= LEAST_COUNT})
    pairs = []
    for text in texts:
        for index, sentence in enumerate(text):
            if last_word(sentence) not in pool:
                continue
            for start in range(index, -1, -1):  # the shortest passage that ends with it and is long enough
                passage = " ".join(text[start : index + 1]).split()
                if len(passage) in PASSAGE:
                    pairs.append((" ".join(passage[:-1]), str(last_word(sentence))))
                    break
    return [asked(draw, context, right, pool, WORDS) for context, right in draw.sample(pairs, QUESTIONS)]


def main() -> None:
    """Write both files."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    texts = list(paragraphs(source.read_text(encoding="utf-8")))
    for name, make in (("novel_endings", endings), ("novel_words", words)):
        lines = [json.dumps(one, ensure_ascii=False) for one in make(random.Random(SEED), texts)]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
