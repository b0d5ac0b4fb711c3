"""Selection: which of the tokens waiting for compression matter."""
