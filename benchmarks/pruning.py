"""What dropping image tokens saves, beside the prediction of ``vlmattn.cost``: 12 layers, 768 wide, 576 + 60 tokens.

first token   of generate(), which is the prefill; ``predicted`` is the ratio of operations, ``limit`` that plus 0.08
decode step   the median of 16; ``predicted`` is the ratio of bytes read. Weights dominate at one short prompt: no claim
KV cache      bytes after one prefill, and the ratio predicted

python -m benchmarks.pruning --out benchmarks/results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vlmattn
from vlmattn.evals.bench import FIRST, STEP, bench, random_inputs, random_model
from vlmattn.evals.timing import Row, line, rows, write_csv
from vlmattn.recipe import Recipe

RECIPES = (
    Recipe.of("fastv"),
    Recipe.of("fastv", keep_ratio=0.25),
    Recipe.of("fastv", layer=6),
    Recipe.of("pyramiddrop"),
)
STEPS, MARGIN = 16, 0.08


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = random_model()
    inputs = random_inputs(model, after=58)
    costs = {recipe.name: vlmattn.cost(model, inputs, recipe, measure=True) for recipe in (Recipe.of("none"), *RECIPES)}
    table: list[Row] = []
    for row in bench(model, inputs, RECIPES, options.rounds, 1 + STEPS):
        cost = costs[str(row["candidate"])]
        if row["what"] == FIRST:
            ratio = round(cost.prefill_ratio, 3)
            flops = cost.edited.measured_flops / cost.bare.measured_flops  # type: ignore[operator]
            row |= {"predicted": ratio, "limit": round(ratio + MARGIN, 3), "flops_ratio": round(flops, 3)}
        elif row["what"] == STEP:
            row |= {"predicted": round(cost.decode_ratio, 3)}
        table.append(row)
    held = {name: [float(cost.edited.measured_kv_bytes or 0)] for name, cost in costs.items()}
    for row in rows("KV cache", held, "none", "mb"):
        table.append(row | {"predicted": round(costs[str(row["candidate"])].kv_ratio, 3)})
    for row in table:
        print(line(row), f"predicted x{row['predicted']:.3f}" if "predicted" in row else "")
    write_csv(options.out / "pruning.csv", table)


if __name__ == "__main__":
    main()
