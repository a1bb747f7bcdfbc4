"""Two-tier object storage: size routing, redirect tombstones, compare-and-swap, change log, and the backends."""
