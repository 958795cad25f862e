"""Trainers of the bundled models and networks, and what measures them and writes their cards."""
