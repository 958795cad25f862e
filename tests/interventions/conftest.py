"""Puts this folder on the path, for the folders in it too: ``from methods import SETTINGS``."""
