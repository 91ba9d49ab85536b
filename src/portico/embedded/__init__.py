"""Portico on one machine: PostgreSQL and Valkey as child processes, and the supervisor behind `portico up`."""
