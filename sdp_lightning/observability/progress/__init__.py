"""Progress of a run on one line: in a terminal, a log, or a notebook."""
