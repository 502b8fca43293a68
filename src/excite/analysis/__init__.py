"""What the trained networks' numbers say: statistics of comparisons."""
