"""A small model and data for the examples, made on the spot; needs no network.

    python -m examples.small_inputs --output small

Writes small/model (random weights, bf16), and questions with answers in the formats that TRL's trainers take:
sft.jsonl, preferences.jsonl (chosen and rejected answers) and questions.jsonl (prompts with the one right answer).
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.demo_model import DemoShape, Row, make_rows, make_tokenizer, write_model, write_rows

SHAPE = DemoShape(hidden=256, num_layers=4, mlp=704, num_heads=8, num_kv_heads=4, head_std=0.1)
_NUM_ROWS = 400
_NUM_QUESTIONS = 16
"""Few enough to be learned in a minute."""


def few_questions(rows: Sequence[Row], *, num_questions: int = _NUM_QUESTIONS) -> list[Row]:
    """The rows about the first so many different questions."""
    kept = list(dict.fromkeys(question(row) for row in rows))[:num_questions]
    return [row for row in rows if question(row) in kept]


def question(row: Row) -> str:
    """What a row asks."""
    return row["prompt"][0]["content"]


def preferences(rows: Sequence[Row], *, seed: int = 0) -> list[dict[str, object]]:
    """Each answer, preferred to the answer to another question."""
    pick = random.Random(seed)
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": pick.choice([other for other in rows if other["completion"] != row["completion"]])[
                "completion"
            ],
        }
        for row in rows
    ]


def questions(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Prompts and the text of the right answer, each question once."""
    found: dict[str, dict[str, object]] = {
        question(row): {"prompt": row["prompt"], "answer": row["completion"][0]["content"]} for row in rows
    }
    return list(found.values())


def write_inputs(folder: Path, *, shape: DemoShape = SHAPE, num_questions: int = _NUM_QUESTIONS) -> None:
    """Write the model and the three data sets."""
    rows = few_questions(make_rows(_NUM_ROWS), num_questions=num_questions)
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model", make_tokenizer(rows), shape=shape)
    write_rows(folder / "sft.jsonl", rows)
    _write(folder / "preferences.jsonl", preferences(rows))
    _write(folder / "questions.jsonl", questions(rows))


def _write(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("small"))
    folder = parser.parse_args().output
    write_inputs(folder)
    print(f"{folder}: model, sft.jsonl, preferences.jsonl, questions.jsonl")


if __name__ == "__main__":
    main()
