"""One engine process: paged KV cache, scheduler, forward passes and staging copies.

``messages``, ``boundary`` and ``client`` are the agent's side of the wall and never import torch;
``process`` and what it imports run inside the engine process only.
"""
