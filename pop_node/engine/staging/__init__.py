"""Copies of KV between the cache and the memory that engine and agent share."""
