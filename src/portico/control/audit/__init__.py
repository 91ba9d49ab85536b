"""Who did what: one row per act, in the transaction of the act."""
