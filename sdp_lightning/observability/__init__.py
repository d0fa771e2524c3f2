"""Observability of a run: progress, report, summary, view of the data, recording."""
