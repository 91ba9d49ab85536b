"""Portico: a self-hosted tunnel platform."""
