"""What the platform tells people and programs: mail, and an organization's own channels."""
