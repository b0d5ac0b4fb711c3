"""What the pages and servers of tersor share: an app that tells nothing, tokens, templates, and where it listens."""
