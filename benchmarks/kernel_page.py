"""Writes docs/kernels.md: what the decode kernels do, the compiler's table, and arithmetic of bytes and operations.

No figure on the page is a measured time.

python -m benchmarks.kernel_page --out docs/kernels.md
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmattn.files import write_whole
from vlmattn.kernels.triton_decode import MOST_DIM, MOST_GROUPS, MOST_SPLITS, block_keys, tile_rows

RESOURCES = Path(__file__).parent / "results" / "kernel_resources.csv"
PROCESSORS, BANDWIDTH, OPERATIONS = (
    132,
    3.35e12,
    989e12,
)  # H100 SXM by its data sheet: bytes and bf16 operations a second
LENGTHS = (700, 4096, 32768)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Parameters that a decode step reads."""
        attention = 2 * self.hidden * self.dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocabulary


DECODERS = (
    Decoder("LLaVA-1.5-7B", 32, 4096, 32, 32, 128, 11008, 32064),
    Decoder("Qwen2.5-VL-7B", 28, 3584, 28, 4, 128, 18944, 152064),
    Decoder("Qwen2.5-VL-72B", 80, 8192, 64, 8, 128, 29568, 152064),
)


@dataclass(frozen=True)
class Step:
    """One token of one sequence in bf16: bytes and operations of all layers' attention."""

    of: Decoder
    keys: int
    groups: int

    @property
    def rows(self) -> int:
        return self.of.heads // self.of.kv_heads * self.groups

    @property
    def splits(self) -> int:
        tasks = self.of.kv_heads * -(-self.rows // tile_rows(self.rows))
        return max(1, min(-(-2 * PROCESSORS // tasks), -(-self.keys // 256), MOST_SPLITS))

    @property
    def cache(self) -> int:
        return 2 * 2 * self.of.layers * self.of.kv_heads * self.of.dim * self.keys

    @property
    def ids(self) -> int:
        """Group ids: a byte per key and layer."""
        return self.of.layers * self.keys if self.groups > 1 else 0

    def partials(self, live: int) -> int:
        """float32 results of the splits, written and read, if ``live`` groups have keys in each."""
        return 2 * 4 * self.of.layers * self.of.heads * self.splits * (live * self.of.dim + self.groups)

    @property
    def operations(self) -> int:
        """What the matrix instructions do, padding of the tile included."""
        tiles = -(-self.rows // tile_rows(self.rows))
        return 4 * self.of.layers * self.of.kv_heads * tiles * tile_rows(self.rows) * self.of.dim * self.keys


def roofline() -> Iterator[str]:
    """Lines of the table."""
    yield (
        "| model | keys | weights, GB | keys and values, MB | splits | group ids | partials, plain | groups in runs |"
        " groups everywhere | operations per byte, plain | 4 groups |"
    )
    yield "|" + "---|" * 11
    for decoder in DECODERS:
        for keys in LENGTHS:
            plain, grouped = Step(decoder, keys, 1), Step(decoder, keys, MOST_GROUPS)
            share = [
                f"{100 * part / plain.cache:.2f} %"
                for part in (grouped.ids, plain.partials(1), grouped.partials(1), grouped.partials(MOST_GROUPS))
            ]
            ratios = [f"{step.operations / step.cache:.0f}" for step in (plain, grouped)]
            cells = [
                decoder.name,
                str(keys),
                f"{2 * decoder.weights / 1e9:.1f}",
                f"{plain.cache / 1e6:.0f}",
                str(grouped.splits),
            ]
            yield "| " + " | ".join([*cells, *share, *ratios]) + " |"


def resources() -> Iterator[str]:
    """Lines of the compiler's table, one row per case, registers / shared KB / matrix instructions / spills per
    target."""
    with RESOURCES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    yield "| dim | heads per KV head | groups | more | tile | " + " | ".join(targets) + " |"
    yield "|" + "---|" * (5 + len(targets))
    cases: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        more = [name for name in ("weighted", "lift", "indexed") if row[name] == "True"]
        more += [f"bias {row['bias']}"] if row["bias"] else []
        more += [f"{row['tokens']} query rows"] if row["tokens"] != "1" else []
        more += ["no mask"] if row["masked"] != "True" else []
        more += [row["dtype"]] if row["dtype"] != "bf16" else []
        case = (row["dim"], row["repeat"], row["groups"], ", ".join(more), row["tile"])
        cell = f"{row['registers']} / {int(row['shared']) / 1024:.0f} / {row['matrix']} / {row['spills']}"
        cases.setdefault(case, []).append(cell)
    for case, cells in cases.items():
        yield "| " + " | ".join([*case, *cells]) + " |"


def versions() -> str:
    with RESOURCES.open(newline="") as file:
        return f"triton {next(csv.DictReader(file))['triton']}"


def page() -> str:
    """The whole page."""
    return f"""# Decode kernels

Written by `python -m benchmarks.kernel_page --out docs/kernels.md`; do not edit it by hand. **No figure here is a measured
time**: the first table is what compilers say of the kernels, the second is arithmetic. `make gpu` measures on a card.

## What runs
A decode step attends with one query row per head. `vlmattn/kernels/triton_decode.py` runs it as split-KV flash decoding in two
kernels, and an edit costs no second look at the cache:

- **Groups are virtual query rows.** Row (token, head, group) of the tile is that head's query, and sees keys of that group only.
  A matrix instruction takes 16 rows and decoding has 1 (or the heads that share a KV head), so the padding holds the groups.
  Each row is an ordinary online softmax; a split of the keys leaves (o_g, lse_g).
- **Gains live in the second kernel**, which merges the splits, turns lse_g into masses M_g and writes
  eta_h sum_g gamma_g M_g o_g: transfers with their gates, scales, renormalisation, head gains, sink logits. Plans that look at all
  heads (GIFT) get their gains from torch between the two.
- **Masks** are one byte per key (padding, static caches, hidden and opened keys) or what transformers made; the causal order of
  several rows needs none. Logit parts are one float per key, or per key and head.
- **A group without keys in a split writes nothing**, so that groups in contiguous runs cost about the partials of plain decoding.
- **Several query rows** (drafts of assisted decoding, a camera frame against its map) are more rows of the tile.
- **`AttentionEdit.read`** names the cache slots of each KV head; others are not loaded.

bfloat16 and float16, head dimensions up to {MOST_DIM}, up to {MOST_GROUPS} groups (twice the rows with key weights). Whatever else is run by
the other backends; `VLMATTN_BACKEND=triton` forces the kernel, and then says what it cannot do. float32 runs elsewhere.

| on a GPU, half precision, up to 16 query rows | else |
|---|---|
| `triton` | `eager` for one row, `merge` or `eager` for a prompt |

## What the compiler says
Registers per thread / shared memory in KB / matrix instructions / spills, bf16 where nothing else is said, {block_keys(128)} keys
at a time ({block_keys(256)} for head dimension 256), compiled ahead of time with {versions()}
(`python -m benchmarks.static --out benchmarks/results/kernel_resources.csv`). Tests hold them: at equal tile the grouped
kernel has at most 16 registers more than the plain one and as many matrix instructions, and nothing spills at head dimension
128 for up to 16 virtual rows.

{chr(10).join(resources())}

Several heads per KV head with groups fill tiles of 32 or 64 rows, which cost registers whether the rows are heads or groups.

## Bytes and operations of a step
One token of one sequence in bf16, all layers. Group ids and partials (float32, written and read; much of it stays in the L2
cache) in percent of the keys and values; splits for {PROCESSORS} multiprocessors. Operations are those of the matrix
instructions, padding included, per byte of keys and values: an H100 SXM has {OPERATIONS / 1e12:.0f} TFLOP/s over
{BANDWIDTH / 1e12:.2f} TB/s by its data sheet, {OPERATIONS / BANDWIDTH:.0f} operations per byte, so loads hide all of them.

{chr(10).join(roofline())}

What to expect from that, and to measure: an edit is nearly free from some thousand keys on if its groups lie in runs. At 700
keys partials and the second launch are the larger part of a short kernel, and weights the larger part of the step.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/kernels.md"))
    write_whole(parser.parse_args().out, page())


if __name__ == "__main__":
    main()
