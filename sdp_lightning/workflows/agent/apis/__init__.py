"""The forms of the APIs that agents speak: bodies of requests, answers, events and errors."""
