"""Training, measuring and reporting on a user's own network and data, for the command line."""
