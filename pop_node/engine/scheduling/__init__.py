"""What runs in the next step, decided without torch or a clock: sequences, blocks, guesses."""
