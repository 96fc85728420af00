"""How fast fedxmr is, as ratios to programs that do the same with less, or otherwise. `make bench` runs them."""
