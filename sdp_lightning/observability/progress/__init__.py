"""What a run does now, on one line: in a terminal, a log, a notebook."""
