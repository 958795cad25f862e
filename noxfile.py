"""Tests on each Python that is here, with the oldest, the pinned and the newest transformers.

``nox``, or ``nox -s "tests-3.12(newest)"``; what follows ``--`` goes to pytest in place of the core tests.
"""

import nox

VERSIONS = {
    "oldest": ("transformers==5.17.*",),
    "pinned": ("transformers", "-cconstraints.txt"),
    "newest": ("transformers<6",),
}
TORCH = "torch==2.13.0"
CORE = ("tests/test_laws.py", "tests/test_compat.py", "tests/test_presets.py", "tests/test_readme.py")

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("version", list(VERSIONS), ids=list(VERSIONS))
def tests(session: nox.Session, version: str) -> None:
    """The laws, each preset once and what differs between versions."""
    session.install(TORCH)
    session.install("-e", ".", "pytest", "pytest-xdist", "hypothesis", TORCH, *VERSIONS[version])
    session.run("python", "-m", "pytest", "-n", "2", *(session.posargs or CORE))
