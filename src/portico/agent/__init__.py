"""The agent: on the developer's machine, between the relay and the local target."""
