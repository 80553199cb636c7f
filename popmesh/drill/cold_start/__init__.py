"""The cold-start drill as its operator holds it: runs, history, budget, projection."""
