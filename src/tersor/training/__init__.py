"""Long runs: folders that one run owns, and all that a run needs to go on after a kill."""
