"""Small shared parts without business meaning: database, ids, clock, pages, logging."""
