"""The command line: what each command does, and how Lightning reads its settings."""
