"""The family's chat format: conversations to text, text to turns, and which tokens are learned."""
