"""Steps, optimisers, the loop, and what a run leaves on disk."""
