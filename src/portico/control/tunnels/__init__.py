"""Tunnels, agent sessions and their grants, the relays that serve them, and what they used."""
