"""How facts look in a terminal. Units are printed, and the formula where a number needs one."""
