"""The trained model: loading, forwards, adapters, sharding, steps, and weights for engines."""
