"""Voting: the four ways in which a vote becomes masks, one file each."""
