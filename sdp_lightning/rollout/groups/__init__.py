"""Groups of rollouts: which are in flight, in which state, and which are stale."""
