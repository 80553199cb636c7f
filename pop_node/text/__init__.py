"""Text in, token ids out, and back: what the agent does off its event loop. Never imports torch."""
