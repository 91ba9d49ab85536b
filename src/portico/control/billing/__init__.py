"""Money from customers: what they bought, from whom it came, what they owe. The ledger behind it is ``finance``."""
