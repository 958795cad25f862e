"""What edited attention costs on a CPU, paired with plain attention in the same run.

decode     one query row: stock SDPA, the dense backend without an edit, and with the edits of VAR, PAI, both, and GIFT
prefill    2048 rows, 576 image tokens: stock causal SDPA, VAR on flash segments (merge), VAR dense in chunks of rows
(eager) memory     peak growth of the process over the prompt of a whole model (12 layers, 4096 tokens), each in a
process of its own:
           "in use" has the C library give back at once what is freed, "resident" has it keep blocks, as it usually does
generate   that model with one image and 64 new tokens; VAR also on the model as it attends with
attn_implementation="eager" wide       VAR on two layers of LLaVA-1.5-7B's size, one image and 17 new tokens

All keys have dominant sinks, as trained models do.

python -m benchmarks.attention --out benchmarks/results
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

import vlmattn
from benchmarks import shapes
from vlmattn.evals.bench import RANDOM_MODELS, bench, random_inputs, random_model
from vlmattn.evals.timing import Row, line, paired, peak_bytes, rows, write_csv
from vlmattn.kernels import AttentionEdit, Problem, Visibility, attend, eager
from vlmattn.recipe import Recipe

LENGTHS = (700, 4096)
HEADS = {"MHA 32": (32, 32), "GQA 28/4": (28, 4)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFILL, MEMORY = 2048, 4096  # tokens
VAR = Recipe.of("var", tau=4.0)  # in random weights one token in fifty is a sink then; with VAR's 20 none would be
SDPA, EAGER = "sdpa", "eager plain"


def decode(rounds: int) -> list[Row]:
    """Rows over stock SDPA, then the same times over the dense backend without an edit."""
    table = []
    for keys in LENGTHS:
        for heads_name, (heads, kv_heads) in HEADS.items():
            for dtype_name, dtype in DTYPES.items():
                what = f"decode S={keys} {heads_name} {dtype_name}"
                seconds = _decode(what, rounds, keys, heads, kv_heads, dtype)
                table += rows(what, seconds, SDPA)
                table += rows(what, {name: of for name, of in seconds.items() if name != SDPA}, EAGER)
    return table


def _decode(what: str, rounds: int, keys: int, heads: int, kv_heads: int, dtype: torch.dtype) -> dict[str, list[float]]:
    query, key, value = shapes.tensors(1, keys, heads, kv_heads, 128, dtype)
    scale, members = 128**-0.5, shapes.groups(keys)
    var, pai = shapes.var(members), shapes.pai(members)
    edits = {EAGER: AttentionEdit(), "eager var": var, "eager pai": pai, "eager pai+var": pai.then(var)}
    edits["eager gift (key weights)"] = shapes.gift(members)
    candidates = {
        SDPA: lambda: F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=heads > kv_heads)
    }
    for name, edit in edits.items():
        problem = Problem(query, key, value, Visibility(None), scale, edit)
        candidates[name] = lambda problem=problem: eager.attention(problem, 0, problem.rows)  # type: ignore[misc]
    with torch.inference_mode():
        return paired(candidates, rounds, warm_up=2)


def prefill(rounds: int) -> list[Row]:
    """Rows over stock causal SDPA: 4 heads of 64, so that a round takes a second or two."""
    table = []
    members, behind = shapes.groups(PREFILL), shapes.after_image(PREFILL)
    edit, scale = shapes.var(members, behind), 64**-0.5
    for name, dtype in DTYPES.items():
        query, key, value = shapes.tensors(PREFILL, PREFILL, 4, 4, 64, dtype)

        def run(backend: str, query=query, key=key, value=value) -> object:  # type: ignore[no-untyped-def]
            if backend == SDPA:
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
            return attend(Problem(query, key, value, Visibility(None), scale, edit), backend)

        candidates = {"sdpa causal": SDPA, "merge var": "merge", "eager var": "eager"}
        with torch.inference_mode():
            seconds = paired({k: lambda v=v, run=run: run(v) for k, v in candidates.items()}, rounds)  # type: ignore[misc]
        table += rows(f"prefill S={PREFILL} 4 heads of 64 {name}", seconds, "sdpa causal")
    return table


def memory(repeats: int) -> list[Row]:
    """Peak growth of the process over the prompt, over that of the bare model."""
    table = []
    for what, environment in (("in use", {"MALLOC_MMAP_THRESHOLD_": str(2**20)}), ("resident", {})):
        peaks: dict[str, list[float]] = {name: [] for name in ("none", "var")}
        for name in tqdm([*peaks] * repeats, leave=False, disable=None, desc=f"memory {what}"):
            peaks[name].append(_peak_elsewhere(name, environment))
        table += rows(f"memory {what}, S={MEMORY}, 12 layers", peaks, "none", "mb")
    return table


def _peak_elsewhere(preset: str, environment: dict[str, str]) -> int:
    """``peak_of`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.attention", "--peak-of", preset]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(f"the process that measures '{preset}' failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def peak_of(preset: str) -> int:
    """Bytes by which this process grows over a prompt of several images."""
    warnings.simplefilter("ignore")
    model = random_model(device="cpu")
    long = random_inputs(model, images=7, after=MEMORY - 7 * 576 - 2)
    assert long["input_ids"].shape[1] == MEMORY
    with torch.inference_mode(), nullcontext() if preset == "none" else vlmattn.applied(model, VAR):
        run = lambda inputs: model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)  # noqa: E731
        run(random_inputs(model))  # what is loaded on first use is not the prompt's
        peak = peak_bytes(lambda: run(long), model.device)
    if peak is None:
        raise SystemExit("this system does not tell the peak memory of a process (needs Linux and a writable /proc)")
    return peak


def generate(rounds: int) -> list[Row]:
    """Rows of ``vlmattn.evals.bench``."""
    warnings.simplefilter("ignore")  # a random model has no known sinks
    model = random_model(device="cpu")
    table = bench(model, random_inputs(model), [VAR, "vhr", "pai"], rounds, 64)
    model.set_attn_implementation({"text_config": "eager"})
    eager = bench(model, random_inputs(model), [VAR], rounds, 64)
    return table + [row | {"what": f"eager model: {row['what']}"} for row in eager]


def wide(rounds: int) -> list[Row]:
    """Two layers of LLaVA-1.5-7B's size with attn_implementation="eager", VAR in both: what a step of a real model
    pays."""
    warnings.simplefilter("ignore")
    config = RANDOM_MODELS["random-llava-7b"]()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager"})
    table = bench(model, random_inputs(model), [Recipe.of("var", tau=4.0, layers="0:")], rounds, 17)
    return [row | {"what": f"2 layers of LLaVA-1.5-7B: {row['what']}"} for row in table]


PARTS = {
    "decode": (decode, 31),
    "prefill": (prefill, 15),
    "memory": (memory, 3),
    "generate": (generate, 9),
    "wide": (wide, 9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", choices=PARTS, help="one part, written to attention-PART.csv")
    parser.add_argument("--rounds", type=int, help="of every part; 31, 15, 3, 9 and 9 without it")
    parser.add_argument("--peak-of", metavar="PRESET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of(options.peak_of))
        return
    table: list[Row] = []
    for name, (measure, rounds) in PARTS.items():
        if options.only in (None, name):
            found = measure(options.rounds or rounds)
            print(*map(line, found), sep="\n", flush=True)
            table += [{"part": name, **row} for row in found]
    write_csv(options.out / f"attention{f'-{options.only}' if options.only else ''}.csv", table)


if __name__ == "__main__":
    main()
