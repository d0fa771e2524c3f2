"""Groups of rollouts: which are live, where each one stands, and which may be trained on."""
