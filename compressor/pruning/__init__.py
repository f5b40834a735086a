"""Structural edits: channel pruning, kernel replacement and block removal, each decided first and then applied."""
