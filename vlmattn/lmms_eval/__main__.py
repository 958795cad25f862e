"""``python -m vlmattn.lmms_eval`` prints the folder of our tasks, for ``--include_path``."""

from pathlib import Path

print(Path(__file__).parent / "tasks")
