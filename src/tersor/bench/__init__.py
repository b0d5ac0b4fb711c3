"""Measuring, records, and what is made of them: the scoreboard and the report."""
