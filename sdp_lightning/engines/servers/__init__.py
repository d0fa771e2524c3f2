"""Servers that this process starts, and what runs inside them."""
