"""Rollouts in a checkpoint, and their redistribution to another number of ranks."""
