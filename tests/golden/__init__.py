"""Recorded plans and the recorded public face: what a change must not change unnoticed."""
