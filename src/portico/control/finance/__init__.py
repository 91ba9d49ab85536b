"""Money as an auditor wants it: immutable events, a double-entry ledger, and what is derived from them.

Below identity: organizations are ids here, and nothing in this package knows a payment provider's wire format.
"""
