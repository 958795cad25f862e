"""What presets cost end to end, on a random LLaVA of 12 layers, 768 wide, 576 image tokens: prompt and 33 new tokens.

python -m benchmarks.generate --out benchmarks/results
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from vlmattn.evals.bench import bench, random_inputs, random_model
from vlmattn.evals.timing import line, write_csv

PRESETS = (
    "var", "vhr", "pai", "paint", "vaf", "heads_guided", "sofa", "bidirectional_prompt", "knockout_image_text",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a random model has no known sinks
    model = random_model()
    table = bench(model, random_inputs(model), PRESETS, options.rounds, new_tokens=33)
    print(*map(line, table), sep="\n")
    write_csv(options.out / "generate.csv", table)


if __name__ == "__main__":
    main()
