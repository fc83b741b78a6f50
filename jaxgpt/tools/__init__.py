"""Looking at a run without running it, or while it runs: dry run, profile, plan."""
