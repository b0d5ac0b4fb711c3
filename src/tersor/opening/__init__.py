"""OpenING."""
