"""From a schedule to tokens, on the host or on an accelerator."""
