"""A result for people: tables (tables.py), one HTML page (page.py) and its examples (gallery.py)."""

from vlmattn.evals.report.tables import (
    STYLES,
    bounds,
    by_suite,
    change,
    figures_table,
    markdown_tables,
    notes,
    p_value,
    spread,
    terminal_tables,
    verdict,
    whiskers,
)

__all__ = [
    "STYLES", "bounds", "by_suite", "change", "figures_table", "markdown_tables", "notes", "p_value", "spread",
    "terminal_tables", "verdict", "whiskers",
]  # fmt: skip
