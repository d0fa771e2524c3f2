"""What processes that train together agree on (messages, meetings, failures, sums); event loops."""
