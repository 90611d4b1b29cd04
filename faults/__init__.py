"""Faults on purpose: files damaged at random, and training killed at random moments; what is counted goes to a file."""
