"""Reading and checking config files, and filling in what follows from the data."""
