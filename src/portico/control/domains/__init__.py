"""Domains of one's own: claimed, proved, pointed here, served with a certificate. Routing one is a verb of tunnels."""
