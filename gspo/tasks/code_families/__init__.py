"""Families of function-writing problems, by difficulty."""
