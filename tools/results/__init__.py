"""Pages of results: from the runs of ``vlmattn eval`` to Markdown and pictures."""
