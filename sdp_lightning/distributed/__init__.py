"""What the processes that train together agree on: messages, meetings, failures, sums."""
