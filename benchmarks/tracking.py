"""What tracking a frame against a cached map takes, beside the full pass of all keyframes and the frame: N = 4 ... 64.

frame     one tracked frame: ``cached`` and ``full``, the same outputs; ``speedup`` is the median of the paired full /
cached mapping   making the map anew, which every keyframe costs
map       bytes of keys and values per keyframe, and by the formula 2 x blocks x tokens x width x bytes

Two networks: the bundled one (4 pairs of blocks, 128 wide, 38 tokens a frame), and a random one of the size of pi^3's
small decoder (12 pairs, 384 wide, 6 heads, 69 tokens a frame). Speed does not depend on weights.

python -m benchmarks.tracking --out benchmarks/results
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from vlmattn.evals.timing import Row, line, paired, quartiles, rows, write_csv
from vlmattn.tracking import MultiViewNetwork, NetworkConfig, Tracker, load

KEYFRAMES = (4, 8, 16, 32, 64)


def networks() -> dict[str, Any]:
    torch.manual_seed(0)
    small = NetworkConfig(image_size=112, patch_size=14, width=384, heads=6, pairs=12, ratio=4, registers=5)
    return {"bundled": load(), "pi3-small": MultiViewNetwork(small).eval()}


def measure(name: str, network: MultiViewNetwork, keyframes: int, rounds: int) -> list[Row]:
    config = network.config
    draw = torch.Generator().manual_seed(keyframes)
    images = torch.rand(keyframes + 1, 3, config.image_size, config.image_size, generator=draw)
    tracker = Tracker(network, max_keyframes=keyframes)
    tracker.make_map(images[:-1])
    assert tracker.map is not None

    def full() -> None:
        with torch.no_grad():
            network(images[None])

    def mapping() -> None:
        with torch.no_grad():
            network(images[None, :-1])

    seconds = paired({"cached": lambda: tracker.track(images[-1]), "full": full, "mapping": mapping}, rounds)
    low, middle, high = quartiles([b / a for a, b in zip(seconds["cached"], seconds["full"], strict=True)])
    facts = {"network": name, "keyframes": keyframes, "tokens_per_frame": tokens(config)}
    told: list[Row] = [
        {**facts, **row, "speedup": round(middle, 2), "speedup_q1": round(low, 2), "speedup_q3": round(high, 2)}
        for row in rows("frame", seconds, "full")
    ]
    formula = 2 * config.pairs * tokens(config) * config.width * 4
    held = {"held": [tracker.map.cache_bytes / keyframes], "formula": [float(formula)]}
    return told + [{**facts, **row} for row in rows("map, per keyframe", held, "formula", "mb")]


def tokens(config: NetworkConfig) -> int:
    return (config.image_size // config.patch_size) ** 2 + config.registers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)  # small enough that threads would mostly wait for each other
    table: list[Row] = []
    for name, network in networks().items():
        for keyframes in KEYFRAMES:
            for row in measure(name, network, keyframes, options.rounds):
                print(f"{name:10} N={keyframes:2} {line(row)}")
                table.append(row)
    write_csv(options.out / "tracking.csv", table)
    for name in dict.fromkeys(row["network"] for row in table):
        told = {
            int(str(r["keyframes"])): r["speedup"] for r in table if r["network"] == name and r["candidate"] == "cached"
        }
        print(f"{name}: " + ", ".join(f"N={n} {x}x" for n, x in told.items()))


if __name__ == "__main__":
    main()
