"""EleutherAI's lm-evaluation-harness on our models: an adapter, a suite, five local tasks.

Importing this package needs nothing of the extra `eval`; its `adapter` does.
"""
