"""What validate_gspo.py measures."""
