"""A policy and one update of it: torch and transformers, neither Lightning nor rollouts."""
