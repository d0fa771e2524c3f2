"""Transports that bring new weights to engines."""
