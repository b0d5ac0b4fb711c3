"""The page on which people vote: two answers side by side, without names."""
