"""A Django app beside the example's: its tasks and handlers say what they find of database connections."""
