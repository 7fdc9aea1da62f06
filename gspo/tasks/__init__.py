"""Problems, and what a response to one earns."""
