"""Names that break pages and figures, and what a page is made of."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

from hypothesis import strategies as st

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PIECES = [
    "<img src=x onerror=document.title='PWNED'>", "</script>", "<script>document.title='PWNED'</script>", "<!--", "-->", "<!--<script>",
    "]]>", "{{data}}", "{{script}}", "{{", "}}", "&lt;", "&", '"', "'", "</title>", "</style>", "<b>", "\u2028", "\u0085", "\n", "$", "$a$",
    "$\\frac{", "\\", "%", "a_b", "^", "|", "`", "*", "[x](javascript:alert(1))", "\ud800", "\0", "é", "name",
]  # fmt: skip
ALL = "".join(PIECES)
names = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)


class _Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def elements(page, drawn=False):
    """Tags with the names of their attributes, in order; without what is inside figures, if not ``drawn``."""
    parser = _Elements()
    parser.feed(page if drawn else re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL))
    return parser.found


def title_in_browser(page, folder):
    """What the title is after all scripts have run, and whether the page's own script came to its end."""
    path = folder / "hostile.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return re.search(r"<title>(.*?)</title>", out, re.DOTALL)[1], 'data-ready="yes"' in out
