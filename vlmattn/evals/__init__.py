"""Honest evaluation: suites, paired statistics, resumable runs and reports."""
