"""Observing: from losses to the ballot that a method decides on."""
