"""What is wrong with a machine, or between machines, and what to do about it."""
