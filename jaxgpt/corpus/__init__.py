"""Text to token shards: sources of text, and shards of their tokens."""
