"""A grid of fits or hedging degrees: cells, what is trained together, where that runs, and what it leaves behind."""
