"""The OpenAI-compatible server: HTTP and protocol; whoever generates is given to it."""
