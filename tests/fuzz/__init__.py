"""Fuzzing: random cases against what must be true of all, from a seed, as a command."""
