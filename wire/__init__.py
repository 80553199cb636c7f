"""The vocabulary that every part of the mesh shares: messages, framing, errors.

Imports nothing else of popmesh, and never torch.
"""
