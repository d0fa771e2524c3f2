"""Inference engines: what samples, under which policy version."""
