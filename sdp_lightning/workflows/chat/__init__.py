"""How a conversation becomes the text of a chat template, and the tokens of that text."""
