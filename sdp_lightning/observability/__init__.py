"""What a run shows of itself: progress, report, summary, view of the data, recording."""
