"""OpenING: open-ended answers in text and pictures, compared in pairs, down to a ranking with its intervals."""
