"""What `tersor demo` runs of the KV methods, one file a method."""
