"""The figures of the papers, measured anew: a file for each, and a bench to measure on."""
