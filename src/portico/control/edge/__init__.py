"""What relays talk to: the edge stream, heartbeats, acknowledgements and usage reports."""
