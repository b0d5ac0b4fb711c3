"""`tersor tune`: the settings, and the widths of each layer, that lose least on a user's texts at a budget of bytes."""
