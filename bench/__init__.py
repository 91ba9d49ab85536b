"""The public benchmark: `make bench`. Portico, and others on the same work, measured side by side on this machine."""
