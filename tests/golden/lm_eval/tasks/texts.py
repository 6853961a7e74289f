"""Questions for the tasks beside this file, from words that the tiny model's tokenizer knows."""

import random

from datasets import Dataset

WORDS = "the cat sat on mat and dog ran after red ball in green garden é ☃".split()


def some(draw, count):
    return " ".join(draw.choice(WORDS) for _ in range(count))


def choices(**_):
    draw = random.Random(0)
    found = []
    for n in range(16):
        question, options = some(draw, 3 + n % 7), [some(draw, 1 + k) for k in range(3)]
        found.append({"question": question, "choices": options, "answer": n % 3})
    return {"test": Dataset.from_list(found)}


def cut(**_):
    """Contexts around the length of the model's."""
    draw = random.Random(1)
    found = [
        {"question": some(draw, 12 + 4 * n), "choices": [some(draw, 2), "</s> the"], "answer": 0}
        for n in range(8)
    ]
    return {"test": Dataset.from_list(found)}


def rolling(**_):
    draw = random.Random(2)
    return {"test": Dataset.from_list([{"text": some(draw, n)} for n in (1, 5, 30, 120)])}


def answers(**_):
    draw = random.Random(3)
    found = [{"question": some(draw, 1 + 4 * n), "answer": some(draw, 2)} for n in range(5)]
    return {"test": Dataset.from_list(found)}
