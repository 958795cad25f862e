"""``python -m vlmattn.cli``."""

from vlmattn.cli import main

main()
