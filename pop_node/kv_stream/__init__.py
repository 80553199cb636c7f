"""Hands the KV cache of a prompt from the prefill node to the decode node."""
