"""Whole runs under faults: the short forms of scripts/faults; and secrets, paths, the spike guard."""
