"""Studies of placements: read (plan), choose (ground, arms), train (training), keep (store), report, run."""
