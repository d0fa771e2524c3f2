"""Generation while the trainer trains: capacity, staleness, queues, the executor.

asyncio and threads; no torch model and no Lightning.
"""
