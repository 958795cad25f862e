"""Runs the model tests of transformers bare and wrapped: whatever passes bare has to pass wrapped.

    python -m tests.peers.run --checkout ../transformers --models llava qwen2_5_vl

The tests that belong to the installed version come from its source distribution, which pip downloads once. It has what
all models share (``tests/test_modeling_common.py``) but not the tests of single models nor those of ``generate()``. With
``--checkout``, a checkout of transformers (of the same version, or near it), these run: ``tests/models/*``, with the
common files of the installed version over those of the checkout. Without it the common tests run on the small models of
``tests/zoo``.

Wrapped means: every model that is made or loaded gets a recipe that changes nothing (``--recipe``):

    none      nothing to do, so no step is made in a forward
    pass      a step in every forward, and no edit in any layer (the default)
    gain      head gains of 1 after the model's own attention
    kernel    scores plus 0: the attention of vlmattn itself, equal only up to rounding

The exit code is 1 if a test passes bare and not wrapped, and ``EXPLAINED`` does not say why. Needs ``parameterized``; the
tests of a checkout also need ``httpx`` and ``requests``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import transformers

import vlmattn

HERE = Path(__file__).resolve().parent
GOOD = ("passed", "xpassed")
_PACKED = "packs several sequences into one row, which an edit would treat as one; vlmattn refuses and says so"
_NAMED = "asserts the name of the attention implementation, and that of a wrapped model's text config is vlmattn's"
_STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


@dataclass(frozen=True)
class Explained:
    """Why a test may fail wrapped: its name (a pattern), what its error has to match, the reason."""

    test: str
    error: str
    reason: str


EXPLAINED = (
    Explained("test_attn_implementation_composite_models", "AssertionError: False is not true", _NAMED),
    Explained("test_can_set_attention_dynamically*", "AssertionError: False is not true", _NAMED),
    Explained("test_sdpa_can_dispatch_composite_models", "AssertionError: False is not true", _NAMED),
    Explained("test_*_padding_matches_padding_free_with_position_ids", "UnsupportedError: packed sequences", _PACKED),
    Explained(
        "test_attention_outputs",
        "ValueError: The `output_attentions` attribute is not supported when using .* vlmattn_eager",
        "sets config.output_attentions, which transformers allows only by the name 'eager'; the argument works",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one test in one run."""

    test: str
    outcome: str
    error: str = ""
    place: str = ""
    subtests: int = 0
    models: int = 0
    generates: int = 0
    wrapped: int = 0
    rewrapped: int = 0
    calls: int = 0
    seconds: float = 0.0
    refused: tuple[str, ...] = ()

    @property
    def extent(self) -> str:
        """How much of the test was done."""
        return f"{self.subtests} subtests, {self.models} models, {self.generates} generate()"


@dataclass(frozen=True)
class Difference:
    """A test that passes bare and not wrapped; ``reason`` "" = a failure of ours."""

    model: str
    recipe: str
    bare: Outcome
    wrapped: Outcome
    reason: str

    @property
    def name(self) -> str:
        return self.bare.test.rpartition("::")[2]

    def row(self) -> dict[str, Any]:
        wrapped = self.wrapped
        error = wrapped.error or f"{wrapped.extent}; bare {self.bare.extent}"
        where = {"model": self.model, "recipe": self.recipe, "test": self.name}
        return {
            **where,
            "wrapped": wrapped.outcome,
            "error": error[:200],
            "in": wrapped.place,
            "explained": self.reason,
        }


@dataclass(frozen=True)
class Comparison:
    """All tests of one model, bare and with one recipe."""

    model: str
    recipe: str
    bare: dict[str, Outcome]
    wrapped: dict[str, Outcome]

    def differences(self) -> Iterator[Difference]:
        for test, bare in self.bare.items():
            wrapped = self.wrapped.get(test, Outcome(test, "lost", "the run ended before this test"))
            if bare.outcome in GOOD and (wrapped.outcome not in GOOD or wrapped.extent != bare.extent):
                yield Difference(self.model, self.recipe, bare, wrapped, _explanation(wrapped))

    def totals(self) -> dict[str, Any]:
        """The row of this model in the summary."""
        both = [(bare, self.wrapped.get(test)) for test, bare in self.bare.items()]
        found = list(self.differences())
        passed = [wrapped for _, wrapped in both if wrapped is not None and wrapped.outcome in GOOD]
        return {
            "model": self.model,
            "recipe": self.recipe,
            "passed bare": sum(bare.outcome in GOOD for bare, _ in both),
            "passed wrapped": len(passed),
            "with a wrapped model": sum(outcome.wrapped > 0 for outcome in passed),
            "through the engine": sum(outcome.calls > 0 for outcome in passed),
            "wrapped again": sum(outcome.rewrapped > 0 for outcome in passed),
            "explained": sum(bool(difference.reason) for difference in found),
            "ours": sum(not difference.reason for difference in found),
            "failed both": sum(bare.outcome == "failed" and (w is None or w.outcome == "failed") for bare, w in both),
            "failed bare only": sum(
                bare.outcome == "failed" and w is not None and w.outcome in GOOD for bare, w in both
            ),
            "skipped": sum(bare.outcome in ("skipped", "xfailed") for bare, _ in both),
        }


def _explanation(outcome: Outcome) -> str:
    name = outcome.test.rpartition("::")[2]
    for known in EXPLAINED:
        if outcome.outcome == "failed" and fnmatchcase(name, known.test) and re.search(known.error, outcome.error):
            return known.reason
    return ""


# --- Where the tests come from


def fetch(version: str, cache: Path) -> Path:
    """The unpacked source distribution of transformers; pip downloads it once and checks its hash."""
    folder = cache / f"transformers-{version}"
    if not (folder / "tests").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / f"transformers-{version}.tar.gz"
        if not archive.exists():
            wanted = [f"transformers=={version}", "--no-binary", "transformers", "--no-deps", "--no-build-isolation"]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", *wanted, "-d", str(cache)], check=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch, tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
            (Path(scratch) / folder.name).rename(folder)
    return folder


def plant(source: Path, checkout: Path | None, tree: Path) -> Path:
    """A folder ``tests`` to run pytest in, and the installed library where tests look for it."""
    shutil.rmtree(tree, ignore_errors=True)
    if checkout is not None:
        for name in ("tests", "utils"):
            shutil.copytree(checkout / name, tree / name)
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(checkout / name, tree / name)
    else:
        (tree / "tests").mkdir(parents=True)
        shutil.copy(source / "pyproject.toml", tree / "pyproject.toml")
        for name, text in {"__init__.py": "", **_STUBS}.items():
            stub = tree / "tests" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(text, encoding="utf-8")
            (stub.parent / "__init__.py").touch()
    for file in (source / "tests").glob("*.py"):
        shutil.copy(file, tree / "tests" / file.name)
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    return tree


def tests_of(model: str, checkout: Path | None) -> str:
    """What pytest is to run for a model."""
    if checkout is None:
        return f"{HERE / 'peers_common.py'}::Peer_{model}"
    folder = model.replace("-", "_")
    return f"tests/models/{folder}/test_modeling_{folder}.py"


def every_model(checkout: Path | None) -> list[str]:
    """All that there are tests for: small models, or model types that vlmattn knows."""
    if checkout is not None:
        return [name for name in vlmattn.supported_families() if (checkout / tests_of(name, checkout)).exists()]
    sys.path.insert(0, str(HERE.parent))
    from zoo import ZOO

    return [name for name, tiny in ZOO.items() if not tiny.unbuildable]


# --- Running and comparing


@dataclass(frozen=True)
class Runner:
    """Runs pytest in a folder with tests."""

    tree: Path
    checkout: Path | None
    logs: Path
    timeout: int
    reuse: bool
    options: tuple[str, ...]

    def outcomes(self, model: str, recipe: str) -> dict[str, Outcome]:
        """Outcomes of all tests of a model; ``recipe`` "" = bare."""
        name = f"{model}-{recipe or 'bare'}"
        report, log = self.logs / f"{name}.jsonl", self.logs / f"{name}.log"
        if recipe or not (self.reuse and report.exists()):
            report.unlink(missing_ok=True)
            with open(log, "w", encoding="utf-8") as file:
                try:
                    subprocess.run(
                        self._command(model),
                        cwd=self.tree,
                        env=self._environment(recipe, report),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        timeout=self.timeout,
                    )
                except subprocess.TimeoutExpired:
                    print(f"{name}: stopped after {self.timeout} s", file=sys.stderr)
        found = {}
        for line in report.read_text(encoding="utf-8").splitlines() if report.exists() else ():
            facts = json.loads(line)
            outcome = Outcome(**{**facts, "refused": tuple(facts.get("refused", ()))})
            found[outcome.test] = outcome
        if not found:
            print(f"{name}: no test ran, see {log}", file=sys.stderr)
        return found

    def _command(self, model: str) -> list[str]:
        options = ["-q", "--tb=short", "-W", "ignore", "-o", "log_cli=0", "-o", "addopts=", "-p", "no:cacheprovider"]
        options += ["-p", "peers_plugin", "--rootdir", str(self.tree), "-c", str(self.tree / "pyproject.toml")]
        return [sys.executable, "-m", "pytest", tests_of(model, self.checkout), *options, *self.options]

    def _environment(self, recipe: str, report: Path) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if key not in ("RUN_SLOW", "VLMATTN_BACKEND")}
        paths = os.pathsep.join(map(str, (self.tree, HERE, HERE.parent)))
        env |= {"PYTHONPATH": paths, "PEERS_RECIPE": recipe, "PEERS_REPORT": str(report)}
        return env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[str(row[name]).replace("|", "/") for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["model"])
        writer.writeheader()
        writer.writerows(rows)


def tell(comparisons: Sequence[Comparison], logs: Path) -> int:
    """Print what was found, write it down, and return the exit code."""
    differences = [difference for comparison in comparisons for difference in comparison.differences()]
    totals = [comparison.totals() for comparison in comparisons]
    rows = [difference.row() for difference in differences]
    if rows:
        print(table(rows) + "\n")
    print(table(totals))
    for comparison in comparisons:
        refused = {why for outcome in comparison.wrapped.values() for why in outcome.refused}
        for why in sorted(refused):
            print(f"{comparison.model}: left bare: {why}")
    _write(logs.parent / f"{logs.name}-differences.csv", rows)
    _write(logs.parent / f"{logs.name}-totals.csv", totals)
    print(f"\ntables: {logs}-*.csv")
    empty = [row["model"] for row in totals if not row["with a wrapped model"]]
    if empty:
        print(f"no test with a wrapped model passed: {', '.join(empty)}", file=sys.stderr)
    return int(bool(empty) or any(not difference.reason for difference in differences))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmattn-peers"
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llava", "qwen2_5_vl", "qwen3_vl"],
        help='model types; without a checkout names in tests/zoo; "all"',
    )
    parser.add_argument("--recipe", nargs="+", default=["pass"], help="none, pass, gain, kernel, or what wrap() takes")
    parser.add_argument(
        "--checkout", type=Path, help="folder of a transformers checkout, for the tests of single models"
    )
    parser.add_argument("--cache", type=Path, default=cache, help="where downloads, logs and tables go")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for the tests of a model")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--reuse", action="store_true", help="take bare outcomes of the last run, where there are some")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more arguments for pytest")
    arguments = parser.parse_args(argv)
    checkout = arguments.checkout.resolve() if arguments.checkout else None
    version, cache = transformers.__version__, arguments.cache.resolve()
    kind = "common" if checkout is None else "models"
    tree = plant(fetch(version, cache), checkout, cache / f"{kind}-{version}")
    logs = cache / f"{kind}-{version}-logs"
    logs.mkdir(exist_ok=True)
    runner = Runner(tree, checkout, logs, arguments.timeout, arguments.reuse, tuple(arguments.pytest))
    models = every_model(checkout) if arguments.models == ["all"] else arguments.models
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pairs = list(product(models, ["", *arguments.recipe]))
        found = dict(zip(pairs, pool.map(lambda pair: runner.outcomes(*pair), pairs), strict=True))
    comparisons = [Comparison(m, r, found[m, ""], found[m, r]) for m, r in product(models, arguments.recipe)]
    return tell(comparisons, logs)


if __name__ == "__main__":
    sys.exit(main())
