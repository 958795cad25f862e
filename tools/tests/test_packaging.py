"""The wheel holds what users run and nothing else, the sdist the whole checkout; the README's example runs from the
wheel.

Built in a copy of the checkout, the wheel from the sdist. The bare environment is a folder with the wheel and one with
what its runtime dependencies bring along, and nothing else on the path.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCES = {"figures.json", "natural.json", "training_log.json"}  # of model cards


def call(*command, cwd, **more):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def build(kind, folder, out):
    """Run a hook of the build backend in ``folder``, as pip does; the path of what it wrote."""
    call(
        sys.executable, "-c", f"from setuptools.build_meta import build_{kind}; build_{kind}({str(out)!r})", cwd=folder
    )
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wanted():
    """The files of the checkout that are under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no checkout: nothing says which files are the project's")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def checkout(wanted, tmp_path_factory):
    """A copy of them."""
    folder = tmp_path_factory.mktemp("checkout") / "vlmattn"
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_package_knows_nothing_of_its_workshop():
    """It imports neither tools nor benchmarks nor tests, and names none of their commands."""
    beside = re.compile(r"^\s*(from|import) (tools|benchmarks|tests)\b|python -m (tools|benchmarks)\b", re.MULTILINE)
    files = list((ROOT / "vlmattn").rglob("*.py"))
    assert len(files) > 100
    assert [path.name for path in files if beside.search(path.read_text(encoding="utf-8"))] == []


def test_the_sdist_is_the_checkout(sdist, wanted):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if ".egg-info/" not in name} - made == wanted


def test_the_wheel_is_the_package(wheel, wanted):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name for name in wanted if name.startswith("vlmattn/")}
    kept = {"vlmattn/tracking/tiny-rooms/figures.json"}  # `vlmattn track --demo` tells of it
    assert held == {name for name in package if name.rpartition("/")[2] not in SOURCES} | kept


def dependencies():
    """Distributions that the runtime dependencies of the package bring along, and itself not."""
    found, waiting = {}, [*importlib.metadata.requires("vlmattn")]
    while waiting:
        wanted = Requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += found[name].requires or []
    return found.values()


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Runs Python or the command line with the wheel and its runtime dependencies alone, in an empty folder."""
    site, brought, empty = (tmp_path_factory.mktemp(name) for name in ("site", "brought", "empty"))
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    call(*pip, "--target", str(site), str(wheel), cwd=empty)
    for distribution in dependencies():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (brought / top).exists():
                (brought / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLMATTN"))}
    variables |= {"PYTHONPATH": os.pathsep.join(map(str, (site, brought))), "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        return call(sys.executable, "-S", *arguments, cwd=empty, env=variables)

    run.site = site
    return run


def test_the_environment_is_bare(bare):
    """Neither the checkout nor what only tests need can be imported there."""
    program = (
        "import importlib.util as u, vlmattn;"
        "print(vlmattn.__file__, [n for n in ('tests', 'tools', 'benchmarks', 'pytest', 'peft', 'av') if"
        " u.find_spec(n)])"
    )
    assert bare("-c", program).strip() == f"{bare.site / 'vlmattn' / '__init__.py'} []"


def test_the_readme_example_runs_from_the_wheel(bare):
    readme = (ROOT / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "make_scene" in block]
    said = bare("-c", example)
    assert re.search(r"is there a dog in the image \? (yes|no)", said)
    assert re.search(r"\{'vhr': [1-9]\d*\}", said)


def test_the_bundled_tracker_is_found(bare):
    assert "MultiViewNetwork" in bare("-c", "from vlmattn.tracking import load; print(type(load()).__name__)")


@pytest.mark.parametrize("arguments", [("--help",), ("presets",), ("track", "--help")])
def test_the_command_line_runs_from_the_wheel(bare, arguments):
    assert bare("-m", "vlmattn.cli", *arguments)
