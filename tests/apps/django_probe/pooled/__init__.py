"""SQLite that takes the option `pool`; ending the pool is noted, as nothing else is to be seen of it."""
