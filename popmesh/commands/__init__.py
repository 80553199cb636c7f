"""One module per command. Only click is imported at the top; the rest when a command runs."""
