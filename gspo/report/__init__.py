"""Pictures and a page from a run's folder, and what it says about the run in a few sentences."""
