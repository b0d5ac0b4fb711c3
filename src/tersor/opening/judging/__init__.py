"""Judges: behind an endpoint, on this machine, scripted; and what runs them over all battles."""
