"""Storage: in which form tokens are kept once they are compressed."""
