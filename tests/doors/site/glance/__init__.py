"""Somebody else's package: a method, a decoding rule, a family, a suite and a tracking adapter. Importing it registers all five."""

from glance import adapter, family, method, rule, suite  # noqa: F401
