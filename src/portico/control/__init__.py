"""The control plane: identity, entitlements, policy, grants, audit. Carries no tunnel traffic."""
