"""docs/extend/method.md and pruning.md: what they register is whole; a newcomer meets few names, all of them listed."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from stores import kept
from tiny import build, generate, left_padded, prompt

import vlmattn
from vlmattn import registry
from vlmattn.interventions import PAI, FastV, LogitEdit, ScorerPolicy, ScorerPruning

FOLDER = Path(__file__).parents[2] / "docs" / "extend"
PAGES = {name: (FOLDER / f"{name}.md").read_text() for name in ("method", "pruning")}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", page, re.DOTALL) for name, page in PAGES.items()}
BASES = (LogitEdit, ScorerPruning, ScorerPolicy)
GIVEN = {"context": "context", "stage": "stage", "request": "request", "kept": "store"}  # variables of methods
MOST = 45
no_grad = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """What a test makes known is forgotten."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(registry, "_PRESETS", dict(registry._PRESETS))


def run(name: str, blocks: slice = slice(None)) -> dict:
    """What the blocks of a page leave behind."""
    namespace: dict = {"__name__": f"docs_extend_{name}"}
    for block in BLOCKS[name][blocks]:
        exec(compile(block, f"docs/extend/{name}.md", "exec", dont_inherit=True), namespace)
    return namespace


def lines_of(cls: type) -> int:
    """Lines of code of a class, without its docstring and its register call."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = node.body[1:]
    return sum(stop - start + 1 for start, stop in ((part.lineno, part.end_lineno) for part in body)) + 2


# --- the pages


def test_the_attention_method_of_the_page(capsys):
    run("method")
    assert "{'last_image': " in capsys.readouterr().out
    assert vlmattn.presets()["last_image"].method == "last_image"
    with pytest.raises(vlmattn.OptionError, match=r"last_image.alpha must be a number within 0..0.999"):
        vlmattn.Recipe.of("last_image", alpha=1.5)


@no_grad
def test_it_raises_the_last_image_and_no_other():
    """PAI raises all images: the same with one, another thing with two."""
    run("method", slice(1))
    for images in (1, 2):
        inputs = prompt("llava", images=images)
        found = [
            vlmattn.wrap(build("llava"), method)(**inputs).logits[0, -1]
            for method in ("none", PAI(alpha=0.5, layers="1:"), "last_image")
        ]
        apart = [float((one - found[2]).abs().max()) for one in found]
        assert apart[0] > 1e-4
        assert (apart[1] < 2e-5) == (images == 1)


def test_the_methods_of_the_pruning_page(capsys):
    run("pruning")
    assert "[49.0, 49.0, 12.0, 12.0, 12.0, 12.0]" in capsys.readouterr().out


@no_grad
def test_the_policy_of_the_page_holds_short_keys():
    """In the slots of the layer: half of the image tokens, those with the shortest keys of the bare model's cache."""
    run("pruning", slice(2))
    inputs = prompt("llava", images=2)
    whole = build("llava")(**inputs, use_cache=True).past_key_values
    model = vlmattn.wrap(build("llava"), "small_keys@0.5", layers="2")
    cache = model(**inputs, use_cache=True).past_key_values
    keys, images = whole.layers[2].keys[0], (inputs["input_ids"][0] == 99).nonzero().flatten()
    best = images[keys[:, images].norm(dim=-1).mean(0).argsort()[: len(images) // 2]]
    stay = torch.ones(keys.shape[1], dtype=torch.bool)
    stay[images] = False
    stay[best] = True
    torch.testing.assert_close(cache.layers[2].keys[0], keys[:, stay])


@no_grad
def test_it_evicts_the_share_of_all_turns():
    """A second turn without images evicts nothing more; one with an image half of that."""
    run("pruning", slice(2))
    model, inputs = vlmattn.wrap(build("llava"), "small_keys@0.5"), prompt("llava", images=2)
    cache = model(**inputs, use_cache=True).past_key_values
    held = cache.layers[1].keys.shape[2]
    assert held == inputs["input_ids"].shape[1] - 16
    model(input_ids=torch.tensor([[50, 51, 52]]), past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == held + 3
    more = prompt("llava", images=1)
    model(input_ids=more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == held + 3 + more["input_ids"].shape[1] - 8
    assert kept(cache, "gone")[1] == [24]


@no_grad
@pytest.mark.parametrize("recipe", ["longest@0.25", "small_keys@0.25"])
def test_a_padded_batch_and_a_mask_give_the_same(recipe):
    run("pruning", slice(2))
    prompts = [prompt("llava", images=2), prompt("llava", images=1, seed=4)]
    found = {}
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("llava"), vlmattn.Recipe.of(recipe.split("@")[0], keep_ratio=0.25, mode=mode))
        found[mode] = generate(model, left_padded(prompts))
        for row, inputs in zip(found[mode], prompts, strict=True):
            torch.testing.assert_close(row, generate(model, inputs)[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["drop"], found["mask"], rtol=0, atol=2e-5)
    assert float((generate(build("llava"), prompts[0])[0] - found["drop"][0]).abs().max()) > 1e-4


# --- simple methods as others have them


def dart_like() -> type:
    """Keeps what is least like a pivot token, as methods about duplicates do."""

    @registry.register("dart_like")
    @dataclass(frozen=True, kw_only=True)
    class DartLike(ScorerPruning):
        """Keep the image tokens least alike to the longest one."""

        def score(self, stage):
            unit = torch.nn.functional.normalize(stage.hidden.float(), dim=-1)
            pivot = stage.hidden.norm(dim=-1).masked_fill(~stage.visual, 0).argmax(1)
            return 1 - (unit @ unit[torch.arange(len(unit)), pivot][..., None])[..., 0]

    return DartLike


def cls_like() -> type:
    """Keeps what the tower's summary token attends to."""

    @registry.register("cls_like")
    @dataclass(frozen=True, kw_only=True)
    class ClsLike(ScorerPruning):
        """Keep the image tokens that the vision tower's CLS token attends to most, in its last layer but one."""

        layer: int = vlmattn.options.option(1, 0, 10**4, "first layer that only kept tokens reach")

        def tower_layers(self, anatomy):
            return (anatomy.tower_layers - 2,)

        def on_image_features(self, sight):
            (seen,) = sight.patches.values()
            sight.request.store(self).by_slot("seen", 0, torch.float32).write(
                sight.start, sight.place([a.sum(0) for a in seen])
            )

        def score(self, stage):
            stop = stage.start + stage.hidden.shape[1]
            return stage.request.store(self).slots["seen"].read(stop, stage.hidden.device)[:, stage.start :]

    return ClsLike


@no_grad
@pytest.mark.parametrize("make", [dart_like, cls_like])
def test_simple_pruning_methods(make):
    cls = make()
    inputs = prompt("llava", images=2)
    dropped, model = [], None
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("llava"), cls(keep_tokens=5, mode=mode))
        dropped.append(generate(model, inputs))
        assert model.vlmattn.report()["image_tokens"]["per_layer"][-1] == 5
    torch.testing.assert_close(*dropped, rtol=0, atol=2e-5)
    assert lines_of(cls) <= 25


def test_fastv_is_short():
    assert lines_of(FastV) <= 25


# --- names


def classes_of(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def met() -> dict[str, set[str]]:
    """Names that somebody meets who writes as the pages do: imported, given as options, overridden, read."""
    own = [ast.parse(block) for blocks in BLOCKS.values() for block in blocks]
    bases = [ast.parse(textwrap.dedent(inspect.getsource(cls))) for cls in BASES]
    found: dict[str, set[str]] = {name: set() for name in ("import", "say", *GIVEN.values())}
    for tree in own:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmattn."):
                found["import"] |= {alias.name for alias in node.names if "embedded" not in (node.module or "")}
    for cls in (cls for tree in (*own, *bases) for cls in classes_of(tree)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign | ast.FunctionDef):
                name = node.target.id if isinstance(node, ast.AnnAssign) else node.name
                found["say"] |= {name} if any(hasattr(base, name) for base in BASES) else set()
    for node in (node for tree in (*own, *bases) for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in GIVEN:
            found[GIVEN[node.value.id]].add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found["import"]:
            found["say"] |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name):
            found["import"] |= {node.annotation.id} & set(vlmattn.request.__all__)
    return found


def test_the_table_of_names_is_complete_and_short():
    rows = re.findall(r"^\| (\w+) \| (`.*) \|$", PAGES["method"], re.MULTILINE)
    table = {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}
    wanted = {kind: names for kind, names in met().items() if names}
    missing = {
        kind: sorted(names - table.get(kind, set())) for kind, names in wanted.items() if names != table.get(kind)
    }
    assert table == wanted, f"docs/extend/method.md lacks {missing}"
    assert sum(map(len, table.values())) <= MOST
