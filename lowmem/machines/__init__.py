"""Machines that are planned for: cards by name, and what was measured on this one."""
