"""Other packages' methods, rules, families, suites and tracking adapters, in processes that have such a package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmattn
from vlmattn import UnknownNameError, UnsupportedError, registry
from vlmattn.evals.suites import find_suite
from vlmattn.recipe import Recipe
from vlmattn.tracking.models import find_adapter

HERE = Path(__file__).parent
SITE = HERE / "site"  # a package as pip installs it: module and .dist-info
PLUGIN = {"module": "glance", "package": "glance-methods"}


def process(*arguments, site=None, cwd=None):
    """A Python process that sees the library, the tests' helpers and ``site``: what it prints."""
    places = [str(place) for place in (site, HERE.parents[1], HERE.parent) if place is not None]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def unloaded(monkeypatch):
    """As in a process that has not looked for plugins yet."""
    monkeypatch.setattr(registry, "_LOADED", set())
    monkeypatch.setattr(registry, "_BROKEN", {})
    monkeypatch.setattr(sys, "path", list(sys.path))


FIVE = """
import sys, warnings
import importlib.metadata as metadata

scan, scanned = metadata.entry_points, []
metadata.entry_points = lambda **given: (scanned.append(given), scan(**given))[1]
import torch, vlmattn
from vlmattn.evals.suites import World, make_suite
from vlmattn.tracking.models import find_adapter
from tiny import build, generate, prompt
from vlmattn.models import find_family

torch.set_grad_enabled(False)
model, inputs = build("llava"), prompt("llava")
bare = generate(model, inputs)
vlmattn.unwrap(vlmattn.wrap(model, "pai"))
assert {"group": "vlmattn.plugins"} not in scanned and "glance" not in sys.modules, "the library's own names need no plugin"
for preset in ("glance", "greyness"):
    assert not torch.equal(generate(vlmattn.wrap(model, preset), inputs), bare), preset
    assert model.vlmattn.report()["fired"][preset] > 0
    vlmattn.unwrap(model)
assert "glance" in sys.modules and {"glance", "greyness"} <= set(vlmattn.presets())
vlmattn.Recipe.of("glance+greyness").save_pretrained(sys.argv[1])
assert vlmattn.Recipe.of(sys.argv[1]) == vlmattn.Recipe.of("glance+greyness")

from glance.family import GlanceConfig, GlanceFamily, GlanceModel

mine = GlanceModel(GlanceConfig(**build("llava").config.to_dict() | {"model_type": "glance_vlm"})).eval()
mine.load_state_dict(model.state_dict())
with warnings.catch_warnings():
    warnings.simplefilter("error")  # the generic patcher warns
    vlmattn.wrap(mine, "vcd")
assert isinstance(find_family(mine), GlanceFamily) and "glance_vlm" in vlmattn.supported_families()
assert torch.equal(generate(mine, inputs), generate(vlmattn.wrap(model, "vcd"), inputs))

assert type(make_suite("glance", [World("faint", 0.5, 2, 1)])).__module__ == "glance.suite"
GlanceNetwork = type("GlanceNetwork", (torch.nn.Module,), {})
for adapter in ("glance", "auto"):
    assert type(find_adapter(GlanceNetwork(), adapter)).__module__ == "glance.adapter"
"""


def test_five_doors_in_python(tmp_path):
    """A name is enough: the package is imported when a name is not known."""
    (tmp_path / "five.py").write_text(FIVE)
    process(tmp_path / "five.py", tmp_path / "saved", site=SITE)
    saved = json.loads((tmp_path / "saved" / "vlmattn_config.json").read_text())
    assert saved["plugins"] == {"glance": PLUGIN, "greyness": PLUGIN}


def test_an_eval_of_a_plugins_preset_and_suite(tmp_path):
    """Also of a file; where methods come from is written with the result."""
    (tmp_path / "mine.yaml").write_text("schema: 1\nname: mine\ninterventions: [{method: glance, strength: 0.5}]\n")
    presets = ("--presets", "none,glance,mine.yaml", "--scenes", 2, "--out", "out")
    process("-m", "vlmattn.cli", "eval", "--suite", "glance", *presets, site=SITE, cwd=tmp_path)
    recipes = json.loads((tmp_path / "out" / "summary.json").read_text())["recipes"]
    assert recipes["glance"]["plugins"] == recipes["mine"]["plugins"] == {"glance": PLUGIN}
    assert "plugins" not in recipes["none"]


def test_a_module_by_name(tmp_path):
    """``--import`` finds it in the current folder, installed or not."""
    shutil.copytree(SITE / "glance", tmp_path / "glance")
    command = (
        "-m",
        "vlmattn.cli",
        "--import",
        "glance.method",
        "--import",
        "glance.rule",
        "presets",
        "glance+greyness",
        "--json",
    )
    recipe = json.loads(process(*command, cwd=tmp_path))
    assert recipe["plugins"] == {"glance": {"module": "glance"}, "greyness": {"module": "glance"}}


def test_a_module_that_is_not_there(run, unloaded):
    code, _, error = run("--import", "glancing", "presets")
    assert code == 2
    assert error.startswith(
        "error: --import glancing: ModuleNotFoundError: No module named 'glancing'; name a module of"
    )
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("plugin", "remedy"),
    [
        (
            PLUGIN,
            r"package 'glance-methods' registered it: install that, or import 'glance' first \(vlmattn --import glance ",
        ),
        ({"module": "glance"}, "a module registered it: have it on PYTHONPATH, or import 'glance' first"),
        ({"module": "__main__"}, "a script or notebook registered it: run that code first"),
    ],
)
def test_a_recipe_of_a_package_that_is_not_there(plugin, remedy):
    recipe = {"schema": 1, "name": "x", "interventions": [{"method": "glance"}], "plugins": {"glance": plugin}}
    with pytest.raises(UnknownNameError, match=f"unknown method 'glance'; .*; {remedy}"):
        Recipe.from_dict(recipe)


@pytest.mark.parametrize("plugins", ["glance", {"glance": "glance"}, [1]])
def test_what_is_no_list_of_plugins(plugins):
    with pytest.raises(vlmattn.InputError, match="not a recipe: 'plugins' must name module and package by method"):
        Recipe.from_dict({"schema": 1, "name": "x", "interventions": [], "plugins": plugins})


def test_a_broken_plugin_is_one_line(run, unloaded, tmp_path):
    """It stops nothing but what needs it, and is named there."""
    info = tmp_path / "broken_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlmattn.plugins]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('the moon\\nis full')\n")
    sys.path.append(str(tmp_path))
    told = "plugin broken_plugin of package 'broken-methods' cannot be imported: RuntimeError: the moon is full"
    code, out, error = run("presets", "var", "--json")
    assert (code, json.loads(out)["name"], error.strip()) == (0, "var", f"note: {told}")
    code, _, error = run("presets", "broken")
    assert code == 2
    (line,) = error.strip().splitlines()
    assert line.startswith("error: unknown preset 'broken'; ")
    assert line.endswith(told)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: vlmattn.Recipe.of("nobody's"),
        lambda: registry.find_method("nobody's"),
        lambda: find_suite("nobody's"),
        lambda: find_adapter(torch.nn.Linear(1, 1), "nobody's"),
        lambda: find_adapter(torch.nn.Linear(1, 1)),
    ],
)
def test_who_looks_for_plugins(ask, unloaded, monkeypatch):
    """Every registry, before it raises; once."""
    looked: list[int] = []
    monkeypatch.setattr(registry, "_entries", lambda: looked.append(1) or [])
    for _ in range(2):
        with pytest.raises((UnknownNameError, UnsupportedError)):
            ask()
    assert looked == [1]


def test_names_are_taken_once():
    """A plugin that takes the name of a method or a preset registers nothing."""
    known = dict(paper="", code="", faithful="", parts="", cost="")
    with pytest.raises(vlmattn.OptionError, match=r"method 'var' is registered twice: vlmattn.interventions.var and"):
        registry.register("var", **known, presets={})(type("Mine", (vlmattn.Intervention,), {}))
    with pytest.raises(vlmattn.OptionError, match=r"preset 'pai' is registered twice: vlmattn.interventions.pai and"):
        registry.register("mine", **known, presets={"pai": ("", {})})(type("Mine", (vlmattn.Intervention,), {}))
    with pytest.raises(UnknownNameError):
        registry.find_method("mine")
