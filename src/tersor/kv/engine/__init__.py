"""The engine: cache, layers and attention function, run by a method's four choices."""
