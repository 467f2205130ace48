"""A whole run of the subliminal-learning experiment: its page, and what comes from other machines."""
