"""People, organizations, keys, sign-in, and the keys that sign tokens."""
