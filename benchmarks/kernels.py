"""The decode kernels on a GPU, paired with stock attention and with themselves without groups; bfloat16, head size 128.

Every candidate attends from one row to keys and values that lie in memory, not in cache: calls go round over copies
that together are larger than the L2 cache. With CUDA graphs a block of calls is one launch; without them the cost of
launching counts. Contiguous groups are VAR's on a prompt with an image; random ones put all four groups in every tile.

``kv_gb_s``: bytes of keys and values over the time of a call. ``of_copy``: that over the bandwidth (read and write) of
a copy of the same bytes in the same round.

python -m benchmarks.kernels --out benchmarks/results
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import shapes
from vlmattn.evals.timing import Row, line, paired, rows, write_csv
from vlmattn.kernels import Problem, Visibility, attend

LENGTHS = (700, 4096, 32768)
HEADS = {"MHA 32": (32, 32), "GQA 28/4": (28, 4), "GQA 64/8": (64, 8)}
BATCHES = (1, 8)
DIM = 128
BLOCK_SECONDS = 5e-3  # of calls between two synchronisations, whose own cost is then lost in it
SDPA, PLAIN, COPY = "sdpa", "ours, no groups", "copy"

Call = Callable[[Tensor, Tensor, Tensor], object]


def calls(keys: int, batch: int, flex: Call | None) -> dict[str, Call]:
    """Candidates: functions of query ``[batch, heads, 1, dim]``, key and value ``[batch, kv_heads, keys, dim]``."""
    from vlmattn.kernels import triton_decode

    see, scale = Visibility(None, keys - 1), DIM**-0.5
    members = {"contiguous": shapes.groups(keys, batch, "cuda"), "random": shapes.random_groups(keys, batch, "cuda")}
    edits = {f"ours, 4 groups, {name}": shapes.var(of) for name, of in members.items()}

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1])

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return triton_decode.attention(Problem(query, key, value, see, scale))

    found: dict[str, Call] = {SDPA: sdpa, PLAIN: plain}
    if flex is not None:
        found["flex"] = flex
    for name, edit in edits.items():
        found[name] = lambda q, k, v, edit=edit: attend(Problem(q, k, v, see, scale, edit), "triton")  # type: ignore[misc]
    return found


def flex_attention() -> Call | None:
    """FlexAttention, compiled; None with a note if it does not run here."""
    try:
        from torch.nn.attention.flex_attention import flex_attention as flex

        compiled = torch.compile(flex, dynamic=False)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
            return compiled(query, key, value, scale=DIM**-0.5, enable_gqa=query.shape[1] != key.shape[1])

        run(*shapes.tensors(1, 700, 28, 4, DIM, torch.bfloat16, device="cuda"))
        return run
    except Exception as error:  # a compiler that is missing or does not know the card raises anything
        print(f"note: without FlexAttention, which fails here: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return None


def measure(what: str, heads: int, kv_heads: int, keys: int, batch: int, flex: Call | None, rounds: int) -> list[Row]:
    """Rows of one shape with and without CUDA graphs, over stock SDPA and over the kernel without groups."""
    torch.compiler.reset()  # FlexAttention is compiled anew for every shape, and dynamo gives up after a few
    query, key, value = shapes.tensors(1, keys, heads, kv_heads, DIM, torch.bfloat16, batch, "cuda")
    size = 2 * key.nbytes
    count = max(1, math.ceil(3 * torch.cuda.get_device_properties(key.device).L2_cache_size / size))
    buffers = [(query, key, value), *[(query, key.clone(), value.clone()) for _ in range(count - 1)]]
    copies = [(torch.empty_like(key), torch.empty_like(value)) for _ in range(count)]

    def copy(number: int) -> None:
        for target, source in zip(copies[number], buffers[number][1:], strict=True):
            target.copy_(source)

    once: dict[str, Callable[[int], object]] = {COPY: copy}
    for name, call in calls(keys, batch, flex).items():
        once[name] = lambda number, call=call: call(*buffers[number])  # type: ignore[misc]
    table = []
    for graphs in (True, False):
        blocks, lengths = {}, {}
        for name, run in once.items():
            try:
                blocks[name], lengths[name] = block(run, count, graphs)
            except Exception as error:  # what cannot be captured is left out, and said
                print(
                    f"note: {what}, graphs {graphs}: {name} is left out: {str(error).splitlines()[0]}", file=sys.stderr
                )
                torch.cuda.synchronize()
        seconds = {name: [s / lengths[name] for s in of] for name, of in paired(blocks, rounds, warm_up=2).items()}
        table += _rows(f"{what}, graphs {'on' if graphs else 'off'}", seconds, size)
    return table


def block(once: Callable[[int], object], count: int, graphs: bool) -> tuple[Callable[[], None], int]:
    """A function that calls ``once`` for every buffer, again and again for ``BLOCK_SECONDS``, and its number of
    calls."""

    def around() -> None:
        for number in range(count):
            once(number)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile and warm up where a graph may be captured
        for _ in range(3):
            around()
    torch.cuda.synchronize()
    turn: Callable[[], object] = around
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            around()
        turn = graph.replay
    (seconds,) = paired({"": turn}, 1, warm_up=2)[""]
    turns = max(1, math.ceil(BLOCK_SECONDS / seconds))

    def run() -> None:
        for _ in range(turns):
            turn()

    return run, turns * count


def _rows(what: str, seconds: Mapping[str, Sequence[float]], size: int) -> list[Row]:
    """Ratios to both bases, with bandwidths; ``size``: bytes of keys and values."""
    own = {name: of for name, of in seconds.items() if name not in (SDPA, COPY, "flex")}
    table = rows(what, {name: of for name, of in seconds.items() if name != COPY}, SDPA) if SDPA in seconds else []
    table += rows(what, own, PLAIN) if PLAIN in own else []
    for row in table:
        of = seconds[str(row["candidate"])]
        row["kv_mb"], row["kv_gb_s"] = round(size / 1e6, 2), round(size / statistics.median(of) / 1e9, 1)
        if COPY in seconds:  # a copy reads and writes: twice the bytes in its time
            shares = [copied / (2 * taken) for copied, taken in zip(seconds[COPY], of, strict=True)]
            row["of_copy"] = round(statistics.median(shares), 3)
            row["copy_gb_s"] = round(2 * size / statistics.median(seconds[COPY]) / 1e9, 1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks.kernels needs a CUDA device, and this torch sees none; vlmattn doctor lists what there is",
            file=sys.stderr,
        )
        raise SystemExit(2)
    table: list[Row] = []
    with torch.inference_mode():
        flex = flex_attention()
        for keys in LENGTHS:
            for name, (heads, kv_heads) in HEADS.items():
                for batch in BATCHES:
                    found = measure(
                        f"S={keys} {name} batch {batch}", heads, kv_heads, keys, batch, flex, options.rounds
                    )
                    for row in found:
                        print(f"{line(row)}  {row['kv_gb_s']} GB/s, {row.get('of_copy', '?')} of a copy", flush=True)
                    table += found
                    torch.cuda.empty_cache()
    write_csv(options.out / "kernels.csv", table)


if __name__ == "__main__":
    main()
