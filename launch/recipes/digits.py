"""Write the 1,797 handwritten digits of scikit-learn as PNG files and a JSONL of questions.

python launch/recipes/digits.py OUT
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from phi3v.files import write_text
from phi3v.printing import print
from phi3v.training.ranks import run_command

QUESTION = "<|image_1|>\nWhich digit is this?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    digits = load_digits()
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (ink, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{number:04d}.png"
        pixels = np.round(ink * 255 / 16).astype(np.uint8)  # 8 x 8, 0 to 16 of ink
        Image.fromarray(255 - pixels).save(out / name)
        messages = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": str(digit)},
        ]
        rows.append({"id": f"digit-{number:04d}", "messages": messages, "images": [name]})
    write_text(out / "digits.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows):,} digits: {out / 'digits.jsonl'}")


if __name__ == "__main__":
    run_command(main)
