"""Agents: what they ask at an address is sampled, kept token for token, and trained on."""
