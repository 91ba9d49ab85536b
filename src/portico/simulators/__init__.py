"""What only the internet provides, for tests and drills: stateful, signing like the real one, and able to misbehave."""
