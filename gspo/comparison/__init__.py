"""Many runs, and what they say together: which of two settings is better, and how sure that is."""
