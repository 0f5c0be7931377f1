"""What works with which architecture: small models with random weights, tried from end to end.

``python -m tests.matrix`` tries them all and writes docs/support.md.
"""
