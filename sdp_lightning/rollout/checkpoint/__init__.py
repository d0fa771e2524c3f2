"""What a checkpoint holds of rollouts, and how another number of ranks shares it."""
