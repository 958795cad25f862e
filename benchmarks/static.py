"""What the decode kernels need on a card, found without one: compiled ahead of time, resources read from the binary.

    python -m benchmarks.static --out benchmarks/results/kernel_resources.csv

For every case: registers per thread, shared memory, matrix instructions and spills, as the compilers for NVIDIA sm_80
and sm_90 and AMD gfx942 have them. Nothing here says how fast a kernel is. Needs triton, in a process in which it does
not interpret.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmattn.files import csv_text, write_whole
from vlmattn.kernels import triton_decode
from vlmattn.kernels.triton_kernels import split_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_INTEGERS = ("tokens", "keys", "split", "offset", "splits")
_TYPES = {
    "LSE": "*fp32", "PARTIAL": "*fp32", "GROUP": "*u8", "WEIGHT": "*fp32", "MASK": "*u8", "SCALE": "*fp32", "LIFT": "*fp32", "BIAS": "*fp32",
    "LOGIT_ROW": "*u8", "SLOT": "*i32", "PLAN": "*fp32", "GAIN_ROW": "*u8", "GAMMA": "*fp32", "SINK": "*fp32", "HEAD": "*fp32", "HEAD_ROW": "*u8",
    "scale": "fp32", "softcap": "fp32", "floor": "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One specialisation of the split kernel.

    Attributes:
        dim: head dimension; repeat: query heads per KV head; groups: key groups of the edit, 1 = plain attention.
        weighted: key weights (GIFT); lift: a logit part (PAI); bias: "", "shared" or "heads"; masked: a key mask.
        tokens: query rows; several are read under a causal mask.
    """

    dim: int = 128
    repeat: int = 1
    groups: int = 1
    dtype: str = "bf16"
    weighted: bool = False
    lift: bool = False
    bias: str = ""
    masked: bool = True
    tokens: int = 1
    indexed: bool = False

    @property
    def tile(self) -> int:
        """Rows of the tile."""
        return triton_decode.tile_rows(self.tokens * self.repeat * self.groups * (2 if self.weighted else 1))

    def constants(self, target: GPUTarget) -> dict[str, Any]:
        return dict(
            GROUPS=self.groups, WEIGHTED=self.weighted, REPEAT=self.repeat, DIM=self.dim, BLOCK_M=self.tile,
            BLOCK_N=triton_decode.block_keys(self.dim), BLOCK_D=triton.next_power_of_2(self.dim), CAUSAL=self.tokens > 1,
            MASKED=int(self.masked), MASK_OF_ROWS=False, INDEXED=self.indexed, HAS_SCALE=False, HAS_LIFT=self.lift,
            HAS_BIAS=bool(self.bias), OF_HEADS=self.bias == "heads", HAS_LOGIT_ROW=False, HAS_SOFTCAP=False, WHOLE=False,
            UPCAST=False,
        )  # fmt: skip


CASES = (
    Case(masked=False),
    *(Case(dim, repeat, groups) for dim in (64, 128) for repeat in (1, 4, 7) for groups in (1, 3, 4)),
    *(Case(dim, 1, groups) for dim in (80, 96, 256) for groups in (1, 4)),
    Case(128, 1, 4, "fp16"),
    Case(128, 8, 4),
    Case(128, 1, 3, weighted=True),
    Case(128, 1, 1, lift=True),
    Case(128, 1, 4, lift=True),
    Case(128, 1, 1, bias="shared"),
    Case(128, 7, 1, bias="heads"),
    Case(128, 1, 4, indexed=True),
    Case(128, 7, 4, tokens=5),
    Case(128, 1, 1, tokens=256),
)


def resources(case: Case, target: str) -> dict[str, Any]:
    """What the compiler says of one case on one target."""
    goal = TARGETS[target]
    options = dict(num_warps=triton_decode.warps(case.tile), num_stages=triton_decode.stages(target, case.dim))
    compiled = _compile(split_kernel, case.constants(goal), case.dtype, goal, options)
    return {**asdict(case), "tile": case.tile, "target": target, **_read(compiled, goal)}


def report(cases: tuple[Case, ...] = CASES, targets: tuple[str, ...] = tuple(TARGETS)) -> Iterator[dict[str, Any]]:
    """One row per case and target."""
    for target in targets:
        for case in cases:
            yield resources(case, target)


def _compile(kernel: Any, constants: dict[str, Any], dtype: str, target: GPUTarget, options: dict[str, int]) -> Any:
    """The kernel for a target, with the alignment that tensors of the library have."""
    signature = {
        name: "constexpr" if name in constants else _TYPES.get(name, f"*{dtype}" if name.isupper() else "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


def _read(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers per thread, shared memory in bytes, matrix instructions, spills."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        return {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
            "shared": compiled.metadata.shared,
            "matrix": len(re.findall(r"\bv_mfma_", text)),
            "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),  # of scalars: to vector registers, not to memory
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(r"\bH[G]?MMA", code)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
    }


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table, as CSV")
    options = parser.parse_args()
    rows = []
    for row in report():
        rows.append({**row, "triton": triton.__version__})
        print(" ".join(f"{name}={value}" for name, value in row.items()), file=sys.stderr)
    write_whole(options.out, csv_text(rows))


if __name__ == "__main__":
    main()
