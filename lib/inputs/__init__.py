"""What comes from outside: models, chat rows, token sets, their records; how they are fetched, kept and checked."""
