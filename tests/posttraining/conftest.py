"""The tiny agent's config and tokenizer."""

from tests.tiny_agent import grpo_config, phrases

__all__ = ["grpo_config", "phrases"]
